"""Fixtures for tests with real node processes; see node_testing.py."""

from ros_fixtures import folder, graph, parameters, probe, recording, ros_domain

__all__ = ["folder", "graph", "parameters", "probe", "recording", "ros_domain"]
