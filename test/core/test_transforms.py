"""Robot numbers to model numbers and back: every transform has an inverse, and openpi's formulas hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from selfalign_core.errors import CheckpointError, InputError
from selfalign_core.policy.statistics_files import load_norm_stats, save_norm_stats
from selfalign_core.policy.transforms import Normalizer, NormStats, pad_to_dim, to_absolute, to_delta

DIM = 3
STATS = NormStats(
    mean=np.array([0.0, 10.0, -2.0]), std=np.array([1.0, 5.0, 0.1]), q01=np.array([-2.0, 0.0, -2.3]),
    q99=np.array([2.0, 20.0, -1.7]), min=np.array([-3.0, -1.0, -3.0]), max=np.array([3.0, 30.0, -1.0]),
)  # fmt: skip

numbers = st.floats(-100, 100, width=32)
vectors = arrays(np.float32, (4, DIM), elements=numbers)


@pytest.mark.parametrize("mode", ["identity", "z_score", "quantile"])
@given(vectors)
def test_unnormalising_undoes_normalising(mode: str, x: np.ndarray) -> None:
    normalizer = Normalizer(STATS, mode)
    there = normalizer.normalize(x)
    assert there.dtype == np.float32
    np.testing.assert_allclose(normalizer.unnormalize(there), x, rtol=1e-4, atol=1e-3)


def test_formulas_are_openpis() -> None:
    x = np.array([[1.0, 15.0, -2.0]], np.float32)
    expected = (x - STATS.mean) / (STATS.std + 1e-6)
    np.testing.assert_allclose(Normalizer(STATS, "z_score").normalize(x), expected, rtol=1e-6)
    expected = (x - STATS.q01) / (STATS.q99 - STATS.q01 + 1e-6) * 2 - 1
    np.testing.assert_allclose(Normalizer(STATS, "quantile").normalize(x), expected, rtol=1e-5, atol=1e-6)
    ends = Normalizer(STATS, "quantile")
    np.testing.assert_allclose(ends.normalize(STATS.q01), -1, atol=1e-5)
    np.testing.assert_allclose(ends.normalize(STATS.q99), 1, atol=1e-5)
    np.testing.assert_array_equal(Normalizer(None, "identity").normalize(x), x)


def test_formulas_are_lerobots_where_its_epsilon_is_given() -> None:
    """As its NormalizerProcessorStep has them, with an epsilon that is large enough to be seen."""
    eps, x = 0.5, np.array([[1.0, 15.0, -2.0]], np.float32)
    z_score = Normalizer(STATS, "z_score", eps)
    np.testing.assert_allclose(z_score.normalize(x), (x - STATS.mean) / (STATS.std + eps), rtol=1e-6)
    np.testing.assert_allclose(z_score.unnormalize(x), x * STATS.std + STATS.mean, rtol=1e-6)
    low, high = np.array([1.0, 2.0]), np.array([1.0, 4.0])
    quantile = Normalizer(NormStats(low, low, low, high), "quantile", eps)
    np.testing.assert_allclose(quantile.normalize(np.array([1.5, 3.0])), [1.0, 0.0])
    np.testing.assert_allclose(quantile.unnormalize(np.array([1.0, 0.0])), [1.5, 3.0])


@pytest.mark.parametrize("where", [0.0, 1.57, -300.0])
def test_a_constant_dimension_is_the_lower_end_wherever_it_lies(where: float) -> None:
    value = np.array([where], np.float32)
    normalizer = Normalizer(NormStats(value, np.zeros(1), value, value), "quantile")
    np.testing.assert_array_equal(normalizer.normalize(value), [-1.0])  # openpi and LeRobot
    np.testing.assert_array_equal(normalizer.unnormalize(np.array([-1.0], np.float32)), value)


def test_a_constant_dimension_stays_finite() -> None:
    stats = NormStats(np.zeros(2), np.zeros(2), np.ones(2), np.ones(2))
    for mode in ("z_score", "quantile"):
        there = Normalizer(stats, mode).normalize(np.ones((1, 2), np.float32))
        assert np.isfinite(there).all()
        np.testing.assert_allclose(Normalizer(stats, mode).unnormalize(there), 1, atol=1e-5)


@pytest.mark.parametrize("states", [2, 3, 5])
def test_states_need_not_be_as_many_as_actions(states: int) -> None:
    state, actions = np.arange(1, states + 1, dtype=np.float32), np.zeros((4, DIM), np.float32)
    relative = to_delta(actions, state, np.array([True, True, False]))
    np.testing.assert_array_equal(relative, np.tile([[-1.0, -2.0, 0.0]], (4, 1)))
    np.testing.assert_array_equal(to_absolute(relative, state, np.array([True, True, False])), actions)


@given(arrays(np.float32, (2, 5, DIM), elements=numbers), arrays(np.float32, (2, DIM), elements=numbers),
       st.lists(st.booleans(), min_size=DIM, max_size=DIM))  # fmt: skip
def test_absolute_undoes_delta(actions: np.ndarray, state: np.ndarray, mask: list[bool]) -> None:
    relative = to_delta(actions, state, np.array(mask))
    np.testing.assert_allclose(to_absolute(relative, state, np.array(mask)), actions, atol=1e-4)
    for dim, delta in enumerate(mask):
        expected = actions[..., dim] - (state[:, None, dim] if delta else 0)
        np.testing.assert_array_equal(relative[..., dim], expected)


@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=numbers), st.integers(1, 8))
def test_padding_adds_zeros_at_the_end(x: np.ndarray, dim: int) -> None:
    if dim < x.shape[-1]:
        with pytest.raises(InputError, match=f"found a vector of {x.shape[-1]}, expected at most the model's {dim}"):
            pad_to_dim(x, dim)
        return
    padded = pad_to_dim(x, dim)
    assert padded.dtype == x.dtype
    np.testing.assert_array_equal(padded[:, : x.shape[-1]], x)
    assert not padded[:, x.shape[-1] :].any()


@given(arrays(np.float64, (30, 2), elements=st.floats(-10, 10)))
def test_statistics_of_data(values: np.ndarray) -> None:
    stats = NormStats.of(values)
    np.testing.assert_allclose(stats.mean, values.mean(0), atol=1e-5)
    np.testing.assert_allclose(stats.std, values.std(0), atol=1e-5)
    assert (stats.min - 1e-5 <= stats.q01).all() and (stats.q01 <= stats.q99).all()
    assert (stats.q99 <= stats.max + 1e-5).all()


# ---------------------------------------------------------------- files


def same(a: NormStats, b: NormStats) -> None:
    for name, value in a.to_dict().items():
        np.testing.assert_allclose(getattr(b, name), value, err_msg=name)


def test_saved_statistics_are_openpis_file_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "norm_stats.json"
    save_norm_stats(file, {"state": STATS, "actions": STATS})
    assert set(json.loads(file.read_text())["norm_stats"]) == {"state", "actions"}
    for stats in load_norm_stats(file).values():
        same(STATS, stats)


def test_lerobots_json_and_safetensors_are_read(tmp_path: Path) -> None:
    raw = STATS.to_dict()
    names = {"observation.state": raw, "action": raw, "observation.images.front": {"mean": [[[0.5]]]}}
    (tmp_path / "stats.json").write_text(json.dumps(names))
    flat = {f"{n}.{k}": np.array(v, np.float32) for n, s in names.items() for k, v in s.items()}
    save_file(flat, tmp_path / "stats.safetensors")
    for file in ("stats.json", "stats.safetensors"):
        found = load_norm_stats(tmp_path / file)
        assert set(found) == {"state", "actions"}
        same(STATS, found["actions"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"found invalid JSON \(Expecting .* expected normalisation statistics"),
        ("[1]", "found no table of statistics"),
        ('{"norm_stats": {"state": 3}}', r"state: missing \['mean', 'std'\]"),
        ("{}", "found statistics of"),
        (json.dumps({"norm_stats": {"state": {"mean": [0], "std": [1]}}}), r"expected one of \('actions', 'action'\)"),
        (json.dumps({"state": {"mean": [0]}, "actions": {"mean": [0], "std": [1]}}), r"state: missing \['std'\]"),
    ],
)
def test_a_statistics_file_that_lacks_something_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "norm_stats.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=rf"norm_stats\.json: .*{message}"):
        load_norm_stats(file)


@pytest.mark.parametrize("name", ["norm_stats.json", "stats.safetensors"])
def test_an_absent_or_broken_statistics_file_is_named(tmp_path: Path, name: str) -> None:
    for content in (None, b"", b"\xff\xfe"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}: found .*expected normalisation statistics"):
            load_norm_stats(tmp_path / name)


def test_bad_statistics_are_named() -> None:
    with pytest.raises(InputError, match=r"NormStats\.std: found .*finite"):
        NormStats(np.zeros(2), np.array([1, np.nan]))
    with pytest.raises(InputError, match=r"NormStats\.q01: found \(3,\), expected mean's \(2,\)"):
        NormStats(np.zeros(2), np.ones(2), q01=np.zeros(3))
    with pytest.raises(InputError, match="found 'min_max', expected identity, z_score or quantile"):
        Normalizer(STATS, "min_max")
    with pytest.raises(InputError, match="found no statistics"):
        Normalizer(None, "z_score")
    with pytest.raises(InputError, match="without q01 and q99"):
        Normalizer(NormStats(np.zeros(2), np.ones(2)), "quantile")
    with pytest.raises(InputError, match="found a vector of 2, expected 3"):
        Normalizer(STATS, "z_score").normalize(np.zeros((1, 2), np.float32))
    with pytest.raises(CheckpointError, match="without min and max"):
        NormStats(np.zeros(2), np.ones(2)).over_range("stats.json")
