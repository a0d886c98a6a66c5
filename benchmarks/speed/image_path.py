"""Time per camera frame from the ROS message to the model's input, against a plain cv2 pipeline on the same image.

Both sides end with the same tensor, (1, 3, height, width) float32 in [-1, 1]. The plain pipeline does what a node
without this package would: view the bytes, convert the colours, resize (area averaging), pad, scale. The two take
turns, frame by frame, so that whatever else the machine does meets both; the ratio is that of their medians.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from sensor_msgs.msg import CompressedImage, Image
from torch import Tensor

from benchmarks.harness import print_table, quartiles_of_ratio, save, take_turns
from selfalign_core.command_line import File, command, expect_at_least
from selfalign_core.errors import ConfigError
from selfalign_core.policy import Policy
from selfalign_core.robot.contract import Camera, RobotContract
from selfalign_ros.bridge.conversions import decode, fill
from selfalign_ros.life.resources import config_file

SIZES = ((480, 640), (720, 1280))
INPUT = 224
CONVERSIONS = {"rgb8": None, "bgr8": cv2.COLOR_BGR2RGB, "mono8": cv2.COLOR_GRAY2RGB, "rgba8": cv2.COLOR_RGBA2RGB}
COMPRESSED = {"jpeg": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 90]), "png": (".png", [])}
PADDING = 64
"""Bytes at the end of each row in the cases named so."""


def picture(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 RGB: smooth shapes with a little noise, about as hard to compress as a camera's."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def raw_message(rgb: np.ndarray, encoding: str, padding: int = 0) -> Image:
    """``rgb`` as a camera of that encoding would send it, ``padding`` bytes after each row."""
    height, width = rgb.shape[:2]
    pixels = {
        "rgb8": rgb,
        "bgr8": rgb[..., ::-1],
        "mono8": rgb[..., :1],
        "rgba8": np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], axis=-1),
    }[encoding]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)))
    message = Image(height=height, width=width, step=rows.shape[1], encoding=encoding)
    message.data = fill("B", rows)
    return message


def compressed_message(rgb: np.ndarray, kind: str) -> CompressedImage:
    """``rgb`` as JPEG (quality 90) or PNG."""
    suffix, options = COMPRESSED[kind]
    _, data = cv2.imencode(suffix, rgb[..., ::-1], options)
    return CompressedImage(format=kind, data=fill("B", data.ravel()))


def plain(message: Image | CompressedImage, size: int) -> Tensor:
    """The same with numpy and cv2 alone."""
    buffer = np.frombuffer(message.data, np.uint8)
    if isinstance(message, CompressedImage):
        bgr = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
        assert bgr is not None  # it was encoded here
        rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    else:
        conversion = CONVERSIONS[message.encoding]
        channels = {"mono8": 1, "rgba8": 4}.get(message.encoding, 3)
        rows = buffer.reshape(message.height, message.step)[:, : message.width * channels]
        pixels = rows.reshape(message.height, message.width, channels)
        rgb = pixels if conversion is None else cv2.cvtColor(pixels, conversion)
    height, width = rgb.shape[:2]
    ratio = max(height, width) / size
    fitted_height, fitted_width = int(height / ratio), int(width / ratio)
    fitted = cv2.resize(rgb, (fitted_width, fitted_height), interpolation=cv2.INTER_AREA)
    top, left = (size - fitted_height) // 2, (size - fitted_width) // 2
    padded = cv2.copyMakeBorder(
        fitted, top, size - fitted_height - top, left, size - fitted_width - left, cv2.BORDER_CONSTANT
    )
    return torch.from_numpy(padded[None]).permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0


def cases(height: int, width: int) -> dict[str, Image | CompressedImage]:
    """The messages that are timed, by name."""
    rgb = picture(height, width)
    raw = {encoding: raw_message(rgb, encoding) for encoding in CONVERSIONS}
    padded = {f"bgr8, rows padded by {PADDING} bytes": raw_message(rgb, "bgr8", PADDING)}
    return raw | padded | {kind: compressed_message(rgb, kind) for kind in COMPRESSED}


def measure_size(height: int, width: int, frames: int) -> list[dict[str, Any]]:
    """Figures of every case at one camera size. Raises ``ConfigError`` if the two sides disagree on a tensor."""
    policy = Policy.untrained(RobotContract.from_yaml(config_file("contracts/sim_reach.yaml")))
    found = []
    for name, message in cases(height, width).items():
        encoding: Literal["raw", "compressed"] = "raw" if isinstance(message, Image) else "compressed"
        camera = Camera(name="camera", topic="camera", encoding=encoding, height=height, width=width)

        def ours(camera: Camera = camera, message: Image | CompressedImage = message) -> Tensor:
            return policy.codec.images_to_model(decode(camera, message, (INPUT, INPUT))[None])

        def theirs(message: Image | CompressedImage = message) -> Tensor:
            return plain(message, INPUT)

        if not torch.equal(ours(), theirs()):
            raise ConfigError(f"{width}x{height} {name}: found another tensor than plain cv2's; expected the same")
        times = take_turns({"ours": ours, "plain": theirs}, repeats=frames, warm_up=3)
        ours_ms, plain_ms = (float(np.median(ms)) for ms in times.values())
        found.append(
            {
                "width": width,
                "height": height,
                "image": name,
                "ours_ms": ours_ms,
                "plain_cv2_ms": plain_ms,
                "ratio": ours_ms / plain_ms,
                "ratio_quartiles": quartiles_of_ratio(times["ours"], times["plain"]),
            }
        )
    return found


def run(*, frames: Annotated[int, "timed frames of each kind and side"] = 200, json: File = None) -> None:
    """Message to model input (224 x 224) per camera frame, against plain cv2."""
    expect_at_least(1, frames=frames)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    results = [result for size in SIZES for result in measure_size(*size, frames)]
    save(json, "image_path", input=INPUT, frames=frames, results=results)
    rows = [
        [
            f"{r['width']} × {r['height']} {r['image']}",
            *(f"{r[key]:.2f} ms" for key in ("ours_ms", "plain_cv2_ms")),
            f"{r['ratio']:.2f}",
            f"{r['ratio_quartiles'][0]:.2f} to {r['ratio_quartiles'][1]:.2f}",
        ]
        for r in results
    ]
    print_table(["image", "SelfAlign", "plain cv2", "ratio", "quartiles"], rows)


main = command("benchmarks.speed.image_path", run)

if __name__ == "__main__":
    sys.exit(main())
