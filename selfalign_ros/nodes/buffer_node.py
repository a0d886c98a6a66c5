"""The buffer node: keeps the robot's recent transitions and hands out batches of them.

It stores one frame per control step (images already at the model's size, so that no one resizes them again)
and every executed action, and answers ``buffer/sample_transitions``. The buffer is owned by the worker;
callbacks only queue what arrived.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
from sensor_msgs.msg import JointState

from selfalign.srv import SampleTransitions, Step
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.policy.source import image_size_of, transition_horizon_of
from selfalign_core.robot.buffer import TransitionBuffer
from selfalign_core.robot.frames import Order, Selection, order_of
from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import fill_transitions, positions_in_order, to_ns
from selfalign_ros.life.diagnostics import OK, WARN, Complaint, Latency, Rate, Status
from selfalign_ros.life.managed_node import ManagedNode
from selfalign_ros.life.node import run
from selfalign_ros.life.resources import checkpoint_folder
from selfalign_ros.life.worker import Outcome
from selfalign_ros.nodes.inputs import SensorInputs, decoded, unknown_topics


class BufferNode(ManagedNode):
    """See the module."""

    def __init__(self, cli_args: list[str] | None = None) -> None:
        super().__init__("buffer", cli_args)
        if problem := unknown_topics(self.parameters["allow_several_publishers"], self.contract):
            raise ConfigError(f"parameter {problem}")
        self._buffer: TransitionBuffer | None = None  # used in the worker only
        self._image_size = (0, 0)
        self._last_now_ns: int | None = None
        self._last_stamp_ns: int | None = None
        self._contents: dict[str, object] = {}
        self._problem = ""
        self._frame_rate, self._action_rate = Rate(), Rate()
        self._served = self._refused = 0
        self._answer_latency = Latency("answer")
        self._complaint = Complaint(self.get_logger())

    # --- life ---

    async def configure(self) -> None:
        contract = self.contract
        checkpoint = checkpoint_folder(self.parameters["checkpoint"])
        self._image_size = image_size_of(checkpoint)
        self._buffer = TransitionBuffer(
            cameras=contract.camera_names,
            image_size=self._image_size,
            state_dim=len(contract.joints),
            action_dim=len(contract.joints),
            horizon=transition_horizon_of(checkpoint),
            dt_ns=contract.dt_ns,
            capacity=self.parameters["capacity"],
        )
        self.inputs = SensorInputs(
            self,
            contract,
            qos.LOCKSTEP if self.lockstep else qos.SENSOR,
            self.arrived,
            sole=None if self.lockstep else {"executed_action": JointState},
            allowed=lambda: self.parameters["allow_several_publishers"],
        )
        executed_qos = qos.LOCKSTEP if self.lockstep else qos.EVENTS
        self.create_subscription(
            JointState, "executed_action", self._on_executed_action, **qos.overridable(executed_qos)
        )
        self.counts_inputs(*(stream.topic for stream in self.inputs.streams), "executed_action")
        self.create_service(SampleTransitions, "buffer/sample_transitions", self._on_sample)

    def activate(self) -> None:
        if not self.lockstep:
            self.create_timer(1.0 / self.contract.rate_hz, lambda: self._ingest(self.now_ns()))

    def cleanup(self) -> None:
        self._buffer, self._last_now_ns, self._last_stamp_ns, self._contents = None, None, None, {}

    @property
    def _stored(self) -> TransitionBuffer:
        """The buffer, from ``configure`` to ``cleanup``."""
        assert self._buffer is not None
        return self._buffer

    def check_parameters(self, values: dict[str, Any]) -> str | None:
        return unknown_topics(values["allow_several_publishers"], self.contract)

    # --- what goes in ---

    def _on_executed_action(self, message: JointState) -> None:
        def add() -> None:
            action = positions_in_order(message, self.contract.joint_names, "executed_action")
            self._stored.add_action(to_ns(message.header.stamp), action.astype(np.float32))

        self._action_rate.tick()
        if not self.inputs.rivalry:  # else nobody can tell which of them the robot executed
            self.worker.submit(add, self._on_added)
        self.arrived("executed_action")

    def _ingest(self, now_ns: int) -> None:
        """Store the newest frame, if it is newer than the last and the inputs are sound."""
        self._look_at_the_clock(now_ns)
        try:
            selection = self.inputs.select(now_ns)
        except InputError as error:
            self._problem = str(error)
            self._complaint.say(f"storing nothing: {error}")
            return
        self._problem = ""
        self._complaint.say("")
        order = order_of(selection.stamp_ns, self._last_stamp_ns, self.contract.dt_ns)
        if order is Order.RESTARTED:
            # Time jumped back (a bag was restarted, a simulation reset): old and new frames do not belong
            # together.
            self.get_logger().warning("time jumped back: forgetting all transitions")
            self.worker.submit(self._stored.clear, self._on_added)
        elif order is not Order.NEWER:
            return
        self._last_stamp_ns = selection.stamp_ns
        self.worker.submit(lambda: self._add_frame(selection), self._on_added)

    def _look_at_the_clock(self, now_ns: int) -> None:
        """What was received before time jumped back says nothing of what the robot sees now."""
        if self._last_now_ns is not None and now_ns < self._last_now_ns:
            self.inputs.clear()
        self._last_now_ns = now_ns

    def _add_frame(self, selection: Selection) -> None:
        images = decoded(selection, self.contract, self._image_size)
        self._stored.add_frame(selection.stamp_ns, images, selection.state.astype(np.float32))
        self._frame_rate.tick()

    def _on_added(self, outcome: Outcome[None]) -> None:
        if isinstance(outcome.error, InputError):
            self._problem = str(outcome.error)
            self._complaint.say(f"not stored: {outcome.error}")
        else:
            outcome.result()

    # --- what comes out ---

    async def _on_sample(
        self, request: SampleTransitions.Request, response: SampleTransitions.Response
    ) -> SampleTransitions.Response:
        def newest() -> None:
            if request.stride < 1:
                raise InputError(f"stride: found {request.stride}; expected at least 1")
            batch = self._stored.newest(request.count, since_ns=request.since_ns, stride=request.stride)
            response.found = len(batch)
            if len(batch) and len(batch) >= request.least and int(batch.frame_stamps[-1]) > request.newer_than_ns:
                fill_transitions(response, batch)

        begun = time.monotonic()
        try:
            await self.call_worker(newest)
            self._answer_latency.add(time.monotonic() - begun)
            response.success = True
            self._served += bool(response.cameras)
        except InputError as error:
            response.message = str(error)
            self._refused += 1
        return response

    async def step(self, request: Step.Request) -> bool:
        self._ingest(to_ns(request.stamp))
        await self.call_worker(lambda: None)  # jobs run in order: when this one has run, the frame is stored
        return False

    # --- diagnostics ---

    def statuses(self) -> Iterable[Status]:
        yield self.inputs.status(self.now_ns())
        self.worker.submit(self._count, self._on_counted)
        values = {
            **self._contents,
            "frame rate [Hz]": self._frame_rate.hz,
            "executed action rate [Hz]": self._action_rate.hz,
            "batches sent": self._served,
            "requests refused": self._refused,
            **self._answer_latency.values(),
        }
        filled = self._contents.get("transitions", 0)
        message = self._problem or f"{filled} transitions"
        yield Status("transitions", WARN if self._problem else OK, message, values)

    def _count(self) -> dict[str, object]:
        counters = {f"{name} (count)": count for name, count in self._stored.counters.items()}
        contents = {
            "frames": self._stored.num_frames,
            "transitions": self._stored.num_transitions,
            "size [MB]": self._stored.nbytes / 1e6,
        }
        return {**contents, **counters}

    def _on_counted(self, outcome: Outcome[dict[str, object]]) -> None:
        self._contents = outcome.result()


def main(args: list[str] | None = None) -> NoReturn:
    """Run the node; ends the process."""
    run(BufferNode, args)


if __name__ == "__main__":
    main()
