"""Between ROS messages and the core: conversions, topics, quality of service."""
