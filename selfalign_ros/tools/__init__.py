"""Recorder, replay, reports of a run, security: what works on the graph from outside."""
