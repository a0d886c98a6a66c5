"""The PyTorch core of SelfAlign: model, E-Token, losses, buffer, aligner, policy, simulator. Never imports ROS."""
