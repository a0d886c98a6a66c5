"""The base of the managed nodes: what a lifecycle manager (``ros2 lifecycle``) says is done, or undone again.

``configure`` loads, ``activate`` starts, ``deactivate`` holds, ``cleanup`` frees. ``configure`` is a coroutine: its
long work runs in the worker while the executor goes on serving diagnostics, parameters and the state itself, which is
``configuring`` meanwhile; the answer to the request is given at the end. (The transition callbacks of
``rclpy.lifecycle`` are synchronous, so a node that loads a model in one is silent until it has.)

What a transition creates (publishers, subscriptions, services, clients, timers) its counterpart destroys, and so does
its own failure: nodes need not keep account. This module knows nothing of what the nodes do.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNodeMixin, TransitionCallbackReturn
from rclpy.publisher import Publisher
from rclpy.subscription import Subscription

from selfalign_ros.life.diagnostics import ERROR, OK, WARN, Status, gpu_memory, incompatible_peers, torch_with_gpu
from selfalign_ros.life.node import SelfAlignNode
from selfalign_ros.life.resources import state_folder

_NO_PUBLISHER_EVENTS = PublisherEventCallbacks(use_default_callbacks=False)
_NO_SUBSCRIPTION_EVENTS = SubscriptionEventCallbacks(use_default_callbacks=False)
_LEVELS = {"active": OK, "finalized": ERROR}


class ManagedNode(LifecycleNodeMixin, SelfAlignNode):
    """A node with the states of a ROS 2 managed node. Subclasses fill in the four transitions.

    A failed ``configure`` leaves the node unconfigured, a failed ``activate`` inactive; a failed ``deactivate`` or
    ``cleanup`` leaves it unconfigured, with everything destroyed. With the parameter ``autostart`` (the default) it
    becomes active by itself, and a failure to do so ends the process.
    """

    def __init__(self, kind: str, cli_args: list[str] | None = None) -> None:
        SelfAlignNode.__init__(self, kind, cli_args)
        # Reentrant, because a request is still being served when the next question for the state arrives.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        # An executor awaits coroutines too; rclpy's type of a callback does not say so.
        self._service_change_state.callback = self._on_change_state  # type: ignore[assignment]
        self.is_active = False
        self.is_configured = False
        self._progress, self._progress_began = "", 0.0
        self._transition_failure = ""
        self._before_configuration: set[Any] = set()
        self._before_activation: set[Any] = set()
        self._transitions = {
            Transition.TRANSITION_CONFIGURE: self._configure,
            Transition.TRANSITION_ACTIVATE: self._activate,
            Transition.TRANSITION_DEACTIVATE: self._deactivate,
            Transition.TRANSITION_CLEANUP: self._cleanup,
            Transition.TRANSITION_UNCONFIGURED_SHUTDOWN: self._shutdown,
            Transition.TRANSITION_INACTIVE_SHUTDOWN: self._shutdown,
            Transition.TRANSITION_ACTIVE_SHUTDOWN: self._shutdown,
        }

    def create_publisher(self, *args: Any, **kwargs: Any) -> Publisher:
        """As in any node, without rclpy's own handlers of its events: they only log what diagnostics say of the peers,
        and each is looked at in every turn of the executor.
        """
        kwargs.setdefault("event_callbacks", _NO_PUBLISHER_EVENTS)
        return super().create_publisher(*args, **kwargs)

    def create_subscription(self, *args: Any, **kwargs: Any) -> Subscription:
        """As in any node, with those events alone that are asked for; see :meth:`create_publisher`."""
        kwargs.setdefault("event_callbacks", _NO_SUBSCRIPTION_EVENTS)
        return super().create_subscription(*args, **kwargs)

    # --- to be filled in ---

    async def configure(self) -> None:
        """Load what the work needs, in the worker; then create what others may talk to. May raise anything."""

    def activate(self) -> None:
        """Start working."""

    def deactivate(self) -> None:
        """Stop working; whatever moves is left holding its position."""

    def is_idle(self) -> bool:
        """Whether nothing that ``activate`` allowed is still going on; deactivation waits for it."""
        return True

    def cleanup(self) -> None:
        """Let go of everything that ``configure`` loaded."""

    # --- for subclasses ---

    def say_progress(self, text: str) -> None:
        """What ``configure`` is doing now, for log and diagnostics; from any thread."""
        self._progress = text
        self.get_logger().info(f"configuring: {text}")

    def outlive_activity(self, entity: Any) -> Any:
        """Have an interface made while active (in the place of one of ``configure``'s) stay until ``cleanup``."""
        self._before_activation.add(entity)
        return entity

    def kept_path(self, ending: str, folder: str | None = None) -> Path | None:
        """Where this robot keeps something over a restart, in ``token_folder`` or in ``folder``.

        None if it shall not, and in lock-step.
        """
        found = state_folder(self.parameters["token_folder"] if folder is None else folder)
        if found is None or self.lockstep:
            return None
        return found / self.get_namespace().strip("/") / f"{self.contract.embodiment}{ending}"

    @property
    def lifecycle_state(self) -> str:
        """The state's label, such as ``inactive``."""
        return self._state_machine.current_state[1]

    def all_statuses(self) -> Iterable[Status]:
        state = self.lifecycle_state
        text = state
        if state == "configuring":
            text = f"configuring for {time.monotonic() - self._progress_began:.0f} s: {self._progress or 'starting'}"
        elif self._transition_failure:
            text = f"{state}: {self._transition_failure}"
        level = ERROR if self._transition_failure else _LEVELS.get(state, WARN)
        yield Status("lifecycle", level, text, {"state": state})
        if self.is_configured:
            peers = incompatible_peers(self)
            yield Status("connections", WARN if peers else OK, "; ".join(peers) or "all compatible", gpu_memory())
            yield from self.statuses()

    # --- life of the process ---

    def start(self) -> None:
        if self.parameters["autostart"]:
            assert self.executor is not None
            self.executor.create_task(self._autostart)

    async def _autostart(self) -> None:
        for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
            if (error := await self._change(transition)) is not None:
                raise error

    def stop(self) -> None:
        if self.is_active:
            self.is_active = False
            self.deactivate()

    # --- transitions ---

    async def _on_change_state(
        self, request: ChangeState.Request, response: ChangeState.Response
    ) -> ChangeState.Response:
        possible = {label: number for number, label, *_ in self._state_machine.available_transitions}
        wanted = request.transition.label or request.transition.id
        number = possible.get(wanted) if isinstance(wanted, str) else wanted
        if number is None or number not in self._transitions or number not in possible.values():
            self.get_logger().error(
                f"lifecycle: found a request for {wanted} in state {self.lifecycle_state}; expected one of "
                f"{', '.join(label for label, number in possible.items() if number in self._transitions) or 'none'}"
            )
            return response
        error = await self._change(number)
        if error is not None:
            self.get_logger().error("".join(traceback.format_exception(error)))
            # The frames hold what was half made, such as a model.
            traceback.clear_frames(error.__traceback__)
            _free_memory()
        response.success = error is None
        return response

    async def _change(self, number: int) -> Exception | None:
        """Make one transition; what made it fail, if anything did. Whatever it had begun is undone by then."""
        self._state_machine.trigger_transition_by_id(number, True)
        self._transition_failure = ""
        self.diagnostics.publish()
        error: Exception | None = None
        try:
            await self._transitions[number]()
        except Exception as caught:
            error = caught
            self._transition_failure = f"{self.lifecycle_state} failed: {caught}"
        if error is None:
            self._end_transition(TransitionCallbackReturn.SUCCESS)
        elif number in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
            self._end_transition(TransitionCallbackReturn.FAILURE)
        else:
            self._end_transition(TransitionCallbackReturn.ERROR)
            self._end_transition(TransitionCallbackReturn.SUCCESS)  # of processing the error: all is destroyed
        self.is_active = self.lifecycle_state == "active"
        self.notify()
        self.diagnostics.publish()
        self.get_logger().info(f"lifecycle: {self.lifecycle_state}")
        return error

    def _end_transition(self, outcome: TransitionCallbackReturn) -> None:
        self._state_machine.trigger_transition_by_label(outcome.to_label(), True)

    async def _configure(self) -> None:
        self._progress, self._progress_began = "", time.monotonic()
        self._before_configuration = self._entities()
        try:
            await self.configure()
        except Exception:
            self._release()
            raise
        self.is_configured = True

    async def _activate(self) -> None:
        self._before_activation = self._entities()
        try:
            self.activate()
        except Exception:
            self._destroy_all_but(self._before_activation)
            raise

    async def _deactivate(self) -> None:
        try:
            await self._end_activity()
        except Exception:
            self._release()
            raise

    async def _cleanup(self) -> None:
        self._release()

    async def _shutdown(self) -> None:
        try:
            if self.is_active:
                await self._end_activity()
        finally:
            if self.is_configured:
                self._release()

    async def _end_activity(self) -> None:
        self.is_active = False
        try:
            self.deactivate()
            await self.until(self.is_idle)
        finally:
            self._destroy_all_but(self._before_activation)

    def _release(self) -> None:
        """Back to unconfigured: no interface of the node's own, no job, no model."""
        self.is_configured = False
        self._destroy_all_but(self._before_configuration)
        self.close()
        self.worker = self.new_worker()
        self.cleanup()
        _free_memory()

    def _entities(self) -> set[Any]:
        return {*self.publishers, *self.subscriptions, *self.services, *self.clients, *self.timers}

    def _destroy_all_but(self, kept: set[Any]) -> None:
        kinds: tuple[tuple[Iterator[Any], Callable[[Any], bool]], ...] = (
            (self.publishers, self.destroy_publisher),
            (self.subscriptions, self.destroy_subscription),
            (self.services, self.destroy_service),
            (self.clients, self.destroy_client),
            (self.timers, self.destroy_timer),
        )
        for entities, destroy in kinds:
            for entity in [entity for entity in entities if entity not in kept]:
                destroy(entity)


def _free_memory() -> None:
    """Give back what torch keeps for later on a graphics card."""
    gc.collect()
    torch = torch_with_gpu()
    if torch is not None:
        torch.cuda.empty_cache()
