"""From a camera's message to the model's input: what a plain cv2 pipeline makes of it, or a refusal by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.speed import image_path
from selfalign_core.errors import InputError
from selfalign_core.policy import Policy
from selfalign_core.robot.contract import Camera, RobotContract
from selfalign_ros.bridge.conversions import decode
from selfalign_ros.life.resources import config_file

MESSAGES = image_path.cases(240, 320)


def camera(message: object) -> Camera:
    encoding = "raw" if isinstance(message, image_path.Image) else "compressed"
    return Camera(name="wrist", topic="camera/wrist", encoding=encoding, height=240, width=320)


@pytest.mark.parametrize("name", MESSAGES)
def test_the_models_input_is_that_of_plain_cv2(name: str) -> None:
    message = MESSAGES[name]
    policy = Policy.untrained(RobotContract.from_yaml(config_file("contracts/sim_reach.yaml")))
    image = decode(camera(message), message, (96, 96))
    assert torch.equal(policy.codec.images_to_model(image[None]), image_path.plain(message, 96))


@pytest.mark.parametrize("encoding", ["16UC1", "mono16", "32FC1"])
def test_depth_is_refused_by_the_names_of_camera_topic_and_encoding(encoding: str) -> None:
    message = image_path.Image(height=240, width=320, step=1280, encoding=encoding)
    message.data = image_path.fill("B", np.zeros(240 * 1280, np.uint8))
    with pytest.raises(InputError, match=rf"camera wrist \(camera/wrist\): encoding: found '{encoding}' \(a depth"):
        decode(camera(message), message, (96, 96))


@pytest.mark.parametrize("name", ["rgb8", "jpeg"])
def test_another_size_than_the_contracts_is_refused(name: str) -> None:
    other = image_path.cases(120, 160)[name]
    with pytest.raises(InputError, match=r"camera wrist \(camera/wrist\): size: found 160x120; expected 320x240"):
        decode(camera(other), other, (96, 96))
