"""The simulated robot as a node: cameras, joint states and a command topic, in real time, as the contract says.

It behaves like a robot behind ros2_control: a joint trajectory controller that interpolates, or a forward command
controller; both hold their last position when nothing is commanded, and refuse a malformed command with a reason.
What it begins to follow it says (``followed_command``), whoever sent it: the robot's own word for why it moves.
Joints that the contract does not name hold the pose they start in; their state is published after that of the others.

Its body may be changed while it runs (``~/set_body``), for experiments.

The task goes on for ever: once the target is reached, or its time is over, the objects are placed anew and the prompt
names another target. The simulation runs in the worker, the only thread that touches physics and OpenGL; callbacks
leave the newest command.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import cv2
import numpy as np
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rosgraph_msgs.msg import Clock as ClockMsg
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Bool, Float64, Float64MultiArray, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from selfalign.srv import SetBody
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.records import parse_yaml
from selfalign_core.robot.commands import CommandPath
from selfalign_core.robot.contract import Camera
from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import (
    NS_PER_S,
    fill,
    image_message,
    joint_state_message,
    positions_from_command,
    to_stamp,
    trajectory_points,
)
from selfalign_ros.life.diagnostics import ERROR, OK, WARN, Complaint, Rate, Status
from selfalign_ros.life.node import SelfAlignNode, run
from selfalign_ros.life.resources import config_file
from selfalign_ros.life.worker import Outcome

if TYPE_CHECKING:
    from selfalign_core.sim import ArmSim, BodyConfig

_SUBSTEP_S = 0.005  # how often the commanded position is interpolated
_CLOCK_HZ = 100.0
_SLIP_S = 0.1  # lag behind the wall clock beyond which the simulation stops trying to catch up
_STALL_S = 0.5  # lag after which a trajectory is not followed any further: what it was planned for is past


@dataclass(frozen=True)
class ReceivedCommand:
    """``path``: of the commanded position and the time [ns] from which it is followed. ``said``: as it was received."""

    path: Callable[[np.ndarray, int], CommandPath]
    said: JointTrajectory


@dataclass
class Repeating:
    """Something that happens ``hz`` times per simulated second."""

    hz: float
    action: Callable[[], None]
    due_s: float = 0.0


@dataclass
class Task:
    """Reaching one target after another; times in simulated seconds."""

    number: int = 0  # of the target, from 0
    begun_s: float = 0.0
    steps_near: int = 0  # control steps in a row that the tip has been near the target
    attempted: int = 0
    reached: int = 0

    def next(self, now_s: float) -> None:
        """Begin with another target."""
        self.number, self.begun_s, self.steps_near = self.number + 1, now_s, 0


def read_body(text: str) -> BodyConfig:
    """A body from a file, found like the parameter ``body``, or from YAML, known by its colons.

    Raises ``ConfigError`` naming what is wrong.
    """
    from selfalign_core.sim import BodyConfig

    if ":" not in text:
        return BodyConfig.from_yaml(config_file(text))
    return BodyConfig.from_dict(parse_yaml(text, "a body of the simulated arm"))


class RobotSimNode(SelfAlignNode):
    """See the module."""

    def __init__(self) -> None:
        super().__init__("robot_sim")
        from selfalign_core.sim import CAMERAS, JOINTS, BodyConfig

        contract = self.contract
        for i, camera in enumerate(contract.cameras):
            if camera.name not in CAMERAS:
                raise ConfigError(
                    f"contract cameras[{i}].name: found {camera.name!r}; expected one of {', '.join(CAMERAS)}"
                )
        for i, name in enumerate(contract.joint_names):
            if name not in JOINTS:
                raise ConfigError(f"contract joints[{i}].name: found {name!r}; expected one of {', '.join(JOINTS)}")
        self._names = [*contract.joint_names, *(name for name in JOINTS if name not in contract.joint_names)]
        self._columns = [JOINTS.index(name) for name in self._names]  # of the simulator's joints, in that order
        self._body = BodyConfig.from_yaml(config_file(self.parameters["body"]))  # in force

        # Written by callbacks, read by the simulation; each a single reference, replaced as a whole.
        self._settings: dict[str, Any] = dict(self.parameters.values)
        self._new_command: ReceivedCommand | None = None
        self._new_body: BodyConfig | None = None
        self._reset_target = False
        self._task = Task()

        self._real_time = 1.0
        self._slips = self._commands = self._refused = 0
        self._problem = ""
        self._camera_rate, self._joint_rate = Rate(), Rate()
        self._complaint = Complaint(self.get_logger(), is_error=True, grace_s=0.0)

        self._images = {
            camera.name: self.create_publisher(
                CompressedImage if camera.encoding == "compressed" else Image, camera.topic, qos.SENSOR
            )
            for camera in contract.cameras
        }
        self._joint_states = self.create_publisher(JointState, contract.joint_state_topic, qos.SENSOR)
        self._followed = self.create_publisher(JointTrajectory, "followed_command", qos.RECENT_EVENTS)
        self._distance = self.create_publisher(Float64, "distance_to_target", 10)
        self._target_reached = self.create_publisher(Bool, "target_reached", 10)
        self._prompt = self.create_publisher(String, "prompt", qos.LATCHED)
        self._body_name = self.create_publisher(String, "body", qos.LATCHED)
        self._clock_publisher = (
            self.create_publisher(ClockMsg, "/clock", 10) if self.parameters["publish_clock"] else None
        )
        if contract.action.interface == "joint_trajectory":
            self.create_subscription(JointTrajectory, contract.action.topic, self._on_trajectory, qos.COMMAND)
        else:
            self.create_subscription(Float64MultiArray, contract.action.topic, self._on_positions, qos.COMMAND)
        self.create_service(Trigger, "~/reset_target", self._on_reset_target)
        # A group of its own: it waits for the simulation, and commands must arrive meanwhile.
        self.create_service(SetBody, "~/set_body", self._on_set_body, callback_group=MutuallyExclusiveCallbackGroup())

    def start(self) -> None:
        self.worker.submit(self._simulate, self._on_end)

    def parameters_changed(self, names: set[str]) -> None:
        self._settings = dict(self.parameters.values)

    def _on_end(self, outcome: Outcome[None]) -> None:
        outcome.result()

    # --- commands ---

    def _on_trajectory(self, message: JointTrajectory) -> None:
        try:
            times, positions = trajectory_points(message, self.contract.joint_names)
        except InputError as error:
            self._refuse(str(error))
            return

        def follow(commanded: np.ndarray, now_ns: int) -> CommandPath:
            start = times.start_ns or now_ns
            due = start + times.offsets_ns
            ahead = due > now_ns
            if not ahead.any():
                raise InputError(
                    f"joint trajectory: found its last point {(now_ns - due[-1]) / NS_PER_S:.3f} s in the past; "
                    "expected points to come"
                )
            return CommandPath(
                np.concatenate([[now_ns], due[ahead]]), np.concatenate([commanded[None], positions[ahead]])
            )

        self._accept(ReceivedCommand(follow, message))

    def _on_positions(self, message: Float64MultiArray) -> None:
        try:
            position = positions_from_command(message, len(self.contract.joints))
        except InputError as error:
            self._refuse(str(error))
            return
        point = JointTrajectoryPoint(positions=position.tolist())
        said = JointTrajectory(joint_names=list(self.contract.joint_names), points=[point])
        self._accept(ReceivedCommand(lambda commanded, now_ns: CommandPath(np.array([now_ns]), position[None]), said))

    def _accept(self, command: ReceivedCommand) -> None:
        self._commands += 1
        self._new_command = command
        self._problem = ""

    def _refuse(self, reason: str) -> None:
        self._refused += 1
        self._problem = f"command refused: {reason}"
        self._complaint.say(self._problem)

    def _on_reset_target(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._reset_target = True
        response.success = True
        return response

    async def _on_set_body(self, request: SetBody.Request, response: SetBody.Response) -> SetBody.Response:
        try:
            body = read_body(request.body)
        except ConfigError as error:
            response.message = f"body: {error}"
            return response
        self._new_body = body
        await self.until(lambda: self._body is body)
        response.success, response.message = True, f"body {body.name!r} is in force"
        return response

    # --- simulation, in the worker ---

    def _simulate(self) -> None:
        from selfalign_core.sim import ArmSim

        seed = self._settings["seed"]
        sim = ArmSim(self._body, seed=seed)
        try:
            self._run_in_real_time(sim, seed)
        finally:
            sim.close()

    def _run_in_real_time(self, sim: ArmSim, seed: int) -> None:
        commanded = self._columns[: len(self.contract.joints)]
        origin_ns, wall_s = time.time_ns(), time.monotonic()
        goal = sim.setpoint()  # joints that are not commanded keep this
        path = CommandPath(np.array([origin_ns]), goal[commanded][None])
        now_ns = origin_ns

        def publish_cameras() -> None:
            for camera in self.contract.cameras:
                rgb = sim.render(camera.name, camera.height, camera.width)
                self._images[camera.name].publish(self._image_message(camera, rgb, now_ns))
            self._camera_rate.tick()

        def publish_joints() -> None:
            state = sim.joint_state()
            message = joint_state_message(self._names, state.position[self._columns], now_ns)
            message.velocity = fill("d", state.velocity[self._columns])
            message.effort = fill("d", state.effort[self._columns])
            self._joint_states.publish(message)
            self._joint_rate.tick()

        cameras = Repeating(self._settings["camera_rate"], publish_cameras)
        joints = Repeating(self._settings["joint_state_rate"], publish_joints)
        repeating = [joints, cameras, Repeating(self.contract.rate_hz, lambda: self._judge(sim, seed))]
        if self._clock_publisher is not None:
            clock = self._clock_publisher
            repeating.insert(0, Repeating(_CLOCK_HZ, lambda: clock.publish(ClockMsg(clock=to_stamp(now_ns)))))
        self._prompt.publish(String(data=sim.prompt))
        self._body_name.publish(String(data=self._body.name))
        self.get_logger().info(f"simulated arm ready, body {self.parameters['body']}, {sim.prompt!r}")
        while not self.worker.should_stop():
            cameras.hz, joints.hz = self._settings["camera_rate"], self._settings["joint_state_rate"]
            for item in repeating:
                if item.due_s <= sim.time + 1e-9:
                    item.action()
                    # Late ones are not made up for: a camera does not deliver two images at once.
                    item.due_s = max(item.due_s + 1.0 / item.hz, sim.time)
            if (body := self._new_body) is not None:
                self._new_body = None
                self._apply(body, sim)
                # Set-points stay where they are in space; the new body's encoders call that place something else.
                goal = sim.setpoint()
                path = CommandPath(np.array([now_ns]), goal[commanded][None])
            if (command := self._new_command) is not None:
                self._new_command = None
                path = self._start(command, path, now_ns)
            span_s = min(_SUBSTEP_S, max(min(item.due_s for item in repeating) - sim.time, 1e-4))
            goal[commanded] = path.at(now_ns)
            sim.command(goal)
            sim.step(span_s)
            now_ns = origin_ns + round(sim.time * NS_PER_S)
            ahead_s = (now_ns - origin_ns) / NS_PER_S - (time.monotonic() - wall_s)
            if ahead_s > 0:
                time.sleep(ahead_s)
            elif ahead_s < -_SLIP_S:
                # Too slow for this machine: go on from here instead of racing to make up for what was lost.
                self._slips += 1
                slip_ns = round(-ahead_s * NS_PER_S)
                origin_ns, wall_s, now_ns = origin_ns + slip_ns, wall_s - ahead_s, now_ns + slip_ns
                if -ahead_s > _STALL_S:
                    path = CommandPath(np.array([now_ns]), goal[commanded][None])

    def _apply(self, body: BodyConfig, sim: ArmSim) -> None:
        sim.apply_body(body)
        self.get_logger().info(f"body changed from {self._body.name!r} to {body.name!r}")
        self._body = body
        self._body_name.publish(String(data=body.name))
        self._post(lambda: None)  # whoever waits for it looks again

    def _judge(self, sim: ArmSim, seed: int) -> None:
        """Once per control step: how far it is to the target, and whether it is time for another one."""
        task, settings, distance = self._task, self._settings, sim.distance()
        self._distance.publish(Float64(data=distance))
        task.steps_near = task.steps_near + 1 if distance < settings["reach_distance"] else 0
        reached = task.steps_near >= settings["reach_steps"]
        elapsed_s = sim.time - task.begun_s
        over = reached or elapsed_s >= settings["episode_seconds"]
        if over:
            task.attempted, task.reached = task.attempted + 1, task.reached + reached
            self._target_reached.publish(Bool(data=reached))
            what = "reached" if reached else "did not reach"
            self.get_logger().info(
                f"{what} the {sim.target} in {elapsed_s:.1f} s ({task.reached} of {task.attempted} targets reached)"
            )
        if over or self._reset_target:
            self._reset_target = False
            task.next(sim.time)
            rng, before = np.random.default_rng([seed, task.number]), sim.target
            while sim.target == before:  # so that the prompt changes with the objects' places
                sim.reset_targets(rng)
            self._prompt.publish(String(data=sim.prompt))

    def _start(self, command: ReceivedCommand, path: CommandPath, now_ns: int) -> CommandPath:
        try:
            path = command.path(path.at(now_ns), now_ns)
        except InputError as error:
            self._refuse(str(error))
            return path
        self._followed.publish(command.said)
        return path

    def _image_message(self, camera: Camera, rgb: np.ndarray, stamp_ns: int) -> Image | CompressedImage:
        stamp, frame_id = to_stamp(stamp_ns), f"{camera.name}_optical_frame"
        if camera.encoding == "raw":
            return image_message(rgb, stamp, frame_id)
        quality = [cv2.IMWRITE_JPEG_QUALITY, self._settings["jpeg_quality"]]
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)
        message = CompressedImage(format="jpeg", data=fill("B", jpeg))
        message.header.stamp, message.header.frame_id = stamp, frame_id
        return message

    # --- diagnostics ---

    def statuses(self) -> Iterable[Status]:
        cameras, joints = self._settings["camera_rate"], self._settings["joint_state_rate"]
        values = {
            "camera rate [Hz]": self._camera_rate.hz,
            "joint state rate [Hz]": self._joint_rate.hz,
            "fell behind real time": self._slips,
            "commands": self._commands,
            "commands refused": self._refused,
            "targets reached": self._task.reached,
            "targets attempted": self._task.attempted,
            "body": self._body.name,
        }
        level, message = OK, "running in real time"
        if self._joint_rate.count == 0:
            level, message = WARN, "starting"
        elif self._camera_rate.hz < 0.8 * cameras or self._joint_rate.hz < 0.8 * joints:
            level = WARN
            message = (
                f"slower than real time: found cameras at {self._camera_rate.hz:.1f} Hz, joint states at "
                f"{self._joint_rate.hz:.1f} Hz; expected {cameras:g} and {joints:g}"
            )
        if self._problem:
            level, message = ERROR, self._problem
        yield Status("simulation", level, message, values)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the node; ends the process."""
    run(RobotSimNode, args)


if __name__ == "__main__":
    main()
