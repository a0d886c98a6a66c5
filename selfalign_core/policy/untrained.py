"""The built-in tiny model with random weights: what a ``checkpoint`` parameter calls it, its seed and its words.

Imports nothing, so a node that looks for a checkpoint's folder starts at once.
"""

TINY_WORDS = (
    "reach", "touch", "the", "red", "green", "blue", "yellow", "orange", "purple", "cube", "ball", "cylinder", "block"
)  # fmt: skip
UNTRAINED_SEED = 0


def is_untrained(checkpoint: str) -> bool:
    """True for its names; it has no files."""
    return checkpoint in ("", "tiny")
