"""A GIF of one episode, seen by a spectator, with the prompt in the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from selfalign_core.errors import ConfigError
from selfalign_core.files import write_atomically
from selfalign_core.sim import prompt_for
from selfalign_core.study.rollout import (
    CONTROL_HZ,
    EpisodeResult,
    EpisodeSpec,
    Planner,
    RolloutConfig,
    RunningEpisode,
    rollout,
)

_HEIGHT, _WIDTH = 240, 320
_EVERY = 2  # control steps per picture: 10 pictures per second
_LAST_S = 1.5  # how long the last picture stays


def save_animation(path: str | Path, planner: Planner, episode: EpisodeSpec, config: RolloutConfig) -> EpisodeResult:
    """Run ``episode`` and write it to the .gif file ``path`` (320 x 240 pixels, 10 per second, real time)."""
    check_animation_path(path)
    frames: list[np.ndarray] = []

    def draw(running: RunningEpisode) -> None:
        if running.step % _EVERY == 0:
            image = running.env.sim.render("scene", _HEIGHT, _WIDTH)
            frames.append(_with_text(image, prompt_for(running.episode.told)))

    [result] = rollout(planner, [episode], config, before_step=draw)
    data = _gif(frames)

    def write(temporary: str) -> None:
        Path(temporary).write_bytes(data)

    write_atomically(Path(path), write)
    return result


def check_animation_path(path: str | Path) -> None:
    """``ConfigError`` unless ``path`` ends in .gif."""
    if Path(path).suffix.lower() != ".gif":
        raise ConfigError(f"gif: found {str(path)!r}, expected a name that ends in .gif")


def _with_text(image: np.ndarray, text: str) -> np.ndarray:
    image = image.copy()
    for colour, thickness in ((0, 3), (255, 1)):  # legible on anything: white with a dark rim
        cv2.putText(image, text, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (colour,) * 3, thickness, cv2.LINE_AA)
    return image


def _gif(frames: Sequence[np.ndarray]) -> bytes:
    animation = cv2.Animation()
    animation.frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) for frame in frames]
    durations = [round(1000 * _EVERY / CONTROL_HZ)] * len(frames)
    animation.durations = [*durations[:-1], round(1000 * _LAST_S)]
    done, data = cv2.imencodeanimation(".gif", animation)
    if not done:
        raise OSError("gif: OpenCV could not encode the animation")
    return data.tobytes()
