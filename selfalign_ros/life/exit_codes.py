"""What a process's exit code says. Imports nothing, so that whoever starts processes can read it."""

CONFIGURATION = 2
"""A node cannot work with what it was given (contract, parameter, checkpoint): restarting is no cure."""
