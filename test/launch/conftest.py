"""The launch tests share helpers and fixtures with test/ros."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ros"))

from ros_fixtures import folder, parameters, probe, recording, ros_domain

__all__ = ["folder", "parameters", "probe", "recording", "ros_domain"]
