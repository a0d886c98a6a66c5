"""Self-alignment: the E-Token is fitted to the robot at hand from its own recent motion.

``phases`` says what is done when, and ``machine`` does it: ``excitation`` and ``screen`` judge the evidence; of the
``stages`` of an attempt ``identify`` picks the best known token, ``refine`` improves a shadow of it and ``guard``
decides; ``watch`` notices when the robot changed, ``history`` remembers. Nothing here knows ROS, clocks (but for
budgets) or where transitions come from.
"""

from selfalign_core.alignment.config import AlignConfig
from selfalign_core.alignment.machine import SelfAligner
from selfalign_core.alignment.phases import Request
from selfalign_core.alignment.reports import StageReport, State

__all__ = ["AlignConfig", "Request", "SelfAligner", "StageReport", "State"]
