"""The robot, as numbers: contract, messages to observations, motion, commands, buffer. Never imports torch or ROS."""
