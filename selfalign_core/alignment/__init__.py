"""Self-alignment: the E-Token is fitted to the robot at hand from its own recent motion.

``phases`` says what is done when, and ``machine`` does it: ``excitation`` and ``screen`` judge the evidence; of the
``stages`` of an attempt ``identify`` picks the best known token, ``refine`` improves a shadow of it and ``guard``
decides; ``watch`` notices when the robot changed, ``history`` remembers. Nothing here knows ROS, clocks (but for
budgets) or where transitions come from.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from selfalign_core.alignment.config import AlignConfig

if TYPE_CHECKING:
    from selfalign_core.alignment.machine import SelfAligner
    from selfalign_core.alignment.phases import Request
    from selfalign_core.alignment.reports import StageReport, State

__all__ = ["AlignConfig", "Request", "SelfAligner", "StageReport", "State"]

_HOMES = {"SelfAligner": "machine", "Request": "phases", "StageReport": "reports", "State": "reports"}


def __getattr__(name: str) -> Any:
    # Only who aligns pays for torch: a node that declares the settings starts at once.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
