"""Self-alignment: the E-Token is fitted to the robot at hand from its own recent motion.

``machine`` says what is done when: ``excitation`` and ``screen`` judge the evidence; in an ``attempt`` ``identify``
picks the best known token, ``refine`` improves a shadow of it and ``guard`` decides; ``watch`` notices when the robot
changed, ``history`` remembers. Nothing here knows ROS, clocks (but for budgets) or where transitions come from.
"""

from selfalign_core.alignment.config import AlignConfig
from selfalign_core.alignment.machine import SelfAligner
from selfalign_core.alignment.reports import StageReport, State

__all__ = ["AlignConfig", "SelfAligner", "StageReport", "State"]
