"""The policy: what a checkpoint says, robot numbers to model numbers and back, observation in, action chunk out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfalign_core.policy.policy import Policy

__all__ = ["Policy"]


def __getattr__(name: str) -> Any:
    # Only who asks for a policy pays for torch: a node that reads a checkpoint's configuration starts at once.
    if name == "Policy":
        from selfalign_core.policy.policy import Policy

        return Policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
