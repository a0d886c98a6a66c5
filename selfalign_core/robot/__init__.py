"""What a robot says and does, as the model's records; knows neither ROS nor torch."""
