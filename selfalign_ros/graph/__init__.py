"""The graph: its declaration, the supervisor, launch."""
