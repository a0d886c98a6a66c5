"""SIGKILL and SIGSTOP of every node at random times while the simulated robot works, judged at the robot.

Starts the bringup graph as a user does, respawn included. What must hold: nothing moves that no fresh command asked
for, no command comes from an old observation, the E-Token in use never goes back, everything works again at the end,
and neither a process nor shared memory is left.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from benchmarks.graph import Graph, ros
from benchmarks.harness import print_table, save, verdict
from selfalign.msg import ActionChunk
from selfalign_core.command_line import More, command
from selfalign_core.errors import ConfigError
from selfalign_core.robot.contract import RobotContract
from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import to_ns
from selfalign_ros.graph.shared_memory import remove_orphaned_segments
from selfalign_ros.life.parameter_specs import load_specs
from selfalign_ros.life.resources import config_file

WORKING = {
    "policy": ("policy: chunks", "moving"),
    "buffer": ("buffer: lifecycle", "active"),
    "aligner": ("aligner: lifecycle", "active"),
    "robot_sim": ("robot_sim: simulation", ""),
}
"""Per node the line of diagnostics, and its words, that say that it works."""
STOP_S = (0.3, 3.0)
QUICK_TO_ACCEPT = {
    "align_frequency": 2.0, "collect_fit_count": 4, "collect_guard_count": 4, "collect_min_command": 0.0,
    "collect_min_motion": 0.0, "refine_steps": 2, "guard_draws": 2, "guard_sigmas": 0.0, "guard_margin": 0.0,
    "guard_inverse_margin": 0.0, "niceness": 0,
}  # fmt: skip
"""Of the aligner: about every second token passes, so that there are some to be lost."""
START_S = 180.0
RECOVERY_S = 90.0
STILL_RAD_S = 0.2
"""Joint speed that counts as motion; a servo that holds is slower."""
SETTLE_S = 0.6
"""How long the arm may swing after its last command."""
GAP_S = 0.3
"""Without joint states for that long the simulated robot was stopped."""
LAG_S = 0.15
"""How long a servo that goes on may speed up towards the set-point it lagged behind."""
SLACK_S = 0.1


@dataclass(frozen=True)
class SeenCommand:
    """One trajectory, on its way to the robot or as the robot says it follows it; times in ns."""

    sent_ns: int  # by the policy, or when the robot began to follow it
    observed_ns: int  # stamp of the observation it was made from; 0 for a hold, which has none
    end_ns: int  # of its last point

    @property
    def moves(self) -> bool:
        """False for one that says to hold."""
        return self.observed_ns > 0


@dataclass
class Judge:
    """What was commanded, what of it the robot followed by its own word, and how the joints moved."""

    commands: list[SeenCommand] = field(default_factory=list)
    followed: list[SeenCommand] = field(default_factory=list)
    motion: list[tuple[int, float]] = field(default_factory=list)  # stamp ns, fastest joint's speed

    def stale_commands(self, limit_s: float) -> list[SeenCommand]:
        """Those that move and were made from an observation older than ``limit_s`` when they were sent.

        Of those that the judge never heard counts when they were followed.
        """
        known = [*self.commands, *self.unheard()]
        return [c for c in known if c.moves and (c.sent_ns - c.observed_ns) / 1e9 > limit_s]

    def unheard(self) -> list[SeenCommand]:
        """Those that the robot followed and the judge never heard: their publisher died before it could repeat them."""
        heard = {(c.observed_ns, c.end_ns) for c in self.commands}
        return [c for c in self.followed if c.moves and (c.observed_ns, c.end_ns) not in heard]

    def unasked_motion(self) -> list[tuple[int, float]]:
        """Stamps and speeds of motion while no command was followed, nor had been a moment before.

        A command is followed until its last point is due, or until a hold ends it.
        A simulation that was stopped goes on with the momentum it had, and its servos lag behind their set-points.
        After a gap in its reports, braking is no motion of its own. Any later gain in speed is.
        """
        holds = np.sort([c.sent_ns for c in self.followed if not c.moves])
        ends = {c: min([c.end_ns, *holds[np.searchsorted(holds, c.sent_ns) :][:1]]) for c in self.followed if c.moves}
        spans = np.array([[c.sent_ns, end + SETTLE_S * 1e9] for c, end in ends.items()]).reshape(-1, 2)
        unasked: list[tuple[int, float]] = []
        last_ns, last_speed, resumed_ns, braking = 0, 0.0, 0, False
        for stamp_ns, speed in self.motion:
            if stamp_ns - last_ns > GAP_S * 1e9:
                resumed_ns, braking = stamp_ns, True
            braking = braking and (speed <= last_speed or stamp_ns - resumed_ns <= LAG_S * 1e9)
            in_force = ((spans[:, 0] - SLACK_S * 1e9 <= stamp_ns) & (stamp_ns <= spans[:, 1])).any()
            if speed > STILL_RAD_S and not in_force and not braking:
                unasked.append((stamp_ns, speed))
            last_ns, last_speed = stamp_ns, speed
        return unasked


class Listener(Node):
    """Everything that is judged; ``commands``: how the robot's commands are listened to."""

    def __init__(self, contract: RobotContract, commands: QoSProfile | int = 100) -> None:
        super().__init__("faults")
        self.judge = Judge()
        self.versions: list[int] = []
        self.statuses: dict[str, tuple[float, str]] = {}
        self._joints = contract.joint_names
        for topic, heard, profile in (
            (contract.action.topic, self.judge.commands, commands),
            ("followed_command", self.judge.followed, qos.RECENT_EVENTS),
        ):
            hear: Any = partial(_hear_command, heard)  # with what came along with the message
            self.create_subscription(JointTrajectory, topic, hear, profile)
        self.create_subscription(JointState, contract.joint_state_topic, self._on_joints, qos.SENSOR)
        self.create_subscription(ActionChunk, "action_chunk", self._on_chunk, qos.EVENTS)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)

    def is_working(self, name: str, since: float) -> bool:
        """Whether a node has said so after the monotonic time ``since``."""
        status, words = WORKING[name]
        at, message = self.statuses.get(status, (0.0, ""))
        return at > since and words in message

    def _on_joints(self, message: JointState) -> None:
        speed = dict(zip(message.name, message.velocity, strict=False))
        fastest = max(abs(speed[name]) for name in self._joints)
        self.judge.motion.append((to_ns(message.header.stamp), fastest))

    def _on_chunk(self, message: ActionChunk) -> None:
        self.versions.append(message.e_token_version)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.statuses[status.name] = (time.monotonic(), status.message)


def _hear_command(heard: list[SeenCommand], message: JointTrajectory, info: dict[str, Any]) -> None:
    stamp_ns, last, sent_ns = to_ns(message.header.stamp), message.points[-1], info["source_timestamp"]
    # An order to hold has no observation behind it: it counts from when it arrives.
    heard.append(SeenCommand(sent_ns, stamp_ns, (stamp_ns or sent_ns) + to_ns(last.time_from_start)))


class Injection:
    """Seeded faults, one after another, and how long each node took to work again."""

    def __init__(self, graph: Graph, listener: Listener, *, seed: int, gap_s: tuple[float, float]) -> None:
        self._graph, self._listener, self._gap_s = graph, listener, gap_s
        self._rng = np.random.default_rng(seed)
        self._stopped: dict[int, float] = {}  # process id -> when it goes on
        self._recovering: dict[str, float] = {}
        self.kills: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.recoveries: dict[str, list[float]] = defaultdict(list)

    def run(self, kills: int) -> None:
        """Until ``kills`` processes were killed."""
        due = time.monotonic()
        while self.kills.total() < kills:
            self._graph.check()
            self.spin()
            if time.monotonic() >= due and self._inject():
                due = time.monotonic() + self._rng.uniform(*self._gap_s)
        while self._stopped:
            self.spin()

    def spin(self) -> None:
        """Listen, let go on what was stopped long enough, note what works again."""
        rclpy.spin_once(self._listener, timeout_sec=0.05)
        now = time.monotonic()
        for pid in [pid for pid, until in self._stopped.items() if now >= until]:
            del self._stopped[pid]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for name in [name for name, since in self._recovering.items() if self._listener.is_working(name, since)]:
            self.recoveries[name].append(now - self._recovering.pop(name))

    def _inject(self) -> bool:
        name = str(self._rng.choice(sorted(WORKING)))
        pid = self._graph.living().get(name)
        if pid is None or pid in self._stopped:
            return False  # it is being restarted, or stands still
        now = time.monotonic()
        if self._rng.random() < 0.75:
            os.kill(pid, signal.SIGKILL)
            self.kills[name] += 1
            self._recovering[name] = now
        else:
            os.kill(pid, signal.SIGSTOP)
            self.stops[name] += 1
            self._stopped[pid] = now + self._rng.uniform(*STOP_S)
            self._recovering[name] = self._stopped[pid]
        return True


def wait_until_all_work(injection: Injection, listener: Listener, since: float, timeout_s: float) -> list[str]:
    """Nodes that do not work ``timeout_s`` after ``since``."""
    while lacking := [name for name in WORKING if not listener.is_working(name, since)]:
        if time.monotonic() > since + timeout_s:
            return lacking
        injection.spin()
    return []


def run(
    *arguments: Annotated[str, "launch arguments of bringup", More(metavar="name:=value", nargs="*")],
    kills: Annotated[int, "how many; about a third as many stops come on top"] = 50,
    gap: Annotated[tuple[float, float], "seconds", More(metavar=("LEAST", "MOST"))] = (1.0, 8.0),
    inference_limit: Annotated[float, "seconds a chunk may take to be made"] = 0.8,
    seed: int = 0,
    output: Annotated[Path, "folder for faults.json and the log of the graph"] = Path("runs/faults"),
) -> int:
    """SIGKILL and SIGSTOP of every node at random times, judged at the simulated robot."""
    output = output.resolve()
    contract = RobotContract.from_yaml(config_file(str(load_specs("policy")["contract"].default)))
    remove_orphaned_segments()
    output.mkdir(parents=True, exist_ok=True)
    parameters = output / "parameters.yaml"
    # The robot may know a policy that was just started before the judge does: what it has commanded by then is kept.
    name = f"qos_overrides./{contract.action.topic}.publisher"
    latched = {f"{name}.durability": "transient_local", f"{name}.depth": qos.RECENT_EVENTS.depth}
    settings = {"/**/aligner": {"ros__parameters": QUICK_TO_ACCEPT}, "/**/policy": {"ros__parameters": latched}}
    parameters.write_text(yaml.safe_dump(settings))
    log, begin = output / "graph.log", time.monotonic()
    # What the nodes keep survives their restarts.
    with ros(output / "ros_home"), Graph(log, [f"params_file:={parameters}", *arguments]) as graph:
        listener = Listener(contract, qos.RECENT_EVENTS)
        injection = Injection(graph, listener, seed=seed, gap_s=(gap[0], gap[1]))
        if lacking := wait_until_all_work(injection, listener, begin, START_S):
            raise ConfigError(f"{', '.join(lacking)} did not start within {START_S:g} s; see {graph.log}")
        injection.run(kills)
        last = time.monotonic()
        lacking = wait_until_all_work(injection, listener, last, RECOVERY_S)
        recovered_s = time.monotonic() - last
        exit_code = graph.stop()
    judge, versions = listener.judge, listener.versions
    limit_s = contract.max_image_age_s + contract.max_joint_state_age_s + inference_limit
    stale, unasked = judge.stale_commands(limit_s), judge.unasked_motion()
    segments = remove_orphaned_segments(wait=True)
    moved = sum(speed > STILL_RAD_S for _, speed in judge.motion)
    checks = {
        f"no command from an observation older than {limit_s:g} s": not stale,
        "no motion that no command asked for": not unasked,
        "the robot moved between the faults": moved > 0,
        "E-Tokens were accepted, and the one in use never went back": versions[-1:] > [0]
        and all(a <= b for a, b in itertools.pairwise(versions)),
        "everything works again": not lacking,
        "stopped cleanly": exit_code == 0,
        "no process left": not graph.leftovers(),
        "no shared memory left": not segments,
    }
    figures = {
        "seed": seed, "kills": dict(injection.kills), "stops": dict(injection.stops),
        "injection_s": last - begin, "recovery_after_the_last_s": recovered_s,
        "recovery_s": {name: _summary(values) for name, values in injection.recoveries.items()},
        "commands": len(judge.commands), "followed": len(judge.followed), "followed_unheard": len(judge.unheard()),
        "joint_states": len(judge.motion), "joint_states_in_motion": moved,
        "stale_commands_s": [(c.sent_ns - c.observed_ns) / 1e9 for c in stale], "unasked_motion": unasked[:100],
        "segments_left": segments,
        "e_token_versions": [min(versions, default=0), max(versions, default=0)], "checks": checks,
    }  # fmt: skip
    save(output / "faults.json", "faults", **figures)
    print_table(
        ["node", "SIGKILL", "SIGSTOP", "works again after, median s", "longest s"],
        [
            [name, str(injection.kills[name]), str(injection.stops[name]), *_shown(injection.recoveries[name])]
            for name in WORKING
        ],
    )
    print(
        f"{injection.kills.total()} kills, {injection.stops.total()} stops in {last - begin:.0f} s; "
        f"{len(judge.commands)} commands heard, {len(judge.followed)} followed ({len(judge.unheard())} unheard); "
        f"{moved} of {len(judge.motion)} joint states in motion"
    )
    return verdict(checks)


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "longest": max(values), "count": len(values)}


def _shown(values: Sequence[float]) -> list[str]:
    return [f"{np.median(values):.1f}", f"{max(values):.1f}"] if values else ["-", "-"]


main = command("benchmarks.studies.faults", run, interrupted="the log of the graph is kept")

if __name__ == "__main__":
    sys.exit(main())
