"""What the nodes have in common: start, parameters, contract, worker, lock-step, diagnostics, clean stop.

A node's life: the constructor declares and checks (it raises ``ConfigError`` on anything a restart would
not cure),
``start`` begins the work, ``stop`` ends it and leaves the robot holding, ``close`` ends the
threads. All callbacks run in one single-threaded executor; long work runs in the node's ``worker`` and its
outcome comes back to the executor. ``run`` is the main function of every node. What starts and stops at the word of a
lifecycle manager is in ``selfalign_ros.life.managed_node``.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn, TypeVar

import rclpy
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.task import Future

from selfalign.srv import Step
from selfalign_core.errors import SelfAlignError
from selfalign_core.robot.contract import RobotContract
from selfalign_ros.bridge.conversions import to_ns
from selfalign_ros.life.diagnostics import Diagnostics, Status
from selfalign_ros.life.exit_codes import CONFIGURATION
from selfalign_ros.life.parameters import Parameters
from selfalign_ros.life.process import give_way, say_fatal, start_ros
from selfalign_ros.life.resources import config_file
from selfalign_ros.life.worker import Outcome, Worker

Result = TypeVar("Result")

_SPIN_TIMEOUT_S = 0.2  # how late a signal may be noticed when nothing else happens
_WORKER_JOIN_S = 5.0


class SelfAlignNode(Node):
    """Base of the nodes. Subclasses fill in ``start``, ``stop``, ``statuses`` and, for replay, ``step``."""

    loads_before_niceness = False
    """True: the node calls ``set_niceness`` itself, in the thread whose work shall give way."""
    is_active = True
    """Whether the node works now; lock-step steps wait for it."""

    def __init__(self, kind: str, cli_args: list[str] | None = None) -> None:
        """``cli_args``: ROS arguments of this node alone, which shares its process; None: the process's are its own."""
        super().__init__(kind, cli_args=cli_args)
        self._has_process = cli_args is None
        self.parameters = Parameters(self, kind)
        if not self.loads_before_niceness:
            self.set_niceness()
        self.contract = RobotContract.from_yaml(config_file(self.parameters["contract"]))
        self.lockstep: bool = self.parameters.values.get("lockstep", False)
        self._mailbox: deque[Callable[[], None]] = deque()
        self.worker = self.new_worker()
        self._waiting: list[tuple[Callable[[], bool], Future]] = []
        self._received: dict[str, int] = {}
        self.diagnostics = Diagnostics(self, self.contract.name, self.all_statuses)
        self.parameters.on_change(self.parameters_changed, self.check_parameters)
        if self.lockstep:
            # A group of its own: while a step waits, messages must still arrive.
            group = MutuallyExclusiveCallbackGroup()
            self.create_service(Step, "~/step", self._on_step, callback_group=group)

    # --- to be filled in ---

    def start(self) -> None:
        """Start working. The node has an executor by now."""

    def stop(self) -> None:
        """Stop working; whatever moves is left holding its position."""

    def statuses(self) -> Iterable[Status]:
        """What diagnostics shall say now."""
        return ()

    def all_statuses(self) -> Iterable[Status]:
        """``statuses`` and what the base has to say."""
        return self.statuses()

    def parameters_changed(self, names: set[str]) -> None:
        """Parameters have new values."""

    def check_parameters(self, values: dict[str, Any]) -> str | None:
        """A reason to refuse these values as a whole, or None."""
        return None

    async def step(self, request: Step.Request) -> bool:
        """Do all the work due at ``request.stamp`` (lock-step only). True if a chunk was made or an align
        call ran.
        """
        raise NotImplementedError

    # --- time ---

    def now_ns(self) -> int:
        """The node's clock: system time, or simulated time with ``use_sim_time``."""
        return self.get_clock().now().nanoseconds

    def create_steady_timer(self, period_s: float, callback: Callable[[], None]) -> None:
        """A timer that runs while simulated time stands still."""
        self.create_timer(period_s, callback, clock=Clock(clock_type=ClockType.STEADY_TIME))

    # --- waiting without blocking the executor ---

    def call_worker(self, job: Callable[[], Result]) -> Awaitable[Result]:
        """Await this in a coroutine callback to run ``job`` in the worker."""
        future: Future = Future()

        def done(outcome: Outcome[Result]) -> None:
            if outcome.error is not None:
                future.set_exception(outcome.error)
            else:
                future.set_result(outcome.value)

        self.worker.submit(job, done)
        return future

    def until(self, condition: Callable[[], bool]) -> Awaitable[None]:
        """Await this in a coroutine callback; ``notify`` looks at the condition again."""
        future: Future = Future()
        self._waiting.append((condition, future))
        self.notify()
        return future

    def notify(self) -> None:
        """Something has changed that a coroutine may be waiting for."""
        still_waiting = []
        for condition, future in self._waiting:
            if condition():
                future.set_result(None)
            else:
                still_waiting.append((condition, future))
        self._waiting = still_waiting

    def arrived(self, topic: str) -> None:
        """Count a message of an input topic; lock-step steps wait for these counts."""
        name = self.resolve_topic_name(topic)
        self._received[name] = self._received.get(name, 0) + 1
        self.notify()

    def counts_inputs(self, *topics: str) -> None:
        """Name the topics this node reads, so that a step waits for them even before their first message."""
        for topic in topics:
            self._received.setdefault(self.resolve_topic_name(topic), 0)

    async def _on_step(self, request: Step.Request, response: Step.Response) -> Step.Response:
        expected = {
            self.resolve_topic_name(topic): int(count)
            for topic, count in zip(request.topics, request.counts, strict=False)
        }
        try:
            await self.until(lambda: self.is_active and self._has_received(expected))
            response.acted = await self.step(request)
            response.success = True
        except SelfAlignError as error:
            response.message = f"{self.get_name()} at {to_ns(request.stamp)} ns: {error}"
            self.get_logger().error(response.message)
        return response

    def _has_received(self, expected: dict[str, int]) -> bool:
        return all(self._received.get(topic, count) >= count for topic, count in expected.items())

    def set_niceness(self) -> None:
        """Give way to others as the parameter ``niceness`` says, with this thread and those it starts."""
        niceness = self.parameters.values.get("niceness", 0)
        if not niceness:
            return
        try:
            give_way(niceness, session=self._has_process)
        except OSError as error:
            self.get_logger().warning(f"niceness {niceness} refused by the system ({error}); going on without")

    # --- the worker, and from it back to the executor ---

    def new_worker(self) -> Worker:
        """A worker whose outcomes come back to this node's executor."""
        return Worker(f"{self.get_name()}-worker", self._post)

    def _post(self, deliver: Callable[[], None]) -> None:
        self._mailbox.append(deliver)
        if (executor := self.executor) is not None:  # None after the end, for a job that was left behind
            executor.create_task(self._open_mail)  # wakes the executor, from any thread

    def _open_mail(self) -> None:
        while self._mailbox:
            self._mailbox.popleft()()
        self.notify()

    def close(self) -> None:
        """End the worker."""
        if not self.worker.close(_WORKER_JOIN_S):
            self.get_logger().warning(f"a job did not end within {_WORKER_JOIN_S:g} s of being asked to; leaving it")


def run(make_node: Callable[[], SelfAlignNode], args: list[str] | None = None) -> NoReturn:
    """Run one node until SIGINT or SIGTERM, then end the process with an exit code.

    0 after a signal, 2 if the configuration is wrong (a restart would not help), 1 after a crash.
    """
    try:
        is_stopped = start_ros(args)
    except SelfAlignError as error:
        say_fatal(str(error))
        end_process(CONFIGURATION)
    end_process(live(make_node, is_stopped))


def end_process(code: int) -> NoReturn:
    """Everything that matters is closed: end at once, with this exit code.

    Unloading torch takes seconds more, in which a supervisor would see a node that does not obey, and it crashes if a
    job that cannot be interrupted is still running.
    """
    rclpy.try_shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def live(make_node: Callable[[], SelfAlignNode], is_stopped: Callable[[], bool]) -> int:
    """The life of one node in this thread, with an executor of its own. Returns its exit code (see ``run``)."""
    node: SelfAlignNode | None = None
    executor = SingleThreadedExecutor()
    try:
        node = make_node()
        executor.add_node(node)
        node.start()
        while not is_stopped():
            executor.spin_once(timeout_sec=_SPIN_TIMEOUT_S)
        return 0
    except SelfAlignError as error:
        say_fatal(str(error), node)
        return CONFIGURATION
    except Exception:
        say_fatal(f"crashed:\n{traceback.format_exc()}", node)
        return 1
    finally:
        if node is not None:
            node.stop()
            node.close()
            executor.shutdown(timeout_sec=1.0)
            node.destroy_node()
