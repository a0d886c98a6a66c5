"""Columns of text for people. Knows nothing of what is in them."""

from __future__ import annotations

from collections.abc import Sequence


def align_columns(lines: Sequence[Sequence[str]]) -> str:
    """The lines with their columns lined up: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )
