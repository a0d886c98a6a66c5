"""The simulated robot: a body, an arm with cameras, a reaching task and an expert that knows the body. No ROS."""

from .arm import VIEWS, ArmSim, JointState
from .body import CAMERAS, FAMILIES, JOINTS, BodyConfig, BodyRanges, CameraBody, JointBody, LightBody, LinkBody
from .env import ReachEnv
from .expert import PlayPolicy, ReachExpert
from .model import TARGET_NAMES, prompt_for

__all__ = [
    "CAMERAS",
    "FAMILIES",
    "JOINTS",
    "TARGET_NAMES",
    "VIEWS",
    "ArmSim",
    "BodyConfig",
    "BodyRanges",
    "CameraBody",
    "JointBody",
    "JointState",
    "LightBody",
    "LinkBody",
    "PlayPolicy",
    "ReachEnv",
    "ReachExpert",
    "prompt_for",
]
