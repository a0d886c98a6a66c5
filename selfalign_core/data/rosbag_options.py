"""What a user may choose, besides the robot contract, when bags become a dataset."""

from __future__ import annotations

from dataclasses import dataclass

from selfalign_core.data.partial import DatasetError


@dataclass(frozen=True)
class Options:
    """What a user may choose besides the contract.

    ``prompt``: what the robot was told in these bags, "" for play; None: what their topic ``prompt`` says, and play in
    bags that have none. ``namespace``: of relative topic names.
    ``max_action_age_s``: longest time an action is taken to stay in force [s]; None: 1.5 control steps, as in the
    nodes.
    ``absolute``: joints whose actions are not taken relative to the state in the statistics (grippers).
    ``allow_early_end``: use what was recorded before a topic vanished, instead of refusing the bag.
    """

    image_size: tuple[int, int] = (64, 64)
    prompt: str | None = None
    embodiment: str | None = None
    namespace: str = "/"
    max_action_age_s: float | None = None
    min_frames: int = 2
    allow_early_end: bool = False
    absolute: tuple[str, ...] = ()
    statistics_horizon: int | None = None

    def topic(self, name: str) -> str:
        """The absolute name of a topic of the contract."""
        return name if name.startswith("/") else f"{self.namespace.rstrip('/')}/{name}"

    def check_action_age(self, dt_s: float) -> None:
        """Raises ``DatasetError`` if actions were to end before they do in the nodes; ``dt_s``: of a control step."""
        if self.max_action_age_s is not None and self.max_action_age_s < 1.5 * dt_s:
            raise DatasetError(
                f"max_action_age: found {self.max_action_age_s} s, expected at least 1.5 control steps "
                f"({1.5 * dt_s:g} s)"
            )
