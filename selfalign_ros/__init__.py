"""The ROS 2 nodes and the graph they make. Holds no maths: that is in ``selfalign_core``."""
