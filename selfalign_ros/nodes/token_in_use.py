"""The E-Token that the policy uses: what may take its place, what is refused and why, and what outlives the process.

A token changes only between two inferences, because taking one is a job of the worker that infers. Holds no opinion on
motion: that a refused token makes the robot hold is the policy node's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfalign.msg import EToken as ETokenMsg
from selfalign_core.errors import InputError
from selfalign_core.robot.types import EToken
from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import e_token_from_message, e_token_message
from selfalign_ros.bridge.publishers import Publishers
from selfalign_ros.life.diagnostics import OK, WARN, Complaint, Status
from selfalign_ros.life.kept import KeptFile
from selfalign_ros.life.managed_node import ManagedNode
from selfalign_ros.life.worker import Outcome

if TYPE_CHECKING:
    from selfalign_core.policy import Policy

TOPIC = "e_token"


class TokenInUse:
    """Of the model that ``policy`` returns, which is asked in ``node``'s worker only.

    ``version``: of the token in use. ``refused_version``: of the last one that was refused. ``refusal``: why the newest
    that was heard is not in use; "" if it is, or was forgiven. ``dispute``: why none is taken at all, or "".
    """

    def __init__(self, node: ManagedNode, policy: Callable[[], Policy | None]) -> None:
        self._node, self._policy = node, policy
        self._kept = KeptFile(node.kept_path("_in_use.safetensors"))  # used in the worker only
        self._complaint = Complaint(node.get_logger(), is_error=True, grace_s=0.0)
        self.dispute = ""
        self.forget()

    def forget(self) -> None:
        """As before the first token."""
        self.version, self.refused_version, self.refusal = 0, -1, ""

    def forgive(self) -> None:
        """Go on with the token in use whatever was refused."""
        self.refusal = ""

    # --- in the worker ---

    def restore(self, policy: Policy, max_norm: float) -> None:
        """Use the token that was in use before this process, if there is one that fits ``policy``; else say why not."""
        token = self._kept.read(lambda path: self.read(path, policy, max_norm))
        if token is not None:
            policy.set_e_token(token)
            self._node.get_logger().info(f"E-Token version {token.version} loaded from {self._kept.path}")
        elif self._kept.problem:
            self._node.get_logger().error(self._kept.problem)

    def read(self, path: Path, policy: Policy, max_norm: float) -> EToken:
        """The token in the file ``path``. Raises ``SelfAlignError`` if it does not fit ``policy`` and robot."""
        # Here and below: in the worker it is there by then, with the model; at the top it would delay the start.
        from selfalign_core.policy.token_files import load_e_token

        shape = (0, 0) if policy.e_token is None else policy.e_token.data.shape
        token = load_e_token(path, model_digest=policy.digest, shape=shape)
        self._check(token, policy, max_norm)
        return token

    def _check(self, token: EToken, policy: Policy, max_norm: float) -> None:
        if token.embodiment != self._node.contract.embodiment:
            raise InputError(f"embodiment: found {token.embodiment!r}; expected {self._node.contract.embodiment!r}")
        policy.check_e_token(token, max_norm=max_norm)

    def _swap(self, message: ETokenMsg, max_norm: float) -> EToken | None:
        """Use the message's token; None if it is the one in use. Raises ``InputError`` if it is refused."""
        from selfalign_core.policy.token_files import save_e_token

        policy = self._policy()
        assert policy is not None
        token, current = e_token_from_message(message), policy.e_token
        if current is not None and token.version <= current.version:
            if token.version == current.version and np.array_equal(token.data, current.data):
                return None
            raise InputError(f"version: found {token.version}; expected above {current.version}")
        self._check(token, policy, max_norm)
        policy.set_e_token(token)
        self._kept.write(lambda path: save_e_token(path, token))
        return token

    # --- in the executor ---

    def open(self) -> None:
        """Listen for tokens, and publish the one in use."""
        node = self._node
        latched = qos.LOCKSTEP_LATCHED if node.lockstep else qos.LATCHED
        self._subscription = node.create_subscription(ETokenMsg, TOPIC, self._on_token, **qos.overridable(latched))
        self._publisher = node.create_publisher(ETokenMsg, "policy/e_token_in_use", **qos.overridable(qos.LATCHED))
        self.publishers = Publishers(node, self._subscription.topic_name)
        if not node.lockstep:
            node.create_steady_timer(1.0, self.look_at_publishers)

    def announce(self, token: EToken, stamp: object) -> None:
        """``token`` is in use since ``stamp``, a message."""
        self.version = token.version
        self._publisher.publish(e_token_message(token, stamp))

    def look_at_publishers(self) -> None:
        """With two nodes on the topic nobody can tell whose token is meant: none is taken until one is left."""
        names = self.publishers.names()
        if len(names) > 1:
            self.dispute = (
                f"{self.publishers.topic}: found {len(names)} publishers, {', '.join(names)}; "
                "expected one, no E-Token is taken"
            )
            self._complaint.say(self.dispute)
        elif self.dispute:
            self.dispute = ""
            self._complaint.say("")
            # Subscribing anew brings the latched token of the one that is left.
            qos_profile = self._subscription.qos_profile
            self._node.destroy_subscription(self._subscription)
            self._subscription = self._node.outlive_activity(
                self._node.create_subscription(ETokenMsg, TOPIC, self._on_token, qos_profile)
            )

    def status(self) -> Status:
        """For diagnostics."""
        problem = self.dispute or self.refusal or self._kept.problem
        text = problem or f"version {self.version} in use"
        return Status("e_token", WARN if problem else OK, text, {"version": self.version})

    def _on_token(self, message: ETokenMsg) -> None:
        if not self._node.lockstep and len(self.publishers.names()) > 1:
            self.look_at_publishers()
            return
        max_norm = self._node.parameters["guard_max_norm"]
        self._node.worker.submit(
            lambda: self._swap(message, max_norm), lambda outcome: self._on_swapped(outcome, message)
        )

    def _on_swapped(self, outcome: Outcome[EToken | None], message: ETokenMsg) -> None:
        try:
            token = outcome.result()
        except InputError as error:
            self.refused_version = int(message.version)
            self.refusal = f"E-Token version {message.version} refused: {error}"
            self._node.get_logger().error(self.refusal)
        else:
            self.refusal = ""
            if token is not None:
                self.announce(token, message.header.stamp)
        self._node.arrived(TOPIC)
