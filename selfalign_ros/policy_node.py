"""The policy node: camera images and joint states in, limited commands out.

Every control step it asks one question, "may the robot move now?", and answers it with the action that is
in force by its time stamp, or by holding and saying why. Inference runs in the worker while the current
chunk is executed. The E-Token changes only between two inferences, because both are jobs of that one
worker.

``~/calibrate`` puts a short motion of all joints in place of the policy's chunks, until it is over or
``~/end_calibration`` ends it; it takes the same way to the robot.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from selfalign.msg import ActionChunk as ActionChunkMsg
from selfalign.srv import Step
from selfalign_core.chunking import DelayEstimate, Handover, choose_method
from selfalign_core.commands import CommandLimiter, CommandPath, plan_path, step_in_force
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.frozen import FreezeLimits
from selfalign_core.robot.frames import Selection
from selfalign_core.types import ActionChunk, EToken, Observation
from selfalign_ros import qos
from selfalign_ros.calibration import Calibration
from selfalign_ros.conversions import (
    NS_PER_S,
    chunk_message,
    fill,
    hold_message,
    joint_state_message,
    to_ns,
    trajectory_message,
)
from selfalign_ros.diagnostics import ERROR, OK, WARN, Complaint, Latency, Rate, Status
from selfalign_ros.inputs import SensorInputs, decoded
from selfalign_ros.kept import StopLatch
from selfalign_ros.managed_node import ManagedNode
from selfalign_ros.node import run
from selfalign_ros.resources import STATE_FOLDER, checkpoint_folder
from selfalign_ros.token_in_use import TOPIC as TOKEN_TOPIC
from selfalign_ros.token_in_use import TokenInUse
from selfalign_ros.worker import Outcome

if TYPE_CHECKING:
    from selfalign_core.policy import Policy

_INACTIVE = "inactive"
_FIRST_CHUNK = "waiting for the first chunk"
_STANDSTILL_S = 1.0
"""Without a control step for so long of steady time, ROS time stands still."""


@dataclass(frozen=True)
class Inference:
    """One chunk and what it took."""

    chunk: ActionChunk
    age_s: float
    duration_s: float


class PolicyNode(ManagedNode):
    """See the module."""

    def __init__(self, cli_args: list[str] | None = None) -> None:
        super().__init__("policy", cli_args)
        contract = self.contract
        self._limiter = CommandLimiter.from_contract(contract)
        self._policy: Policy | None = None  # used in the worker only
        self._prompt: str = self.parameters["prompt"]

        self._token = TokenInUse(self, lambda: self._policy)

        self._chunk: ActionChunk | None = None
        self._delay = DelayEstimate()
        self._rtc_max_delay: int | None = None  # the checkpoint's, known when it is loaded
        self._handover_method = "none"
        self._path: CommandPath | None = None  # what a trajectory controller is following
        self._commanded: np.ndarray | None = None  # what a forward controller was told last
        self._commanded_ns = 0
        self._inferring = False
        self._due_ns: int | None = None
        self._hold_reason = _INACTIVE
        # Whatever becomes of the tokens, a stop is kept.
        self._stop = StopLatch(self.kept_path(".stopped", STATE_FOLDER))
        self._last_now_ns: int | None = None
        self._last_control_s: float | None = None  # steady time
        self._bans = 0

        self._calibration: Calibration | None = None
        self._calibrations, self._last_calibration = 0, ""

        self._late_chunks = self._holds = 0
        self._last_hold = ""
        self._chunk_rate, self._command_rate = Rate(), Rate()
        self._inference_latency, self._observation_age = Latency("inference duration"), Latency("observation age")
        self._last_inference: Inference | None = None
        self._complaint = Complaint(self.get_logger())
        self._failure = Complaint(self.get_logger(), is_error=True, grace_s=0.0)

        if not self.lockstep:
            # There in every state: a stop can be asked for at any time.
            self.create_service(Trigger, "~/stop", self._on_stop)
            self.create_service(Trigger, "~/clear_stop", self._on_clear_stop)
            self.create_service(SetBool, "~/enable", self._on_enable)

    # --- life ---

    async def configure(self) -> None:
        checkpoint = checkpoint_folder(self.parameters["checkpoint"])
        parameters, prompt = dict(self.parameters.values), self._prompt
        token = await self.call_worker(lambda: self._load(checkpoint, parameters, prompt))
        self.parameters_changed({"chunk_handover"})
        self.open_topics()
        if token is not None:
            self._token.announce(token, self.get_clock().now().to_msg())

    def open_topics(self) -> None:
        """Listen and offer what a configured node does."""
        contract = self.contract
        sensor = qos.LOCKSTEP if self.lockstep else qos.SENSOR
        latched = qos.LOCKSTEP_LATCHED if self.lockstep else qos.LATCHED
        self.inputs = SensorInputs(self, contract, sensor, self.arrived, self._freeze_limits)
        self._token.open()
        self.create_subscription(String, "prompt", self._on_prompt, **qos.overridable(latched))
        self.counts_inputs(*(stream.topic for stream in self.inputs.streams), TOKEN_TOPIC, "prompt")
        self._chunk_publisher = self.create_publisher(ActionChunkMsg, "action_chunk", **qos.overridable(qos.EVENTS))
        if not self.lockstep:
            self._executed_publisher = self.create_publisher(
                JointState, "executed_action", **qos.overridable(qos.EVENTS)
            )
            trajectory = contract.action.interface == "joint_trajectory"
            message_type = JointTrajectory if trajectory else Float64MultiArray
            self._command_publisher = self.create_publisher(
                message_type, contract.action.topic, **qos.overridable(qos.COMMAND)
            )
            self.create_service(Trigger, "~/calibrate", self._on_calibrate)
            self.create_service(Trigger, "~/end_calibration", self._on_end_calibration)

    def _freeze_limits(self) -> FreezeLimits:
        return FreezeLimits(self.parameters["frozen_camera_after"], self.parameters["frozen_camera_motion"])

    def activate(self) -> None:
        self._hold_reason = _FIRST_CHUNK
        self._last_now_ns = self._due_ns = None
        if not self.lockstep:
            self._last_control_s = time.monotonic()
            self.create_timer(1.0 / self.contract.rate_hz, self._control)

    def deactivate(self) -> None:
        self._last_control_s = None
        if not self.lockstep:
            self._ban_motion(_INACTIVE)

    def is_idle(self) -> bool:
        return not self._inferring

    def cleanup(self) -> None:
        self._policy = self._rtc_max_delay = None
        self._token.forget()

    def check_parameters(self, values: dict[str, Any]) -> str | None:
        if self._rtc_max_delay is not None:
            try:
                choose_method(values["chunk_handover"], self._rtc_max_delay)
            except ConfigError as error:
                return str(error)
        return None

    def parameters_changed(self, names: set[str]) -> None:
        if "prompt" in names:
            self._prompt = self.parameters["prompt"]
        if "enable" in names and self.is_active and not self.lockstep and (reason := self._forbidden()):
            self._ban_motion(reason)
        if self._rtc_max_delay is not None:
            self._handover_method = choose_method(self.parameters["chunk_handover"], self._rtc_max_delay)

    def _load(self, checkpoint: str, parameters: dict[str, Any], prompt: str) -> EToken | None:
        self.say_progress(f"loading the model {checkpoint or 'tiny'}")
        from selfalign_core.torch_state import use_stream, use_threads

        use_threads(parameters["torch_threads"])
        use_stream(parameters["device"], urgent=True)
        import selfalign_core.alignment.calibration  # noqa: F401 - here, because later it would delay a control step
        from selfalign_core.policy import Policy

        started = time.perf_counter()
        device, precision = parameters["device"], parameters["precision"]
        policy = Policy.load(checkpoint, contract=self.contract, device=device, precision=precision)
        policy.fast = parameters["fast"]
        method = choose_method(parameters["chunk_handover"], policy.config.rtc_max_delay)
        # The first inference pays for lazy initialisation; the robot shall not wait for it.
        self.say_progress(f"warming up ({time.perf_counter() - started:.1f} s so far)")
        height, width = policy.image_size
        blank = {name: np.zeros((height, width, 3), np.uint8) for name in self.contract.camera_names}
        home = self.contract.home.astype(np.float32)
        for handover in (None, *Handover.rehearsal(method, home, policy.horizon, policy.config.rtc_max_delay)):
            policy.infer(Observation(blank, home, prompt, 0), handover=handover)
        self._token.restore(policy, parameters["guard_max_norm"])
        self._policy, self._rtc_max_delay = policy, policy.config.rtc_max_delay
        kind = "" if policy.trained else " (untrained: random weights)"
        self.get_logger().info(f"model {policy.digest[:12]}{kind} ready in {time.perf_counter() - started:.1f} s")
        return policy.e_token

    def _on_prompt(self, message: String) -> None:
        self._prompt = message.data
        self.arrived("prompt")

    # --- inference ---

    def _plan_handover(self, stamp_ns: int) -> Handover | None:
        """How the chunk for an observation of ``stamp_ns`` is to continue the one that is executed."""
        return Handover.plan(
            self._handover_method,
            self._chunk,
            stamp_ns=stamp_ns,
            dt_ns=self.contract.dt_ns,
            delay=self._delay.steps(self.contract.dt_ns),
            rtc_max_delay=self._rtc_max_delay or 0,
        )

    def _infer(self, selection: Selection, prompt: str, seed: int, now_ns: int, handover: Handover | None) -> Inference:
        started = time.perf_counter()
        assert self._policy is not None
        observation = Observation(
            images=decoded(selection, self.contract, self._policy.image_size),
            state=selection.state.astype(np.float32),
            prompt=prompt,
            stamp_ns=selection.stamp_ns,
        )
        chunk = self._policy.infer(observation, seed=seed, handover=handover)
        if not np.isfinite(chunk.actions).all():
            raise InputError("model output: found actions that are not finite; expected finite positions")
        age_s = (now_ns - selection.stamp_ns) / NS_PER_S
        return Inference(chunk, age_s, time.perf_counter() - started)

    def _start_inference(self, selection: Selection, now_ns: int) -> None:
        prompt, seed = self._prompt, self.parameters["seed"]
        self._inferring = True
        self._due_ns = now_ns + self._replan_ns()
        bans, handover = self._bans, self._plan_handover(selection.stamp_ns)
        self.worker.submit(
            lambda: self._infer(selection, prompt, seed, now_ns, handover),
            lambda outcome: self._on_inference(outcome, bans),
        )

    def _on_inference(self, outcome: Outcome[Inference], bans: int) -> None:
        """``bans``: how often motion had been banned when this inference started."""
        self._inferring = False
        self._look_at_the_clock(self.now_ns())
        if bans != self._bans:
            return  # it continues what was ended since, from what was seen before that
        if self._calibration is not None:
            return  # it began meanwhile; there will be a newer chunk when it is over
        if outcome.error is not None:
            if not isinstance(outcome.error, InputError):
                text = "".join(traceback.format_exception(outcome.error))
                self._failure.say(f"inference failed:\n{text}")
            self._hold(f"inference failed: {outcome.error}")
            return
        inference = outcome.result()
        now_ns = self.now_ns()
        if reason := self._why_not(now_ns):
            self._hold(reason)
        elif self._adopt(inference.chunk, now_ns):
            self._delay.add(now_ns - inference.chunk.stamp_ns)
        else:
            self._late_chunks += 1
            self._hold(
                f"late chunk: found its {len(inference.chunk.actions)} actions past when it was ready, "
                f"{(now_ns - inference.chunk.stamp_ns) / NS_PER_S:.3f} s after its observation"
            )
        self._publish_chunk(inference)  # the robot comes first

    def _publish_chunk(self, inference: Inference) -> None:
        self._last_inference = inference
        self._inference_latency.add(inference.duration_s)
        self._observation_age.add(inference.age_s)
        self._chunk_rate.tick()
        message = chunk_message(
            inference.chunk,
            self.contract.joint_names,
            duration_s=inference.duration_s,
            age_s=inference.age_s,
        )
        self._chunk_publisher.publish(message)

    def _replan_ns(self) -> int:
        return (self.parameters["replan_steps"] or self.contract.replan_steps) * self.contract.dt_ns

    # --- control ---

    def _control(self) -> None:
        """One control step."""
        now_ns = self.now_ns()
        self._last_control_s = time.monotonic()
        self._look_at_the_clock(now_ns)
        self.diagnostics.state(self._hold_reason)
        selection, reason = self._observe(now_ns)
        if selection is None:
            self._ban_motion(reason)
            return
        if self._calibration is not None:
            self._calibrate(self._calibration, now_ns)
        elif not self._inferring and (self._chunk is None or self._due_ns is None or now_ns >= self._due_ns):
            self._start_inference(selection, now_ns)
        if self._chunk is None:
            if not self._hold_reason:
                self._hold(_FIRST_CHUNK)
            return
        self._execute(self._chunk, now_ns)

    def _observe(self, now_ns: int) -> tuple[Selection | None, str]:
        """What is to be acted on now; None, and why the robot may not move, if it may not."""
        reason = (self._forbidden() or self._token.refusal) if self.is_active else _INACTIVE
        if reason:
            return None, reason
        try:
            return self.inputs.select(now_ns), ""
        except InputError as error:
            return None, str(error)

    def _why_not(self, now_ns: int) -> str:
        """Why the robot may not move; "" if it may."""
        return self._observe(now_ns)[1]

    def _forbidden(self) -> str:
        """A person's word against motion; "" if there is none."""
        if self._stop.reason:
            return self._stop.reason
        return "" if self.parameters["enable"] else "disabled: the parameter enable is false"

    def _adopt(self, chunk: ActionChunk, now_ns: int) -> bool:
        """Make ``chunk`` the one that is executed. False if all of it is past."""
        reference = self._reference(now_ns)
        path = plan_path(
            chunk.actions,
            stamp_ns=chunk.stamp_ns,
            dt_ns=self.contract.dt_ns,
            now_ns=now_ns,
            reference=reference,
            limiter=self._limiter,
        )
        if path is None:
            return False
        self._chunk, self._hold_reason = chunk, ""
        if self.contract.action.interface == "joint_trajectory":
            self._path = path
            self._command_publisher.publish(trajectory_message(self.contract.joint_names, path, chunk.stamp_ns))
        self._complaint.say("")
        self._failure.say("")
        return True

    def _reference(self, now_ns: int) -> np.ndarray:
        """Where the robot has been told to be now; where it is, if it has not been told since it last held."""
        if self._path is not None:
            return self._path.at(now_ns)
        if self._commanded is not None:
            return self._commanded
        return self.inputs.newest_positions()

    def _execute(self, chunk: ActionChunk, now_ns: int) -> None:
        step = step_in_force(
            stamp_ns=chunk.stamp_ns,
            dt_ns=self.contract.dt_ns,
            horizon=len(chunk.actions),
            now_ns=max(now_ns, chunk.stamp_ns),  # a camera's clock may be a little ahead, see SensorInputs.select
        )
        if step is None:
            self._hold("late chunk: found the end of its horizon before the next chunk was ready")
            self._late_chunks += 1
            return
        if self._path is not None:
            command = self._path.at(now_ns)
        else:
            # Two control steps can come closer together than dt after a delay; the speed limit holds all the same.
            elapsed_ns = now_ns - self._commanded_ns if self._commanded is not None else self.contract.dt_ns
            duration_s = min(elapsed_ns, self.contract.dt_ns) / NS_PER_S
            command = self._limiter.limit(chunk.actions[step], self._reference(now_ns), duration_s)
            self._commanded, self._commanded_ns = command, now_ns
            self._command_publisher.publish(Float64MultiArray(data=fill("d", command)))
        self._command_rate.tick()
        self._executed_publisher.publish(joint_state_message(self.contract.joint_names, command, now_ns))

    def _hold(self, reason: str) -> None:
        """Stop where the robot has been told to be. A robot that has not been told anything is told
        nothing.
        """
        if self._calibration is not None:
            self._end_calibration(f"cancelled: {reason}")
        if self._path is not None:
            # Time may have jumped back since the last look: the robot did not.
            here = self._path.at(max(self.now_ns(), self._last_now_ns or 0))
            self._command_publisher.publish(hold_message(self.contract.joint_names, here, self.contract.dt_ns))
        if self._chunk is not None:
            self._holds, self._last_hold = self._holds + 1, reason
        self._path = self._chunk = self._commanded = None
        self._hold_reason = reason
        self._complaint.say("" if reason in (_INACTIVE, _FIRST_CHUNK) else f"holding: {reason}")

    def _ban_motion(self, reason: str) -> None:
        """Hold, and have no inference that is under way end it."""
        self._bans += 1
        self._hold(reason)

    # --- a person's word ---

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        (result,) = self.set_parameters([Parameter("enable", value=request.data)])
        response.success, response.message = result.successful, result.reason
        if result.successful:
            reason = self._why_not(self.now_ns())
            response.message = f"holding: {reason}" if reason else "moving"
        return response

    def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            self._stop.set()
            response.success, response.message = True, "holding until ~/clear_stop is called"
        except OSError as error:
            response.message = f"holding, but not after a restart: {error}"
        if self.is_active:
            self._ban_motion(self._stop.reason)
        self.get_logger().warning(self._stop.reason)
        return response

    def _on_clear_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            self._stop.clear()
        except OSError as error:
            response.message = f"still stopped: {error}"
            return response
        self._token.forgive()
        response.success, response.message = True, self._why_not(self.now_ns()) or "moving"
        self.get_logger().warning(f"stop cleared: {response.message}")
        return response

    # --- calibration ---

    def _on_calibrate(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        now_ns = self.now_ns()
        self._look_at_the_clock(now_ns)
        if self._calibration is not None:
            response.message = "refused: a calibration motion is running"
        elif reason := self._why_not(now_ns):
            response.message = f"refused: {reason}"
        else:
            self._begin_calibration(now_ns, response)
        return response

    def _begin_calibration(self, now_ns: int, response: Trigger.Response) -> None:
        try:
            calibration = Calibration.plan(
                self.contract,
                self._reference(now_ns),
                now_ns,
                around=self.parameters["calibrate_around"],
                duration_s=self.parameters["calibrate_duration"],
                amplitude=self.parameters["calibrate_amplitude"],
                seed=self.parameters["seed"] + self._calibrations,
            )
        except InputError as error:
            response.message = f"refused: {error}"
            return
        self._calibration, self._due_ns = calibration, now_ns
        self._calibrations += 1
        response.success, response.message = True, f"moving for {calibration.duration_s:g} s"
        self.get_logger().info(f"calibration motion: {response.message}")

    def _on_end_calibration(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """The policy has the robot again; the piece that is under way goes on until its first chunk is there. A motion
        that is still on its way home gets there first.
        """
        if self._calibration is None:
            response.message = "refused: no calibration motion is running"
            return response
        now_ns = self.now_ns()
        rest = self._calibration.shortened(now_ns)
        if rest is None:
            self._end_calibration("ended by ~/end_calibration")
        else:
            self._calibration, self._due_ns = rest, now_ns
        response.success = True
        response.message = "the policy has the robot again" if rest is None else "the policy has the robot from home on"
        return response

    def _calibrate(self, calibration: Calibration, now_ns: int) -> None:
        """Follow the next piece of the motion if it is due; hand back to the policy if there is none."""
        if self._due_ns is not None and now_ns < self._due_ns:
            return
        piece = calibration.piece(now_ns)
        if piece is not None and self._adopt(piece, now_ns):
            self._due_ns = min(now_ns + self.contract.replan_steps * self.contract.dt_ns, calibration.end_ns)
        else:
            self._end_calibration("completed")
            self._chunk = None

    def _end_calibration(self, outcome: str) -> None:
        self._calibration = self._due_ns = None
        self._last_calibration = outcome
        self.get_logger().info(f"calibration motion {outcome}")

    # --- time ---

    def _look_at_the_clock(self, now_ns: int) -> None:
        """Start afresh if time has jumped back since the last look."""
        if self._last_now_ns is not None and now_ns < self._last_now_ns:
            self._ban_motion("time jumped back")
            self.inputs.clear()
            self._due_ns = None
        self._last_now_ns = now_ns

    # --- lock-step ---

    async def step(self, request: Step.Request) -> bool:
        now_ns = to_ns(request.stamp)
        wanted = int(request.e_token_version)
        await self.until(lambda: self._token.version >= wanted or self._token.refused_version >= wanted > 0)
        if self._token.version < wanted:
            raise InputError(self._token.refusal)
        if self._due_ns is not None and now_ns < self._due_ns:
            return False
        if reason := self.inputs.fault(now_ns):
            self._hold_reason, self._chunk = reason, None
            return False
        self._hold_reason = ""
        selection = self.inputs.select(now_ns)
        prompt, seed = self._prompt, self.parameters["seed"]
        self._delay.add(now_ns - selection.stamp_ns)  # computing takes no time in lock-step
        handover = self._plan_handover(selection.stamp_ns)
        inference = await self.call_worker(lambda: self._infer(selection, prompt, seed, now_ns, handover))
        self._chunk = inference.chunk
        self._due_ns = now_ns + self._replan_ns()
        self._publish_chunk(inference)
        return True

    # --- diagnostics ---

    def statuses(self) -> Iterable[Status]:
        now_ns = self.now_ns()
        yield self.inputs.status(now_ns)
        level = OK
        if self._hold_reason:
            level = WARN if self._hold_reason in (_INACTIVE, _FIRST_CHUNK) else ERROR
            level = WARN if not self.parameters["enable"] or self._stop.reason else level
        values: dict[str, object] = {
            "chunks": self._chunk_rate.count,
            "chunk rate [Hz]": self._chunk_rate.hz,
            "commands": self._command_rate.count,
            "command rate [Hz]": self._command_rate.hz,
            "hand-over": self._handover_method,
            "delay [steps]": self._delay.steps(self.contract.dt_ns),
            "late chunks": self._late_chunks,
            "holds": self._holds,
            "last hold": self._last_hold,
            "prompt": self._prompt,
            "last calibration": self._last_calibration,
        }
        if self._last_inference is not None:
            values["inference duration [s]"] = self._last_inference.duration_s
            values["observation age [s]"] = self._last_inference.age_s
        values |= self._inference_latency.values() | self._observation_age.values()
        text = "moving" if self._calibration is None else "calibrating"
        if self._hold_reason:
            text = f"holding: {self._hold_reason}"
        if self._last_control_s is not None and (idle_s := time.monotonic() - self._last_control_s) > _STANDSTILL_S:
            level = ERROR
            text = f"found no control step for {idle_s:.0f} s; expected ROS time to go on (of /clock, if simulated)"
        yield Status("chunks", level, text, values)
        yield self._token.status()


def main(args: list[str] | None = None) -> NoReturn:
    """Run the node; ends the process."""
    run(PolicyNode, args)


if __name__ == "__main__":
    main()
