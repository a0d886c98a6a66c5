"""Processes that stand still, and one that computes for ten seconds, judged at the robot; kills by the dozen are in
`make faults`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
from graph_assertions import QUICK_ALIGNER
from node_testing import wait_for
from std_srvs.srv import Trigger

from benchmarks.studies.faults import STILL_RAD_S, Judge, Listener, SeenCommand

pytestmark = [pytest.mark.ros, pytest.mark.long]

CHUNKS = "policy: chunks"
MAX_AGE_S = 1.0


@pytest.fixture(scope="module")
def listener(graph, probe) -> Iterator[Listener]:
    """The four nodes, once for all tests of this file, and who judges them."""
    from selfalign_core.robot.contract import RobotContract

    path = graph.contract(max_age_s=MAX_AGE_S)
    listener = Listener(RobotContract.from_yaml(path))
    probe._executor.add_node(listener)
    for kind in ("robot_sim", "policy", "buffer"):
        graph.start(kind, contract=path)
    graph.start("aligner", contract=path, **QUICK_ALIGNER)
    probe.wait_for_status(CHUNKS, "moving")
    wait_for(lambda: listener.judge.commands, "commands are heard")
    listener.judge.motion.clear()  # what came of commands that nobody heard yet
    yield listener
    listener.destroy_node()


def assert_safe(listener: Listener) -> None:
    # An age limit for what is observed, one for the joints, and a chunk's length: later than that nothing is executed.
    assert not listener.judge.stale_commands(2 * MAX_AGE_S + 0.8)
    assert not listener.judge.unasked_motion()


def count(probe, name: str, key: str) -> int:
    return int({v.key: v.value for v in probe.status(name).values}[key])


def more_chunks(listener: Listener, enough: int) -> None:
    start = len(listener.versions)
    wait_for(lambda: len(listener.versions) >= start + enough, f"{enough} more chunks")


@pytest.mark.parametrize("kind", ["robot_sim", "policy"])
def test_a_stopped_robot_or_policy_ends_the_motion_until_it_goes_on(probe, graph, listener, kind: str) -> None:
    probe.wait_for_status(CHUNKS, "moving")
    graph.nodes[kind].send(signal.SIGSTOP)
    if kind == "robot_sim":
        probe.wait_for_status(CHUNKS, "holding", "found age")
    else:
        beats = probe.status_counts["robot_sim: simulation"]
        wait_for(lambda: probe.status_counts["robot_sim: simulation"] >= beats + 3, "the robot is left to itself")
        assert all(speed < STILL_RAD_S for _, speed in list(listener.judge.motion)[-10:])
    graph.nodes[kind].send(signal.SIGCONT)
    more_chunks(listener, 3)
    probe.wait_for_status(CHUNKS, "moving")
    assert_safe(listener)


@pytest.mark.parametrize("kind", ["aligner", "buffer"])
def test_the_policy_does_not_notice_that_its_neighbours_stand_still(probe, graph, listener, kind: str) -> None:
    more_chunks(listener, 1)
    probe.wait_for_diagnostics(CHUNKS, 2)  # the first may be older than what the test before has done
    holds = count(probe, CHUNKS, "holds")
    graph.nodes[kind].send(signal.SIGSTOP)
    more_chunks(listener, 5)
    graph.nodes[kind].send(signal.SIGCONT)
    beats = probe.status_counts[f"{kind}: lifecycle"]
    wait_for(lambda: probe.status_counts[f"{kind}: lifecycle"] > beats, "it goes on")
    probe.wait_for_diagnostics(CHUNKS, 1)
    assert count(probe, CHUNKS, "holds") == holds
    rounds = count(probe, "aligner: align", "rounds")
    wait_for(lambda: count(probe, "aligner: align", "rounds") > rounds, "rounds go on")
    assert_safe(listener)


def test_an_align_call_of_ten_seconds_holds_nobody_up(probe, listener) -> None:
    from selfalign.msg import AlignReport

    probe.listen(AlignReport, "align_report", 100)
    probe.wait_for_status(CHUNKS, "moving")
    assert probe.set_parameter("aligner", "refine_budget_ms", 10000.0).successful
    assert probe.set_parameter("aligner", "refine_steps", 10000).successful
    answers: list[Trigger.Response] = []

    def is_running() -> bool:
        """Rarer than the rounds of the timer, which else would never be the one that has enough transitions."""
        time.sleep(1.0)
        answers.append(probe.call(Trigger, "aligner/align_now", Trigger.Request()))
        return answers[-1].message.startswith("a round is running")

    wait_for(is_running, "a round that is still running")
    assert not answers[-1].success  # it answers meanwhile
    holds, chunks = count(probe, CHUNKS, "holds"), len(listener.versions)
    report = wait_for(
        lambda: [r for r in list(probe.messages["align_report"]) if r.attempt_duration >= 10.0], "an attempt that long"
    )[-1]  # of one round, or of one that fitted and one that judged
    assert report.attempted
    probe.wait_for_diagnostics(CHUNKS, 1)
    assert count(probe, CHUNKS, "holds") == holds and len(listener.versions) > chunks
    assert_safe(listener)


def test_what_the_judge_calls_stale_and_unasked() -> None:
    second = 1_000_000_000
    fresh = SeenCommand(sent_ns=10 * second, observed_ns=10 * second - 200_000_000, end_ns=11 * second)
    late = SeenCommand(sent_ns=20 * second, observed_ns=17 * second, end_ns=21 * second)
    hold = SeenCommand(sent_ns=30 * second, observed_ns=0, end_ns=40 * second)
    still = [(int(at * second / 10), 0.1) for at in range(90, 360)]  # ten reports per second, and motion in some
    motion = {10.5: 1.0, 13.0: 1.0, 35.0: 1.0}
    sent = [fresh, late, hold]
    judge = Judge(sent, sent, [(stamp, motion.get(stamp / second, speed)) for stamp, speed in still])
    assert judge.stale_commands(1.0) == [late]
    assert judge.unasked_motion() == [(13 * second, 1.0), (35 * second, 1.0)]
    # A hold ends what was commanded before it.
    cut = SeenCommand(sent_ns=10 * second + 100_000_000, observed_ns=0, end_ns=11 * second)
    on = [(int(at * second / 10), 1.0 if at >= 100 else 0.1) for at in range(98, 110)]
    assert Judge(followed=[fresh], motion=on).unasked_motion() == []
    assert Judge(followed=[fresh, cut], motion=on).unasked_motion() == on[10:]
    # The robot's word counts, not what was heard on the way to it: what it never followed explains no motion, and what
    # it followed unheard does, but may not be stale.
    assert Judge(commands=[fresh], motion=on).unasked_motion() == on[2:]
    assert Judge(followed=[fresh, late]).unheard() == [fresh, late]
    assert Judge([fresh], [fresh, late]).stale_commands(1.0) == [late]
    # A robot that stood still for a while may brake, and not gain speed: that would be an old set-point.
    resumed = [(int(at * second), speed) for at, speed in ((50.0, 1.0), (50.1, 0.6), (50.2, 0.7), (50.3, 0.5))]
    assert Judge(followed=[fresh], motion=[*still, *resumed]).unasked_motion() == resumed[2:]
