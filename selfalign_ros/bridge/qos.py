"""Quality of service of every topic, in one place, so that both ends of a topic cannot disagree.

A site may override history, depth, reliability and durability of any of them with the parameters ROS 2 has for that,
such as ``qos_overrides./joint_states.subscription.reliability``.
"""

from __future__ import annotations

import copy
from typing import Any

from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_profile_sensor_data,
)
from rclpy.qos_overriding_options import QoSOverridingOptions

_OVERRIDING = QoSOverridingOptions(
    (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
)

# Cameras and joint states: the newest counts, a lost one is not sent again.
SENSOR = qos_profile_sensor_data
# Commands: none may be lost, and an old one must not wait behind others.
COMMAND = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
# Streams of which nothing may be lost: chunks, executed actions, reports.
EVENTS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
# The same, and whoever comes late gets the newest hundred.
RECENT_EVENTS = QoSProfile(
    depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)
# State: a late joiner gets the current value at once.
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# Lock-step replay: every message counts and none may be dropped.
LOCKSTEP = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_ALL)
LOCKSTEP_LATCHED = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    history=HistoryPolicy.KEEP_ALL,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


def overridable(profile: QoSProfile) -> dict[str, Any]:
    """Arguments of ``create_publisher`` and ``create_subscription``: ``profile``, which parameters may override.

    Not in lock-step (``LOCKSTEP``, ``LOCKSTEP_LATCHED``), where a lost message would make two replays differ.
    """
    if profile.history == HistoryPolicy.KEEP_ALL:
        return {"qos_profile": profile}
    return {"qos_profile": copy.copy(profile), "qos_overriding_options": _OVERRIDING}  # rclpy changes what it is given
