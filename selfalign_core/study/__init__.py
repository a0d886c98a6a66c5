"""Closed-loop evaluation in the simulator: episodes, tables with confidence intervals, animations. No ROS."""
