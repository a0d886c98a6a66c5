"""The aligner node: asks the buffer for transitions, runs ``Aligner.align`` and publishes the token if it
passed.

It may crash, stall or be killed at any time: the policy goes on with the last token it accepted. A
restarted aligner continues from the token the policy says it uses (``policy/e_token_in_use``), so versions
never run backwards.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.task import Future
from std_srvs.srv import Trigger

from selfalign.msg import AlignReport as AlignReportMsg
from selfalign.msg import EToken as ETokenMsg
from selfalign.srv import SampleTransitions, Step
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.types import EToken, TransitionBatch
from selfalign_ros import qos
from selfalign_ros.conversions import (
    NS_PER_S,
    e_token_from_message,
    e_token_message,
    read_transitions,
    report_message,
    to_ns,
    to_stamp,
)
from selfalign_ros.diagnostics import ERROR, OK, WARN, Complaint, Status
from selfalign_ros.node import SelfAlignNode, run
from selfalign_ros.resources import checkpoint_folder
from selfalign_ros.worker import Outcome

if TYPE_CHECKING:
    from selfalign_core.aligner import Aligner, AlignResult

# How long a fresh aligner listens for the token in use before it starts from the checkpoint's own.
_LISTEN_S = 2.0
_TUNABLES = (
    "steps",
    "learning_rate",
    "lambda_perc",
    "lambda_dyn",
    "lambda_inv",
    "guard_draws",
    "guard_sigmas",
    "max_norm",
    "trust_radius",
)


@dataclass(frozen=True)
class Call:
    """One align call: what it started from and what came out."""

    before: EToken
    after: EToken
    result: AlignResult
    fit_count: int
    holdout_count: int


class AlignerNode(SelfAlignNode):
    """See the module."""

    # On a busy machine loading would take minutes if it gave way already.
    loads_before_niceness = True

    def __init__(self) -> None:
        super().__init__("aligner")
        self._checkpoint = checkpoint_folder(self.parameters["checkpoint"])
        self._aligner: Aligner | None = None  # used in the worker only
        self._token: EToken | None = None
        self._token_in_use: ETokenMsg | None = None
        self._ready = False
        self._loaded_at = 0.0
        self._aligning = False
        self._calls = self._accepted = self._refused = self._failed = 0
        self._last_align_ns: int | None = None
        self._last_reason = "no align call yet"
        self._problem = ""
        self._complaint = Complaint(self.get_logger().warning)
        self._sample: Future | None = None
        self._sample_deadline = 0.0

        self._token_publisher = self.create_publisher(ETokenMsg, "e_token", qos.LATCHED)
        self._report_publisher = self.create_publisher(AlignReportMsg, "align_report", qos.EVENTS)
        self.create_subscription(ETokenMsg, "policy/e_token_in_use", self._on_token_in_use, qos.LATCHED)
        self._client = self.create_client(SampleTransitions, "buffer/sample_transitions")
        # Groups of their own: these callbacks wait, and others must run meanwhile.
        self._timer_group = MutuallyExclusiveCallbackGroup()
        group = MutuallyExclusiveCallbackGroup()
        self.create_service(Trigger, "aligner/align_now", self._on_align_now, callback_group=group)
        self._timer: Any = None

    # --- life ---

    def activate(self) -> None:
        parameters = dict(self.parameters.values)
        self.worker.submit(lambda: self._load(parameters), self._on_loaded)
        # Not on the ROS clock: a buffer that never answers must not be waited for while time stands still.
        self.create_steady_timer(0.2, self._watch)
        if not self.lockstep:
            self._start_timer()

    def parameters_changed(self, names: set[str]) -> None:
        if "align_frequency" in names and self._timer is not None:
            self._start_timer()

    def check_parameters(self, values: dict[str, Any]) -> str | None:
        weights = [values[name] for name in ("lambda_perc", "lambda_dyn", "lambda_inv")]
        if not any(weights):
            return "lambda_perc, lambda_dyn, lambda_inv: found all 0; allowed: at least one above 0"
        return None

    def _start_timer(self) -> None:
        if self._timer is not None:
            self.destroy_timer(self._timer)
        period_s = 1.0 / self.parameters["align_frequency"]
        self._timer = self.create_timer(period_s, self._on_timer, callback_group=self._timer_group)

    def _load(self, parameters: dict[str, Any]) -> EToken:
        import torch

        torch.set_num_threads(parameters["torch_threads"])
        from selfalign_core.aligner import Aligner
        from selfalign_core.policy import Policy

        policy = Policy.load(self._checkpoint, contract=self.contract, device=parameters["device"])
        self._aligner = Aligner(policy, prompt=parameters["prompt"])
        if policy.e_token is None:
            raise ConfigError(f"checkpoint {self._checkpoint!r}: found no E-Token; expected one to align")
        self.set_niceness()
        return policy.e_token

    def _on_loaded(self, outcome: Outcome[EToken]) -> None:
        own = outcome.result()
        self._token = EToken(own.data, own.version, self.contract.embodiment, own.model_digest)
        self._loaded_at = time.monotonic()
        self.get_logger().info(f"model {own.model_digest[:12]} ready to align")
        if self.lockstep:
            self._begin()
        elif self._token_in_use is not None:
            self._continue_from(self._token_in_use)
            self._begin()

    def _begin(self) -> None:
        self._ready = True
        self._publish_token(self.get_clock().now().nanoseconds)

    def _on_token_in_use(self, message: ETokenMsg) -> None:
        self._token_in_use = message
        if self._token is not None and not self.lockstep:
            self._continue_from(message)
            if not self._ready:
                self._begin()

    def _continue_from(self, message: ETokenMsg) -> None:
        """Go on from the policy's token if it is ahead of this one, as it is after a restart of this node."""
        assert self._token is not None
        if message.version <= self._token.version or self._aligning:
            return
        try:
            token = e_token_from_message(message)
            if token.model_digest != self._token.model_digest or token.data.shape != self._token.data.shape:
                raise InputError(
                    f"found model {token.model_digest[:12]}, shape {token.data.shape}; "
                    f"expected {self._token.model_digest[:12]}, {self._token.data.shape}"
                )
        except InputError as error:
            self._problem = f"E-Token in use: {error}"
            self.get_logger().error(self._problem)
            return
        self.get_logger().info(f"continuing from E-Token version {token.version}")
        self._token = token

    def _watch(self) -> None:
        self.notify()
        if self._sample is not None and time.monotonic() > self._sample_deadline:
            self._sample.cancel()
        if self._token is not None and not self._ready and time.monotonic() - self._loaded_at > _LISTEN_S:
            self._begin()

    # --- align calls ---

    async def _on_timer(self) -> None:
        if self.parameters["enable"] and self._ready and not self._aligning:
            await self._align(self.now_ns())

    async def _on_align_now(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if not self._ready:
            response.message = "starting: the model is being loaded"
        elif self._aligning:
            response.message = "an align call is running"
        else:
            response.success = await self._align(self.now_ns())
            response.message = self._problem or self._last_reason
        return response

    async def step(self, request: Step.Request) -> bool:
        now_ns = to_ns(request.stamp)
        await self.until(lambda: self._ready)
        if self._last_align_ns is None:
            self._last_align_ns = now_ns
        period_ns = round(NS_PER_S / self.parameters["align_frequency"])
        if not self.parameters["enable"] or now_ns - self._last_align_ns < period_ns:
            return False
        self._last_align_ns = now_ns
        return await self._align(now_ns)

    async def _align(self, now_ns: int) -> bool:
        """One align call. False, with ``_problem`` set, if it could not run."""
        self._aligning = True
        try:
            fit, holdout = await self._request_transitions()
            call = await self.call_worker(self._align_job(fit, holdout))
        except InputError as error:
            self._problem = str(error)
            self._complaint.say(f"not aligning: {error}")
            return False
        except Exception as error:
            # Whatever breaks in here must not take the robot's other nodes along, nor this one.
            self._failed += 1
            self._problem = f"align() failed: {error!r}"
            self.get_logger().error(f"align() failed:\n{traceback.format_exc()}")
            return False
        finally:
            self._aligning = False
        self._problem = ""
        self._complaint.say("")
        self._finish(call, now_ns)
        return True

    async def _request_transitions(self) -> tuple[TransitionBatch, TransitionBatch]:
        timeout_s = self.parameters["sample_timeout"]
        name = self._client.srv_name
        if self.lockstep:
            # However long discovery takes: giving up here would make two replays differ.
            await self.until(self._client.service_is_ready)
            timeout_s = math.inf
        elif not self._client.service_is_ready():
            raise InputError(f"service {name}: found nobody offering it; expected the buffer node")
        request = SampleTransitions.Request(
            fit_size=self.parameters["batch_size"],
            holdout_size=self.parameters["holdout_size"],
            seed=self._call_seed(),
        )
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
        return read_transitions(response, self.contract)

    def _align_job(self, fit: TransitionBatch, holdout: TransitionBatch) -> Any:
        """The work for the worker, with parameters and token as they are now."""
        from selfalign_core.aligner import AlignConfig

        budget_s = None if self.lockstep else self.parameters["time_budget_ms"] / 1e3
        config = AlignConfig(**{name: self.parameters[name] for name in _TUNABLES}, time_budget_s=budget_s)
        seed, before, aligner = self._call_seed(), self._token, self._aligner
        assert before is not None and aligner is not None
        should_stop = self.worker.should_stop

        def job() -> Call:
            result = aligner.align(before.data, fit, holdout, config, seed=seed, should_stop=should_stop)
            after = before
            if result.accepted:
                after = EToken(result.token, before.version + 1, before.embodiment, before.model_digest)
            return Call(before, after, result, len(fit), len(holdout))

        return job

    def _finish(self, call: Call, now_ns: int) -> None:
        stamp_ns = now_ns if self.lockstep else self.now_ns()
        self._calls += 1
        self._accepted += call.result.accepted
        self._refused += not call.result.accepted
        self._last_reason = call.result.reason
        self._token = call.after
        if call.result.accepted:
            self._publish_token(stamp_ns)
        message = report_message(
            call.result,
            stamp=to_stamp(stamp_ns),
            embodiment=self.contract.embodiment,
            version_before=call.before.version,
            version_after=call.after.version,
            fit_count=call.fit_count,
            holdout_count=call.holdout_count,
        )
        self._report_publisher.publish(message)

    def _publish_token(self, stamp_ns: int) -> None:
        assert self._token is not None
        self._token_publisher.publish(e_token_message(self._token, to_stamp(stamp_ns)))

    def _call_seed(self) -> int:
        """From the seed parameter and the number of the call, never from the clock."""
        return (self.parameters["seed"] << 32) + self._calls + self._failed

    # --- diagnostics ---

    def statuses(self) -> Iterable[Status]:
        values: dict[str, object] = {
            "align calls": self._calls,
            "accepted": self._accepted,
            "refused": self._refused,
            "failed": self._failed,
            "align frequency [Hz]": self.parameters["align_frequency"],
            "last reason": self._last_reason,
        }
        if self._token is not None:
            values["E-Token version"] = self._token.version
        if self._problem:
            yield Status("align", ERROR if self._failed else WARN, self._problem, values)
        elif not self._ready:
            yield Status("align", WARN, "starting: the model is being loaded", values)
        elif not self.parameters["enable"]:
            yield Status("align", OK, "disabled: the parameter enable is false", values)
        else:
            yield Status("align", OK, self._last_reason, values)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the node; ends the process."""
    run(AlignerNode, args)


if __name__ == "__main__":
    main()
