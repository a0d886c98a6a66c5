"""The policy node: camera images and joint states in, limited commands out.

It hands what it sees, what the model answers and what a person says to :class:`selfalign_core.robot.motion.Motion`, and
does what that says. Inference runs in the worker while the current chunk is executed. The E-Token changes only between
two inferences, because both are jobs of that one worker.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from selfalign.msg import ActionChunk as ActionChunkMsg
from selfalign.srv import Step
from selfalign_core.errors import ConfigError, InputError, SelfAlignError
from selfalign_core.robot.chunking import choose_method
from selfalign_core.robot.clocks import Now
from selfalign_core.robot.frames import Selection
from selfalign_core.robot.frozen import FreezeLimits
from selfalign_core.robot.motion import (
    FIRST_CHUNK,
    INACTIVE,
    LEASH,
    Answer,
    Event,
    Look,
    Motion,
    Order,
    Seen,
    Settings,
    Ticket,
    Word,
)
from selfalign_core.robot.types import EToken
from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import chunk_message, command_message, joint_state_message, to_ns
from selfalign_ros.life.diagnostics import ERROR, OK, WARN, Complaint, Rate, Status
from selfalign_ros.life.node import run
from selfalign_ros.life.resources import checkpoint_folder
from selfalign_ros.life.worker import Outcome
from selfalign_ros.nodes.inference import Figures, Inference, infer, load_policy
from selfalign_ros.nodes.inputs import SensorInputs, unknown_topics
from selfalign_ros.nodes.persons_word import MovingNode, PersonsWord
from selfalign_ros.nodes.token_in_use import TOPIC as TOKEN_TOPIC
from selfalign_ros.nodes.token_in_use import TokenInUse

if TYPE_CHECKING:
    from selfalign_core.policy import Policy

_QUIET = (INACTIVE, FIRST_CHUNK)  # holds that are nobody's fault
_STANDSTILL_S = 1.0
"""Without a control step for so long of steady time, ROS time stands still."""


class PolicyNode(MovingNode):
    """See the module."""

    def __init__(self, cli_args: list[str] | None = None) -> None:
        super().__init__("policy", cli_args)
        self._policy: Policy | None = None  # used in the worker only, but for what never changes
        self._prompt: str = self.parameters["prompt"]
        self.token = TokenInUse(self, lambda: self._policy)
        self.motion = Motion(self.contract, commands=not self.lockstep)
        self._word = PersonsWord(self)
        self._last_control_s: float | None = None  # steady time

        self._command_rate, self._figures = Rate(), Figures()
        self._complaint = Complaint(self.get_logger())
        self._failure = Complaint(self.get_logger(), is_error=True, grace_s=0.0)

    # --- life ---

    async def configure(self) -> None:
        checkpoint = checkpoint_folder(self.parameters["checkpoint"])
        parameters, prompt = dict(self.parameters.values), self._prompt
        token = await self.call_worker(lambda: self._load(checkpoint, parameters, prompt))
        self._tell_settings()
        self.open_topics()
        if token is not None:
            self.token.announce(token, self.get_clock().now().to_msg())

    def _load(self, checkpoint: str, parameters: dict[str, Any], prompt: str) -> EToken | None:
        policy = load_policy(self, checkpoint, parameters, prompt)
        self.token.restore(policy, parameters["guard_max_norm"])
        self._policy = policy
        return policy.e_token

    def open_topics(self) -> None:
        """Listen and offer what a configured node does."""
        contract = self.contract
        sensor = qos.LOCKSTEP if self.lockstep else qos.SENSOR
        latched = qos.LOCKSTEP_LATCHED if self.lockstep else qos.LATCHED
        trajectory = contract.action.interface == "joint_trajectory"
        command_type = JointTrajectory if trajectory else Float64MultiArray
        self.inputs = SensorInputs(
            self,
            contract,
            sensor,
            self.arrived,
            self._freeze_limits,
            sole=None if self.lockstep else {contract.action.topic: command_type},
            allowed=lambda: self.parameters["allow_several_publishers"],
        )
        self.token.open()
        self._word.open()
        self.create_subscription(String, "prompt", self._on_prompt, **qos.overridable(latched))
        self.counts_inputs(*(stream.topic for stream in self.inputs.streams), TOKEN_TOPIC, "prompt")
        self._chunk_publisher = self.create_publisher(ActionChunkMsg, "action_chunk", **qos.overridable(qos.EVENTS))
        if not self.lockstep:
            self._executed_publisher = self.create_publisher(
                JointState, "executed_action", **qos.overridable(qos.EVENTS)
            )
            self._command_publisher = self.create_publisher(
                command_type, contract.action.topic, **qos.overridable(qos.COMMAND)
            )

    def _freeze_limits(self) -> FreezeLimits:
        return FreezeLimits(self.parameters["frozen_camera_after"], self.parameters["frozen_camera_motion"])

    def activate(self) -> None:
        self.on(Word(self._word.against))
        if not self.lockstep:
            self._last_control_s = time.monotonic()
            self.create_timer(1.0 / self.contract.rate_hz, self._control)

    def deactivate(self) -> None:
        self._last_control_s = None
        self.on(Word(INACTIVE))

    def is_idle(self) -> bool:
        return not self.motion.inferring

    def cleanup(self) -> None:
        self._policy = None
        self.token.forget()

    def check_parameters(self, values: dict[str, Any]) -> str | None:
        if problem := unknown_topics(values["allow_several_publishers"], self.contract):
            return problem
        if self._policy is not None:
            try:
                choose_method(values["chunk_handover"], self._policy.config.rtc_max_delay)
            except ConfigError as error:
                return str(error)
        return None

    def parameters_changed(self, names: set[str]) -> None:
        if "prompt" in names:
            self._prompt = self.parameters["prompt"]
        self._tell_settings()
        if "enable" in names:
            self._word.tell()

    def _tell_settings(self) -> None:
        if self._policy is None:
            return
        rtc_max_delay = self._policy.config.rtc_max_delay
        self.motion.settings = Settings(
            trained=self._policy.trained,
            handover=choose_method(self.parameters["chunk_handover"], rtc_max_delay),
            rtc_max_delay=rtc_max_delay,
            replan_steps=self.parameters["replan_steps"] or self.contract.replan_steps,
            simulated=self.get_parameter("use_sim_time").value,
        )

    def _on_prompt(self, message: String) -> None:
        self._prompt = message.data
        self.arrived("prompt")

    # --- motion ---

    def now(self) -> Now:
        """In lock-step time is the recording's, which never jumps between two steps."""
        ros_ns = self.now_ns()
        return Now(ros_ns, ros_ns if self.lockstep else time.monotonic_ns())

    def on(self, event: Event, now: Now | None = None) -> Order:
        now = now or self.now()
        order = self.motion.on(now, event)
        names = self.contract.joint_names
        if order.command is not None:
            self._command_publisher.publish(command_message(names, order.command))
        if order.executed is not None:
            self._command_rate.tick()
            self._executed_publisher.publish(joint_state_message(names, order.executed, now.ros_ns))
        if order.jumped:
            self.inputs.clear()
        if order.calibration:
            self.get_logger().info(f"calibration motion {order.calibration}")
        reason = self.motion.reason
        self._complaint.say("" if reason in _QUIET else f"holding: {reason}" if reason else "; ".join(self._faults()))
        self.diagnostics.state(reason)
        return order

    def _control(self) -> None:
        """One control step."""
        self._last_control_s = time.monotonic()
        now = self.now()
        selection, seen = self.see(now.ros_ns)
        ticket = self.on(Look(seen), now).inference
        if ticket is not None and selection is not None:
            self._start_inference(selection, now, ticket)

    def see(self, now_ns: int) -> tuple[Selection | None, Seen | str]:
        refusal = "" if self.lockstep else self.token.refusal  # a recorded token is refused by its step
        try:
            selection = self.inputs.select(now_ns)
        except InputError as error:
            return None, refusal or str(error)
        return selection, refusal or Seen(selection.stamp_ns, selection.state, self.inputs.poses)

    def _start_inference(self, selection: Selection, now: Now, ticket: Ticket) -> None:
        self.worker.submit(self._inference(selection, now, ticket), partial(self._on_inference, ticket))

    def _inference(self, selection: Selection, now: Now, ticket: Ticket) -> Callable[[], Inference]:
        """The job that makes a chunk of what was selected ``now``."""
        assert self._policy is not None
        return partial(
            infer,
            self._policy,
            self.contract,
            selection,
            now_ns=now.ros_ns,
            prompt=self._prompt,
            seed=self.parameters["seed"],
            handover=ticket.handover,
        )

    def _on_inference(self, ticket: Ticket, outcome: Outcome[Inference]) -> None:
        now = self.now()
        _, seen = self.see(now.ros_ns)
        if outcome.error is not None:
            order = self.on(Answer(ticket, f"inference failed: {outcome.error}", seen), now)
            if not order.dropped and not isinstance(outcome.error, InputError):
                text = "".join(traceback.format_exception(outcome.error))
                self._failure.say(f"inference failed:\n{text}")
            return
        inference = outcome.result()
        order = self.on(Answer(ticket, inference.chunk, seen), now)
        if not order.dropped:
            self._failure.say("")
            self._publish_chunk(inference)  # the robot comes first

    def _publish_chunk(self, inference: Inference) -> None:
        self._figures.add(inference)
        message = chunk_message(
            inference.chunk, self.contract.joint_names, duration_s=inference.duration_s, age_s=inference.age_s
        )
        self._chunk_publisher.publish(message)

    async def step(self, request: Step.Request) -> bool:
        now_ns = to_ns(request.stamp)
        wanted = int(request.e_token_version)
        await self.until(lambda: self.token.version >= wanted or self.token.refused_version >= wanted > 0)
        if self.token.version < wanted:
            raise InputError(self.token.refusal)
        if not self.motion.is_due(now_ns):
            return False
        now = Now(now_ns, now_ns)
        selection, seen = self.see(now_ns)
        if selection is not None:
            self.motion.delay.add(now_ns - selection.stamp_ns)  # computing takes no time in lock-step
        ticket = self.on(Look(seen), now).inference
        if selection is None or ticket is None:
            return False
        try:
            inference = await self.call_worker(self._inference(selection, now, ticket))
        except SelfAlignError as error:
            self.on(Answer(ticket, str(error), seen), now)
            raise
        self.on(Answer(ticket, inference.chunk, seen), now)
        self._publish_chunk(inference)
        return True

    # --- diagnostics ---

    def statuses(self) -> Iterable[Status]:
        yield self.inputs.status(self.now_ns())
        motion, (level, text) = self.motion, self._state()
        values = self._figures.values() | {
            "commands": self._command_rate.count,
            "command rate [Hz]": self._command_rate.hz,
            "hand-over": motion.settings.handover,
            "delay [steps]": motion.delay.steps(self.contract.dt_ns),
            "late chunks": motion.tally.late_chunks,
            "holds": motion.tally.holds,
            "last hold": motion.tally.last_hold,
            "prompt": self._prompt,
            "last calibration": motion.tally.last_calibration,
        }
        yield Status("chunks", level, text, values)
        yield self.token.status()

    def _state(self) -> tuple[bytes, str]:
        if self._last_control_s is not None and (idle_s := time.monotonic() - self._last_control_s) > _STANDSTILL_S:
            found = f"found no control step for {idle_s:.0f} s"
            return ERROR, f"{found}; expected ROS time to go on (of /clock, if simulated)"
        if reason := self.motion.reason:
            return WARN if reason in _QUIET or self._word.against else ERROR, f"holding: {reason}"
        text = "moving" if self.motion.calibration is None else "calibrating"
        faults = self._faults()
        if not self.motion.settings.trained:
            faults.insert(0, f"within {LEASH:g} rad or m of where it started: the model is untrained")
        return (WARN, f"{text}, but {'; '.join(faults)}") if faults else (OK, text)

    def _faults(self) -> list[str]:
        """What is wrong although the robot may move."""
        faults = [self.motion.not_following] if self.motion.not_following else []
        if not self.lockstep and not self._command_publisher.get_subscription_count():
            topic = self._command_publisher.topic_name
            faults.append(f"{topic}: found no subscriber; expected the robot's controller")
        return faults


def main(args: list[str] | None = None) -> NoReturn:
    """Run the node; ends the process."""
    run(PolicyNode, args)


if __name__ == "__main__":
    main()
