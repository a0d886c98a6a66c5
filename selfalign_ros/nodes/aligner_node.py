"""The aligner node: asks the buffer for transitions, hands them to the ``SelfAligner`` and publishes what it accepts.

It may crash, stall or be killed at any time: the policy goes on with the last token it accepted. A
restarted aligner continues from the token the policy says it uses (``policy/e_token_in_use``), so versions
never run backwards.
"""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.task import Future
from std_srvs.srv import Trigger

from selfalign.msg import AlignReport as AlignReportMsg
from selfalign.msg import EToken as ETokenMsg
from selfalign.srv import SampleTransitions, Step
from selfalign_core.alignment.config import AlignConfig
from selfalign_core.errors import ConfigError, InputError, SelfAlignError
from selfalign_core.robot.types import EToken, TransitionBatch
from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import (
    NS_PER_S,
    e_token_from_message,
    e_token_message,
    read_transitions,
    report_message,
    to_ns,
    to_stamp,
)
from selfalign_ros.life.diagnostics import ERROR, OK, WARN, Complaint, Latency, Status
from selfalign_ros.life.kept import KeptFile
from selfalign_ros.life.managed_node import ManagedNode
from selfalign_ros.life.node import run
from selfalign_ros.life.resources import checkpoint_folder
from selfalign_ros.life.worker import Outcome

if TYPE_CHECKING:
    from selfalign_core.alignment import Request, SelfAligner, StageReport
    from selfalign_core.alignment.motion_wanted import MotionWanted

# How long a fresh aligner listens for the token in use before it starts from the checkpoint's own.
_LISTEN_S = 2.0
_WAITING = "not aligning yet: listening for the token in use"


def align_config(parameters: Mapping[str, Any]) -> AlignConfig:
    """The settings in force, without limits of time in lock-step."""
    config = AlignConfig.of(parameters)
    return config.without_budgets() if parameters["lockstep"] else config


class AlignerNode(ManagedNode):
    """See the module."""

    # On a busy machine loading would take minutes if it gave way already.
    loads_before_niceness = True

    def __init__(self, cli_args: list[str] | None = None) -> None:
        super().__init__("aligner", cli_args)
        self._aligner: SelfAligner | None = None  # used in the worker only
        self._token: EToken | None = None
        self._token_in_use: ETokenMsg | None = None
        self._ready = False
        self._activated_at = 0.0
        self._busy = False
        self._rounds = self._accepted = self._refused = self._drifts = self._failed = 0
        self._last_round_ns: int | None = None
        self._last_text = "no round yet"
        self._round_latency = Latency("round")
        self._problem = ""
        self._complaint = Complaint(self.get_logger())
        self._sample: Future | None = None
        self._sample_deadline = 0.0
        self._orders: list[Callable[[SelfAligner], None]] = []  # to begin the next round with
        self._motion: MotionWanted  # while active
        self._timer: Any = None
        self._kept = KeptFile(self.kept_path(".safetensors"))  # used in the worker only

    # --- life ---

    async def configure(self) -> None:
        checkpoint, parameters = checkpoint_folder(self.parameters["checkpoint"]), dict(self.parameters.values)
        self._token = await self.call_worker(lambda: self._load(checkpoint, parameters))
        self.get_logger().info(f"model {self._token.model_digest[:12]} ready to align")
        self._token_publisher = self.create_publisher(ETokenMsg, "e_token", **qos.overridable(qos.LATCHED))
        self._report_publisher = self.create_publisher(AlignReportMsg, "align_report", **qos.overridable(qos.EVENTS))
        self.create_subscription(
            ETokenMsg, "policy/e_token_in_use", self._on_token_in_use, **qos.overridable(qos.LATCHED)
        )
        self._client = self.create_client(SampleTransitions, "buffer/sample_transitions")
        self._calibrate = self.create_client(Trigger, "policy/calibrate")
        self._end_calibration = self.create_client(Trigger, "policy/end_calibration")
        # Groups of their own: these callbacks wait, and others must run meanwhile.
        self._timer_group = MutuallyExclusiveCallbackGroup()
        for name, callback in (
            ("align_now", self._on_align_now),
            ("rollback", self._on_rollback),
            ("reset", self._on_reset),
            ("save", self._on_save),
        ):
            group = MutuallyExclusiveCallbackGroup()
            self.create_service(Trigger, f"~/{name}", callback, callback_group=group)

    def activate(self) -> None:
        from selfalign_core.alignment.motion_wanted import MotionWanted

        self._motion = MotionWanted()
        self._activated_at = time.monotonic()
        # Not on the ROS clock: a buffer that never answers must not be waited for while time stands still.
        self.create_steady_timer(0.2, self._watch)
        if self.lockstep:
            self._begin()
            return
        self._start_timer()
        if self._token_in_use is not None:
            self._continue_from(self._token_in_use)

    def deactivate(self) -> None:
        self._ready = False
        self._timer = None
        self._orders.clear()

    def is_idle(self) -> bool:
        return not self._busy

    def cleanup(self) -> None:
        self._aligner = self._token = self._token_in_use = None

    def parameters_changed(self, names: set[str]) -> None:
        if "align_frequency" in names and self._timer is not None:
            self._start_timer()

    def check_parameters(self, values: dict[str, Any]) -> str | None:
        try:
            AlignConfig.of(values)
        except ConfigError as error:
            return str(error)
        return None

    def _start_timer(self) -> None:
        if self._timer is not None:
            self.destroy_timer(self._timer)
        period_s = 1.0 / self.parameters["align_frequency"]
        self._timer = self.create_timer(period_s, self._on_timer, callback_group=self._timer_group)

    def _load(self, checkpoint: str, parameters: dict[str, Any]) -> EToken:
        self.say_progress(f"loading the model {checkpoint or 'tiny'}")
        from selfalign_core.model.torch_state import use_stream, use_threads

        use_threads(parameters["torch_threads"])
        use_stream(parameters["device"], urgent=False)
        from selfalign_core.alignment import SelfAligner
        from selfalign_core.policy import Policy

        device, precision = parameters["device"], parameters["precision"]
        policy = Policy.load(checkpoint, contract=self.contract, device=device, precision=precision)
        self._aligner = SelfAligner(
            policy,
            align_config(parameters),
            joints=self.contract.joint_names,
            prompt=parameters["prompt"],
            seed=parameters["seed"],
        )
        own = self._aligner.token
        self._aligner.use(EToken(own.data, own.version, self.contract.embodiment, own.model_digest), 0)
        self._restore(self._aligner, parameters["guard_max_norm"])
        self.set_niceness()
        self.say_progress("warming up")
        self._aligner.warm_up(self.contract.home)
        return self._aligner.token

    def _restore(self, aligner: SelfAligner, max_norm: float) -> None:
        """Go on from the file of the accepted tokens if there is one. One that does not fit is named and left alone."""
        from selfalign_core.alignment.history import History

        def load(path: Path) -> None:
            history = History.load(path, like=aligner.token, keep=aligner.config.keep)
            aligner.policy.check_e_token(history.token, max_norm=max_norm)
            aligner.restore(history)

        self._kept.read(load)
        if self._kept.problem:
            self.get_logger().error(self._kept.problem)
        elif aligner.token.version:
            self.get_logger().info(f"E-Token version {aligner.token.version} loaded from {self._kept.path}")

    def _begin(self) -> None:
        assert self._token is not None
        self._ready = True
        self._publish_token(self._token, self.get_clock().now().nanoseconds)

    def _on_token_in_use(self, message: ETokenMsg) -> None:
        self._token_in_use = message
        if self.is_active and not self.lockstep:
            self._continue_from(message)

    def _continue_from(self, message: ETokenMsg) -> None:
        """Go on from the policy's token if it is ahead of this one, as after a restart of this node; then begin."""

        def use() -> EToken | None:
            assert self._aligner is not None
            if message.version <= self._aligner.token.version:
                return None
            token = e_token_from_message(message)
            self._aligner.use(token, to_ns(message.header.stamp))
            self._kept.write(self._aligner.history.save)
            return token

        def used(outcome: Outcome[EToken | None]) -> None:
            if isinstance(outcome.error, InputError):
                self._problem = f"E-Token in use: {outcome.error}"
                self.get_logger().error(self._problem)
            elif (token := outcome.result()) is not None:
                self.get_logger().info(f"continuing from E-Token version {token.version}")
                self._token = token
                self._ready = False  # what it has published is behind this, and refused: it begins again
            if self.is_active and not self._ready:
                self._begin()

        self.worker.submit(use, used)

    def _watch(self) -> None:
        self.notify()
        if self._sample is not None and time.monotonic() > self._sample_deadline:
            self._sample.cancel()
        late = time.monotonic() - self._activated_at > _LISTEN_S
        if late and not self._ready and self._token_in_use is None:
            self._begin()

    # --- rounds ---

    async def _on_timer(self) -> None:
        if self.parameters["enable"] and self._ready and not self._busy:
            await self._round(self.now_ns())

    async def step(self, request: Step.Request) -> bool:
        now_ns = to_ns(request.stamp)
        if self._last_round_ns is None:
            self._last_round_ns = now_ns
        period_ns = round(NS_PER_S / self.parameters["align_frequency"])
        if not self.parameters["enable"] or now_ns - self._last_round_ns < period_ns:
            return False
        self._last_round_ns = now_ns
        return await self._round(now_ns)

    async def _round(self, now_ns: int) -> bool:
        """One round. False if there was nothing to report: nothing new, or a ``_problem``."""
        self._busy = True
        try:
            wanted = await self.call_worker(self._request_job(now_ns))
            response = await self._ask_buffer(SampleTransitions.Request(**dataclasses.asdict(wanted)))
            if response.found >= wanted.least and not response.cameras:
                self._problem = ""
                return False
            batch = read_transitions(response, self.contract) if response.cameras else None
            report, duration_s = await self.call_worker(self._advance_job(batch, response.found, now_ns))
        except InputError as error:
            self._problem = str(error)
            self._complaint.say(f"not aligning: {error}")
            return False
        except Exception as error:
            # Whatever breaks in here must not take the robot's other nodes along, nor this one.
            self._failed += 1
            self._problem = f"aligning failed: {error!r}"
            self.get_logger().error(f"aligning failed:\n{traceback.format_exc()}")
            return False
        finally:
            self._busy = False
        self._problem = ""
        self._complaint.say("")
        self._finish(report, duration_s, now_ns)
        return True

    def _request_job(self, now_ns: int) -> Callable[[], Request]:
        """The work for the worker: what the aligner needs next, with orders and parameters as they are now."""
        aligner, parameters = self._aligner, dict(self.parameters.values)
        orders, self._orders = self._orders, []
        assert aligner is not None

        def job() -> Request:
            aligner.configure(align_config(parameters))
            for order in orders:
                order(aligner)
            return aligner.request(now_ns)

        return job

    async def _ask_buffer(self, request: SampleTransitions.Request) -> SampleTransitions.Response:
        timeout_s = self.parameters["sample_timeout"]
        name = self._client.srv_name
        if self.lockstep:
            # However long discovery takes: giving up here would make two replays differ.
            await self.until(self._client.service_is_ready)
            timeout_s = math.inf
        elif not self._client.service_is_ready():
            raise InputError(f"service {name}: found nobody offering it; expected the buffer node")
        self._sample_deadline = time.monotonic() + timeout_s
        self._sample = self._client.call_async(request)
        try:
            response = await self._sample
        finally:
            future, self._sample = self._sample, None
        if response is None:
            self._client.remove_pending_request(future)
            raise InputError(f"service {name}: found no answer within {timeout_s} s; expected transitions")
        if not response.success:
            raise InputError(response.message)
        return response

    def _advance_job(
        self, batch: TransitionBatch | None, found: int, now_ns: int
    ) -> Callable[[], tuple[StageReport, float]]:
        """The work for the worker: the round, and how long it took [s]."""
        aligner, worker = self._aligner, self.worker
        assert aligner is not None

        def should_stop() -> bool:
            return worker.should_stop() or not self.is_active

        def job() -> tuple[StageReport, float]:
            started = time.monotonic()
            if batch is None:
                report = aligner.short_of(found, now_ns)
            else:
                report = aligner.advance(batch, now_ns, should_stop=should_stop)
            if report.accepted:
                self._kept.write(aligner.history.save)
            return report, time.monotonic() - started

        return job

    def _finish(self, report: StageReport, duration_s: float, now_ns: int) -> None:
        stamp_ns = now_ns if self.lockstep else self.now_ns()
        self._rounds += 1
        self._round_latency.add(duration_s)
        self._last_text = report.text
        self._accepted += report.accepted
        self._refused += report.refused
        self._drifts += report.drifted
        if report.eventful:
            self.get_logger().info(report.text)
        if report.accepted:
            self._publish_token(report.token, stamp_ns)
        stamp, embodiment = to_stamp(stamp_ns), self.contract.embodiment
        self._report_publisher.publish(
            report_message(report, stamp=stamp, embodiment=embodiment, duration_s=duration_s)
        )
        self._see_to_motion(report, now_ns)

    def _see_to_motion(self, report: StageReport, now_ns: int) -> None:
        """With ``auto_calibrate``: have the robot moved when it is time to, and no longer than it takes."""
        patience_ns = round(self.parameters["auto_calibrate_after"] * NS_PER_S)
        wanted = self._motion = self._motion.after(report, now_ns, patience_ns)
        if not self.parameters["auto_calibrate"] or self.lockstep:
            if wanted.asks:
                self.get_logger().info(f"a calibration motion would tell more (~/calibrate): {report.text}")
        elif wanted.asks and self._calibrate.service_is_ready():
            asked = self._calibrate.call_async(Trigger.Request())
            asked.add_done_callback(lambda future: self._on_calibrate_answer(future, wanted))
        elif wanted.served:
            self._end_motion()

    def _on_calibrate_answer(self, future: Future, wanted: MotionWanted) -> None:
        self.get_logger().info(f"asked for motion ({self._last_text}): {future.result().message}")
        if wanted.anew and future.result().success:
            before_ns = self.now_ns()
            self._orders.append(lambda aligner: aligner.forget(before_ns))
        if wanted.served:
            self._end_motion()

    def _end_motion(self) -> None:
        if self._end_calibration.service_is_ready():
            self._end_calibration.call_async(Trigger.Request())

    def _publish_token(self, token: EToken, stamp_ns: int) -> None:
        self._token = token
        self._token_publisher.publish(e_token_message(token, to_stamp(stamp_ns)))

    # --- orders ---

    async def _on_align_now(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if not self._ready:
            response.message = _WAITING
        elif self._busy:
            self._orders.append(lambda aligner: aligner.align_now())
            response.message = "a round is running; the next one will not rest"
        else:
            self._orders.append(lambda aligner: aligner.align_now())
            response.success = await self._round(self.now_ns())
            response.message = self._problem or (
                self._last_text if response.success else "no transitions that are newer than the last round's"
            )
        return response

    async def _on_rollback(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        meant = self._token.version if self._token is not None else 0

        def rollback(aligner: SelfAligner, now_ns: int) -> EToken:
            if aligner.token.version != meant:
                raise InputError(f"rollback: found version {aligner.token.version} in use by now, expected {meant}")
            return aligner.rollback(now_ns)

        return await self._replace_token(response, rollback)

    async def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return await self._replace_token(response, lambda aligner, now_ns: aligner.reset(now_ns))

    async def _replace_token(
        self, response: Trigger.Response, order: Callable[[SelfAligner, int], EToken]
    ) -> Trigger.Response:
        now_ns = self.now_ns()

        def replace(aligner: SelfAligner) -> EToken:
            token = order(aligner, now_ns)
            self._kept.write(aligner.history.save)
            return token

        token = await self._obey(response, replace)
        if token is not None:
            self._publish_token(token, now_ns)
            response.message = f"in use as E-Token version {token.version}"
        return response

    async def _on_save(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        def save(aligner: SelfAligner) -> int:
            if self._kept.path is None:
                raise InputError("parameter token_folder: found nothing; expected the folder to save in")
            self._kept.write(aligner.history.save)
            if self._kept.problem:
                raise InputError(self._kept.problem)
            return aligner.token.version

        version = await self._obey(response, save)
        if version is not None:
            response.message = f"E-Token version {version} saved to {self._kept.path}"
        return response

    async def _obey(self, response: Trigger.Response, order: Callable[[SelfAligner], Any]) -> Any:
        """What ``order`` returns in the worker; None, with the reason in ``response``, if it cannot be done."""
        aligner = self._aligner
        if not self._ready or aligner is None:
            response.message = _WAITING
            return None
        try:
            value = await self.call_worker(lambda: order(aligner))
        except (SelfAlignError, OSError) as error:
            response.message = str(error)
            return None
        response.success = True
        return value

    # --- diagnostics ---

    def statuses(self) -> Iterable[Status]:
        values: dict[str, object] = {
            "rounds": self._rounds,
            "accepted": self._accepted,
            "refused": self._refused,
            "accept rate": self._accepted / max(self._accepted + self._refused, 1),
            "drifts": self._drifts,
            "failed": self._failed,
            "align frequency [Hz]": self.parameters["align_frequency"],
            "last round": self._last_text,
            **self._round_latency.values(),
        }
        if self._token is not None:
            values["E-Token version"] = self._token.version
        if self._problem:
            yield Status("align", ERROR if self._failed else WARN, self._problem, values)
        elif not self._ready:
            yield Status("align", WARN, _WAITING, values)
        elif self._kept.problem:
            yield Status("align", WARN, self._kept.problem, values)
        elif not self.parameters["enable"]:
            rest = "the round under way is the last" if self._busy else "disabled"
            yield Status("align", OK, f"{rest}: the parameter enable is false", values)
        else:
            yield Status("align", OK, self._last_text, values)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the node; ends the process."""
    run(AlignerNode, args)


if __name__ == "__main__":
    main()
