"""Data for training: the on-disk dataset, what it is made from (ROS bags, LeRobot datasets) and how it is read.

Knows neither ROS nor the model; only the last step of the loader knows torch.
"""
