"""Between ROS messages and the core's records. Bad messages are refused with a name, never repaired.

No maths and no state: every function takes one thing and returns its counterpart. Big fields travel as
``array`` buffers; a Python list of a million integers would take longer than an inference.
"""

from __future__ import annotations

import array
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from selfalign.msg import ActionChunk as ActionChunkMsg
from selfalign.msg import AlignLosses as AlignLossesMsg
from selfalign.msg import AlignReport as AlignReportMsg
from selfalign.msg import EToken as ETokenMsg
from selfalign_core.errors import InputError
from selfalign_core.robot.commands import CommandPath
from selfalign_core.robot.contract import Camera, RobotContract
from selfalign_core.robot.images import picture
from selfalign_core.robot.joint_states import read_joints
from selfalign_core.robot.motion import Halt, Position, Trajectory
from selfalign_core.robot.types import ActionChunk, EToken, TransitionBatch, token_norm

if TYPE_CHECKING:
    from selfalign_core.alignment import StageReport
    from selfalign_core.alignment.scoring import AlignLosses

NS_PER_S = 1_000_000_000


def to_ns(stamp: Time | Duration) -> int:
    """A message's stamp or duration in nanoseconds."""
    return stamp.sec * NS_PER_S + stamp.nanosec


def to_stamp(ns: int) -> Time:
    """Nanoseconds as a message's stamp."""
    return Time(sec=int(ns // NS_PER_S), nanosec=int(ns % NS_PER_S))


def fill(typecode: str, values: np.ndarray) -> array.array:
    """A flat message field from an array, in one copy. ``typecode`` is the field's: B, f, d, I, q."""
    dtype = np.dtype(typecode if typecode != "B" else np.uint8)
    field = array.array(typecode)
    field.frombytes(np.ascontiguousarray(values, dtype).data.cast("B") if values.size else b"")
    return field


# --- images and joints ---


def decode(camera: Camera, message: Image | CompressedImage, size: tuple[int, int]) -> np.ndarray:
    """The image of one camera at the model's ``size`` (height, width), see ``selfalign_core.robot.images.picture``.

    Raises ``InputError`` naming camera and topic.
    """
    try:
        return picture(message, camera, size)
    except InputError as error:
        raise InputError(f"camera {camera.name} ({camera.topic}): {error}") from None


def image_message(rgb: np.ndarray, stamp: Time, frame_id: str) -> Image:
    """(H, W, 3) uint8 RGB as an ``rgb8`` image."""
    message = Image(height=rgb.shape[0], width=rgb.shape[1], step=rgb.shape[1] * 3, encoding="rgb8")
    message.header.stamp, message.header.frame_id = stamp, frame_id
    message.data = fill("B", rgb)
    return message


def positions_in_order(message: JointState, joint_names: Sequence[str], topic: str) -> np.ndarray:
    """Joint positions in contract order, (joints,) float64. Other joints in the message are ignored.

    Raises ``InputError`` naming the topic and the joint that is missing, doubled or not finite.
    """
    try:
        return read_joints(message.name, message.position, joint_names).all_positions(joint_names)
    except InputError as error:
        raise InputError(f"{topic}: {error}") from None


def joint_state_message(names: Sequence[str], positions: np.ndarray, stamp_ns: int) -> JointState:
    """Positions in the order of ``names``."""
    message = JointState(name=list(names), position=fill("d", positions))
    message.header.stamp = to_stamp(stamp_ns)
    return message


def trajectory_message(names: Sequence[str], path: CommandPath, stamp_ns: int) -> JointTrajectory:
    """The points of a path after its start, timed from ``stamp_ns`` (header.stamp)."""
    message = JointTrajectory(joint_names=list(names))
    message.header.stamp = to_stamp(stamp_ns)
    for due_ns, position in zip(path.stamps_ns[1:], path.positions[1:], strict=True):
        point = JointTrajectoryPoint(positions=position.tolist())
        offset = int(due_ns) - stamp_ns
        point.time_from_start.sec, point.time_from_start.nanosec = divmod(offset, NS_PER_S)
        message.points.append(point)
    return message


def command_message(names: Sequence[str], command: Trajectory | Halt | Position) -> JointTrajectory | Float64MultiArray:
    """A command as the controller of its kind expects it.

    The header.stamp of a halt is 0, "as soon as it arrives": a controller refuses a trajectory that ends in the past,
    and a halt that is late, or whose reader's clock is ahead, has to stop the robot all the same.
    """
    match command:
        case Position(position):
            return Float64MultiArray(data=fill("d", position))
        case Halt(position, duration_ns):
            path = CommandPath(np.array([0, duration_ns], np.int64), np.stack([position, position]))
            return trajectory_message(names, path, 0)
        case Trajectory(path, stamp_ns):
            return trajectory_message(names, path, stamp_ns)


@dataclass(frozen=True)
class TrajectoryTimes:
    """When the points of a trajectory are due. ``start_ns`` 0 means "as soon as it arrives"."""

    start_ns: int
    offsets_ns: np.ndarray  # (points,) int64, rising


def trajectory_points(message: JointTrajectory, joint_names: Sequence[str]) -> tuple[TrajectoryTimes, np.ndarray]:
    """Times and positions, (points, joints) float64 in contract order. Raises ``InputError`` naming what is wrong."""
    if sorted(message.joint_names) != sorted(joint_names):
        raise InputError(f"joint trajectory: found joints {list(message.joint_names)}; expected {list(joint_names)}")
    if not message.points:
        raise InputError("joint trajectory: found no points; expected at least one")
    order = [list(message.joint_names).index(name) for name in joint_names]
    for i, point in enumerate(message.points):
        if len(point.positions) != len(order) or not all(map(math.isfinite, point.positions)):
            raise InputError(
                f"joint trajectory: points[{i}].positions: found {list(point.positions)}; "
                f"expected {len(order)} finite positions"
            )
    offsets = np.array([to_ns(point.time_from_start) for point in message.points], np.int64)
    if (np.diff(offsets) <= 0).any():
        raise InputError("joint trajectory: found points whose time_from_start does not rise; expected rising times")
    positions = np.array([point.positions for point in message.points], np.float64)[:, order]
    return TrajectoryTimes(to_ns(message.header.stamp), offsets), positions


def positions_from_command(message: Float64MultiArray, joints: int) -> np.ndarray:
    """A forward command, (joints,) float64. Raises ``InputError``."""
    position = np.array(message.data, np.float64)
    if position.shape != (joints,) or not np.isfinite(position).all():
        raise InputError(f"forward command: found {position.tolist()}; expected {joints} finite positions")
    return position


# --- E-Token, chunks, reports ---


def e_token_from_message(message: ETokenMsg) -> EToken:
    """Raises ``InputError`` when shape and data disagree; whether it fits the model is the policy's to
    judge.
    """
    shape = tuple(int(n) for n in message.shape)
    if len(message.data) != math.prod(shape):
        raise InputError(f"e_token.data: found {len(message.data)} values; expected {shape[0]} x {shape[1]}")
    data = np.array(message.data, np.float32).reshape(shape)
    return EToken(data, int(message.version), message.embodiment, message.model_digest)


def e_token_message(token: EToken, stamp: Time) -> ETokenMsg:
    """An E-Token, committed at ``stamp``."""
    message = ETokenMsg(
        embodiment=token.embodiment,
        version=token.version,
        shape=[int(n) for n in token.data.shape],
        data=fill("f", token.data),
        model_digest=token.model_digest,
    )
    message.header.stamp = stamp
    return message


def chunk_message(chunk: ActionChunk, joint_names: Sequence[str], *, duration_s: float, age_s: float) -> ActionChunkMsg:
    """A chunk as it is published; ``age_s`` is the observation's age when inference started."""
    horizon, dim = chunk.actions.shape
    message = ActionChunkMsg(
        e_token_version=chunk.e_token_version,
        dt=chunk.dt,
        horizon=horizon,
        dim=dim,
        joint_names=list(joint_names),
        data=fill("f", chunk.actions),
        inference_duration=duration_s,
        observation_age=age_s,
    )
    message.header.stamp = to_stamp(chunk.stamp_ns)
    return message


def losses_message(losses: AlignLosses) -> AlignLossesMsg:
    return AlignLossesMsg(
        perception=float(losses.perception),
        dynamics=float(losses.dynamics),
        inverse_dynamics=float(losses.inverse_dynamics),
        total=float(losses.total),
    )


def report_message(report: StageReport, *, stamp: Time, embodiment: str, duration_s: float) -> AlignReportMsg:
    """What one round of the aligner did."""
    message = AlignReportMsg(
        embodiment=embodiment,
        state=report.state.value,
        text=report.text,
        version_before=report.token.version - report.accepted,
        version_after=report.token.version,
        e_token_norm=token_norm(report.token.data),
        transitions=report.transitions,
        duration=duration_s,
    )
    message.header.stamp = stamp
    if (excitation := report.excitation) is not None:
        message.joints = list(excitation.joints)
        message.command_spread = array.array("f", excitation.command)
        message.motion_spread = array.array("f", excitation.motion)
    if (drift := report.drift) is not None:
        message.drift_tested, message.drift = True, drift.fired
        message.drift_z, message.drift_factor = drift.z, drift.factor
    if (returned := report.returned) is not None:
        message.returned = True
        message.difference_mean, message.difference_stderr = returned.verdict.mean, returned.verdict.stderr
    if (attempt := report.attempt) is not None:
        message.attempted, message.accepted = True, report.accepted
        message.start, message.steps = attempt.identification.name, attempt.refinement.steps
        message.fit_count, message.guard_count = attempt.fit_count, attempt.guard_count
        message.attempt_duration = duration_s + attempt.earlier_ms / 1e3
        for name in ("fit_before", "fit_after", "guard_before", "guard_after"):
            setattr(message, name, losses_message(getattr(attempt, name)))
        message.difference_mean, message.difference_stderr = attempt.verdict.mean, attempt.verdict.stderr
    return message


# --- transitions ---


def fill_transitions(response: Any, batch: TransitionBatch) -> None:
    """Write a batch into a SampleTransitions response."""
    _, _, height, width, _ = batch.frames.shape
    response.cameras = list(batch.cameras)
    response.height, response.width = height, width
    response.state_dim = batch.frame_states.shape[1]
    response.horizon, response.action_dim = batch.actions.shape[1:]
    response.frames = fill("B", batch.frames)
    response.frame_states = fill("f", batch.frame_states)
    response.frame_stamps = fill("q", batch.frame_stamps)
    response.obs_index = fill("I", batch.obs_index)
    response.next_index = fill("I", batch.next_index)
    response.actions = fill("f", batch.actions)


def read_transitions(response: Any, contract: RobotContract) -> TransitionBatch:
    """The batch of a SampleTransitions response that holds one. Raises ``InputError`` naming the field."""
    if tuple(response.cameras) != contract.camera_names:
        raise InputError(f"transitions.cameras: found {list(response.cameras)}; expected {list(contract.camera_names)}")
    count, batch = len(response.frame_stamps), len(response.obs_index)
    joints, cameras = len(contract.joints), len(contract.cameras)

    def field(name: str, dtype: Any, *shape: int) -> np.ndarray:
        values = np.frombuffer(getattr(response, name), dtype=dtype)
        if values.size != math.prod(shape):
            raise InputError(f"transitions.{name}: found {values.size} values; expected {shape}")
        return values.reshape(shape)

    return TransitionBatch(
        cameras=contract.camera_names,
        frames=field("frames", np.uint8, count, cameras, response.height, response.width, 3),
        frame_states=field("frame_states", np.float32, count, joints),
        frame_stamps=field("frame_stamps", np.int64, count),
        obs_index=field("obs_index", np.uint32, batch).astype(np.int64),
        next_index=field("next_index", np.uint32, batch).astype(np.int64),
        actions=field("actions", np.float32, batch, response.horizon, joints),
    )
