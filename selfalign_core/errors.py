"""Errors that a user of the core can act on. Each message names what was wrong, what was found, what was expected."""


class SelfAlignError(ValueError):
    """Base of every error raised on bad input; nothing has been changed when it is raised."""


class ConfigError(SelfAlignError):
    """A configuration value, contract key or option is unknown, missing or out of range."""


class InputError(SelfAlignError):
    """An observation, action, image or token has the wrong shape, dtype, range or holds NaN."""


class CheckpointError(SelfAlignError):
    """A checkpoint or E-Token file is missing tensors, holds surplus ones, or belongs to another model."""


class DatasetError(SelfAlignError):
    """A dataset that cannot be read or written: the message names the file or the episode and frame."""
