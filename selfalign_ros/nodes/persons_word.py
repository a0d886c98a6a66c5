"""What a person says to the policy node: stop and go on, enable, calibrate. Every word is a service.

A stop lasts until it is cleared, over a restart, too. What follows from a word is for motion to say.
"""

from __future__ import annotations

from rclpy.parameter import Parameter
from std_srvs.srv import SetBool, Trigger

from selfalign_core.robot.clocks import Now
from selfalign_core.robot.frames import Selection
from selfalign_core.robot.motion import INACTIVE, Calibrate, EndCalibration, Event, Motion, Order, Seen, Word
from selfalign_ros.life.kept import StopLatch
from selfalign_ros.life.managed_node import ManagedNode
from selfalign_ros.life.resources import STATE_FOLDER
from selfalign_ros.nodes.token_in_use import TokenInUse


class MovingNode(ManagedNode):
    """What a person speaks to: a node that moves a robot as ``motion`` says."""

    motion: Motion
    token: TokenInUse

    def now(self) -> Now:
        """Both clocks."""
        raise NotImplementedError

    def see(self, now_ns: int) -> tuple[Selection | None, Seen | str]:
        """What is to be acted on now, or why nothing is."""
        raise NotImplementedError

    def on(self, event: Event, now: Now | None = None) -> Order:
        """Something has happened, by default now: do what motion says."""
        raise NotImplementedError


class PersonsWord:
    """The services of ``node``; nobody has a say in lock-step, where nothing moves."""

    def __init__(self, node: MovingNode) -> None:
        self._node = node
        # Whatever becomes of the tokens, a stop is kept.
        self.stop = StopLatch(node.kept_path(".stopped", STATE_FOLDER))
        if not node.lockstep:
            # There in every state: a stop can be asked for at any time.
            node.create_service(Trigger, "~/stop", self.on_stop)
            node.create_service(Trigger, "~/clear_stop", self.on_clear_stop)
            node.create_service(SetBool, "~/enable", self.on_enable)

    def open(self) -> None:
        """Offer what a configured node can do."""
        if not self._node.lockstep:
            self._node.create_service(Trigger, "~/calibrate", self.on_calibrate)
            self._node.create_service(Trigger, "~/end_calibration", self.on_end_calibration)

    @property
    def against(self) -> str:
        """Why the robot may not move; "" if it may."""
        if self.stop.reason or self._node.lockstep:
            return self.stop.reason
        return "" if self._node.parameters["enable"] else "disabled: the parameter enable is false"

    def tell(self) -> None:
        """Motion hears what holds now."""
        if self._node.is_active:
            self._node.on(Word(self.against))

    def _why_not(self) -> str:
        """Why the robot does not move; "" if it does."""
        if not self._node.is_active:
            return INACTIVE
        seen = self._node.see(self._node.now().ros_ns)[1]
        return self.against or (seen if isinstance(seen, str) else "")

    def on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        (result,) = self._node.set_parameters([Parameter("enable", value=request.data)])
        response.success, response.message = result.successful, result.reason
        if result.successful:
            reason = self._why_not()
            response.message = f"holding: {reason}" if reason else "moving"
        return response

    def on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            self.stop.set()
            response.success, response.message = True, "holding until ~/clear_stop is called"
        except OSError as error:
            response.message = f"holding, but not after a restart: {error}"
        self.tell()
        self._node.get_logger().warning(self.stop.reason)
        return response

    def on_clear_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            self.stop.clear()
        except OSError as error:
            response.message = f"still stopped: {error}"
            return response
        self._node.token.forgive()
        self.tell()
        response.success, response.message = True, self._why_not() or "moving"
        self._node.get_logger().warning(f"stop cleared: {response.message}")
        return response

    def on_calibrate(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        now, parameters = self._node.now(), self._node.parameters
        wanted = Calibrate(
            self._node.see(now.ros_ns)[1],
            around=parameters["calibrate_around"],
            duration_s=parameters["calibrate_duration"],
            amplitude=parameters["calibrate_amplitude"],
            seed=parameters["seed"],
        )
        refusal = self._node.on(wanted, now).refusal
        calibration = self._node.motion.calibration
        if refusal or calibration is None:
            response.message = f"refused: {refusal}"
        else:
            response.success, response.message = True, f"moving for {calibration.duration_s:g} s"
            self._node.get_logger().info(f"calibration motion: {response.message}")
        return response

    def on_end_calibration(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """A motion that is still on its way home gets there first."""
        refusal = self._node.on(EndCalibration()).refusal
        since = "again" if self._node.motion.calibration is None else "from home on"
        response.success = not refusal
        response.message = f"refused: {refusal}" if refusal else f"the policy has the robot {since}"
        return response
