"""What the soak measures: memory that grows is found and memory that settles is not, holds are counted and named."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from node_testing import wait_for

from benchmarks.harness import MIB
from benchmarks.studies.soak import GROWTH_LIMIT_MIB, WARM_UP_S, Listener, growth, series

BEGIN, END = 1000.0, 1000.0 + 3600.0


def samples(mib) -> list[tuple[float, int]]:
    """Memory, in MiB a function of the seconds since the begin, once per second."""
    return [(BEGIN + second, round(mib(second) * MIB)) for second in range(3600)]


def test_what_grows_after_the_warm_up_is_found_however_slowly() -> None:
    leak = growth(samples(lambda s: 100 + 12 * s / 3600), BEGIN, END)
    assert not leak["flat"] and leak["slope_mib_per_hour"] == pytest.approx(12, rel=1e-3)
    step = growth(samples(lambda s: 100 if s < 3000 else 101 + GROWTH_LIMIT_MIB), BEGIN, END)
    assert not step["flat"] and step["growth_mib"] == pytest.approx(1 + GROWTH_LIMIT_MIB)


def test_what_settles_in_the_warm_up_or_comes_and_goes_is_flat() -> None:
    warm = growth(samples(lambda s: min(s, WARM_UP_S - 1) * 5), BEGIN, END)
    assert warm["flat"] and warm["growth_mib"] == 0
    waves = growth(samples(lambda s: 100 + 4 * np.sin(s / 50)), BEGIN, END)
    assert waves["flat"]
    freed = growth(samples(lambda s: 100 - s / 100), BEGIN, END)
    assert freed["flat"] and freed["growth_mib"] < 0


def test_the_series_has_a_row_for_ten_samples() -> None:
    rows = np.array(series(samples(lambda s: s), BEGIN))
    np.testing.assert_allclose(rows[:3], [[4.5, 4.5], [14.5, 14.5], [24.5, 24.5]])
    assert len(rows) == 360


@pytest.fixture
def listener(ros_domain: int) -> Iterator[Listener]:
    rclpy.init(args=[])
    listener = Listener()
    yield listener
    listener.destroy_node()
    rclpy.try_shutdown()


def test_holds_after_the_warm_up_are_counted_with_the_last_ones_reason(listener: Listener) -> None:
    publisher = listener.create_publisher(DiagnosticArray, "/diagnostics", 100)

    def say(name: str, **values: object) -> None:
        pairs = [KeyValue(key=key.replace("_", " "), value=str(value)) for key, value in values.items()]
        publisher.publish(DiagnosticArray(status=[DiagnosticStatus(name=f"sim_arm/{name}", values=pairs)]))

    def heard(count: int) -> bool:
        rclpy.spin_once(listener, timeout_sec=0.1)
        return len(listener.values) >= count

    wait_for(lambda: publisher.get_subscription_count() > 0, "the soak listens")
    say("policy: chunks", chunks=5, late_chunks=1, holds=2, last_hold="starting")
    wait_for(lambda: heard(1), "the first values")
    warm = listener.values[0][0]
    assert (listener.count("chunks", warm), listener.count("holds", warm), listener.last_holds(warm)) == (0, 0, [])
    say("aligner: rounds", rounds=1)
    for holds, reason in ((2, "starting"), (3, "late chunk"), (3, "late chunk"), (5, "stale camera")):
        say("policy: chunks", chunks=9, late_chunks=2, holds=holds, last_hold=reason)
    wait_for(lambda: heard(5), "all values")
    assert [listener.count(name, warm) for name in ("chunks", "late chunks", "holds")] == [4, 1, 3]
    assert listener.count("holds") == 5
    found = [(row["holds"], row["last"]) for row in listener.last_holds(warm)]
    assert found == [(1, "late chunk"), (2, "stale camera")]
