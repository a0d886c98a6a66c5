"""Quality of service of every topic, in one place, so that both ends of a topic cannot disagree."""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data

# Cameras and joint states: the newest counts, a lost one is not sent again.
SENSOR = qos_profile_sensor_data
# Commands: none may be lost, and an old one must not wait behind others.
COMMAND = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
# Streams of which nothing may be lost: chunks, executed actions, reports.
EVENTS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
# State: a late joiner gets the current value at once.
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# Lock-step replay: every message counts and none may be dropped.
LOCKSTEP = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_ALL)
LOCKSTEP_LATCHED = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    history=HistoryPolicy.KEEP_ALL,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
