"""Fixtures for tests with real node processes; see node_testing.py."""

from ros_fixtures import graph, probe, ros_domain

__all__ = ["graph", "probe", "ros_domain"]
