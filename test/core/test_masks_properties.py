"""Masks, positions and the alignment layout over random lengths, against nested loops over the table of the design."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfalign_core.model.layout import AlignmentLayout
from selfalign_core.model.masks import (
    MASK_FILL,
    additive_mask,
    block_starts,
    make_att_2d_masks,
    make_position_ids,
    prefix_att_2d_mask,
    suffix_over_prefix_mask,
)

# Rows attend to columns.
TABLE = {
    "prefix": {"prefix": True, "E": False, "perception": False, "dynamics": False, "inverse": False},
    "E": {"prefix": True, "E": True, "perception": False, "dynamics": False, "inverse": False},
    "perception": {"prefix": True, "E": True, "perception": True, "dynamics": False, "inverse": False},
    "dynamics": {"prefix": True, "E": True, "perception": True, "dynamics": True, "inverse": False},
    "inverse": {"prefix": True, "E": True, "perception": True, "dynamics": False, "inverse": True},
}

lengths = st.integers(1, 6)
layouts = st.builds(
    AlignmentLayout,
    e_tokens=st.integers(0, 4),
    actions=lengths,
    next_obs=lengths,
    perception_tokens=st.integers(1, 3),
)


@st.composite
def padded(draw, *, prefix: bool = False):
    """(B, N) pad masks and block flags; flags of a prefix are all zero."""
    batch, count = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    bits = st.lists(st.booleans(), min_size=count, max_size=count)
    pads = [draw(bits) for _ in range(batch)]
    flags = [[False] * count if prefix else draw(bits) for _ in range(batch)]
    return torch.tensor(pads), torch.tensor(flags)


def names_of(layout: AlignmentLayout) -> list[str]:
    """What each token is, written out in the order of the design."""
    return (
        ["E"] * layout.e_tokens
        + ["perception"] * layout.perception_tokens
        + ["dynamics"] * (layout.actions + layout.next_obs)
        + ["inverse"] * (layout.next_obs + layout.actions)
    )


@given(padded())
def test_block_mask_equals_the_rule_token_by_token(masks) -> None:
    pads, flags = masks
    found = make_att_2d_masks(pads, flags)
    for b in range(len(pads)):
        for query in range(pads.shape[1]):
            for key in range(pads.shape[1]):
                blocks = [sum(flags[b, : i + 1].tolist()) for i in (query, key)]
                expected = blocks[1] <= blocks[0] and bool(pads[b, query]) and bool(pads[b, key])
                assert found[b, query, key] == expected
    assert found.dtype == torch.bool
    assert torch.equal(found, make_att_2d_masks(pads, flags.float()))


@given(padded())
def test_positions_count_real_tokens(masks) -> None:
    pads, _ = masks
    found = make_position_ids(pads)
    for b, row in enumerate(pads.tolist()):
        for i in range(len(row)):
            assert found[b, i] == sum(row[: i + 1]) - 1


@given(st.lists(st.integers(0, 4), max_size=5))
def test_block_starts_mark_the_first_of_each_block(blocks: list[int]) -> None:
    expected = [i == 0 for count in blocks for i in range(count)]
    assert block_starts(*blocks).tolist() == expected


@given(padded(prefix=True), st.integers(0, 9), st.booleans())
def test_prefix_mask_hides_the_prompt_from_images_only_if_asked(masks, images: int, restrict: bool) -> None:
    pads, _ = masks
    images = min(images, pads.shape[1])
    found = prefix_att_2d_mask(pads, images, restrict_image_to_language=restrict)
    for b in range(len(pads)):
        for query in range(pads.shape[1]):
            for key in range(pads.shape[1]):
                hidden = restrict and query < images <= key
                assert found[b, query, key] == (bool(pads[b, query] and pads[b, key]) and not hidden)


@given(layouts)
def test_segments_tile_the_suffix_in_order(layout: AlignmentLayout) -> None:
    order = ("e", "perception", "dynamics_actions", "dynamics_next_obs", "inverse_next_obs", "inverse_actions")
    counts = (layout.e_tokens, layout.perception_tokens, layout.actions, layout.next_obs, layout.next_obs,
              layout.actions)  # fmt: skip
    begin = 0
    for name, count in zip(order, counts, strict=True):
        assert getattr(layout, name) == slice(begin, begin + count), name
        begin += count
    assert layout.length == begin
    assert layout.dynamics == slice(layout.dynamics_actions.start, layout.dynamics_next_obs.stop)
    assert layout.inverse == slice(layout.inverse_next_obs.start, layout.inverse_actions.stop)


@given(layouts)
def test_suffix_mask_is_the_table(layout: AlignmentLayout) -> None:
    names, found = names_of(layout), layout.attention_mask()
    assert found.shape == (len(names), len(names))
    for i, query in enumerate(names):
        for j, key in enumerate(names):
            assert found[i, j] == TABLE[query][key], f"{query} → {key}"


@given(layouts, st.integers(1, 8))
def test_no_clean_label_travels_through_any_number_of_layers(layout: AlignmentLayout, layers: int) -> None:
    """What reaches a token after several layers is the mask's transitive closure."""
    reach = np.linalg.matrix_power(layout.attention_mask().numpy().astype(np.int64), layers) > 0
    assert not reach[layout.dynamics, layout.inverse].any()
    assert not reach[layout.inverse, layout.dynamics].any()
    assert not reach[layout.perception, layout.dynamics.start :].any()
    assert not reach[layout.e, layout.perception.start :].any()
    assert reach[:, layout.e].all()
    assert reach[layout.perception.start :, layout.perception].all()


@given(layouts, padded(prefix=True), st.data())
def test_rows_over_the_prefix_are_the_table_too(layout: AlignmentLayout, masks, data) -> None:
    prefix_pads, _ = masks
    batch, prefix, count = *prefix_pads.shape, layout.length
    bits = st.lists(st.booleans(), min_size=count, max_size=count)
    pads = torch.tensor([data.draw(bits) for _ in range(batch)])
    real = pads[:, None, :] & pads[:, :, None]
    found = suffix_over_prefix_mask(prefix_pads, pads, layout.attention_mask() & real)
    names = ["prefix"] * prefix + names_of(layout)
    assert found.shape == (batch, count, prefix + count)
    for b in range(batch):
        for i in range(count):
            for j in range(prefix + count):
                key_real = bool(prefix_pads[b, j]) if j < prefix else bool(pads[b, j - prefix])
                query_real = j < prefix or bool(pads[b, i])  # what a padded row reads of the prefix is never used
                assert found[b, i, j] == (TABLE[names[prefix + i]][names[j]] and key_real and query_real)


@given(layouts, st.integers(1, 3))
def test_assembling_puts_every_segment_in_its_place(layout: AlignmentLayout, batch: int) -> None:
    places = ("perception", "dynamics_actions", "dynamics_next_obs", "inverse_next_obs", "inverse_actions")
    values = dict(zip(("e", *places), range(1, 7), strict=True))

    def segment(name: str) -> torch.Tensor:
        place = getattr(layout, name)
        return torch.full((batch, place.stop - place.start, 2), float(values[name]))

    e = segment("e") if layout.e_tokens else None
    whole = layout.assemble(e=e, **{name: segment(name) for name in places})
    assert whole.shape == (batch, layout.length, 2)
    for name, value in values.items():
        assert (whole[:, getattr(layout, name)] == value).all(), name
    too_long = {name: segment(name) for name in places} | {"inverse_actions": torch.zeros(batch, layout.actions + 1, 2)}
    with pytest.raises(ValueError, match="inverse_actions: found"):
        layout.assemble(e=e, **too_long)


@pytest.mark.parametrize(
    "change", [{"e_tokens": -1}, {"actions": 0}, {"next_obs": 0}, {"perception_tokens": 0}], ids=lambda c: next(iter(c))
)
def test_an_empty_segment_is_refused_by_name(change: dict) -> None:
    with pytest.raises(ValueError, match=f"AlignmentLayout.{next(iter(change))}: found"):
        AlignmentLayout(**{"e_tokens": 1, "actions": 2, "next_obs": 2, **change})


def test_wrong_mask_shapes_are_refused_by_name() -> None:
    real = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"att_masks: found shape \(2, 4\), expected pad_masks' \(2, 3\)"):
        make_att_2d_masks(real, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="pad_masks: found 1 dimensions, expected 2"):
        make_att_2d_masks(real[0], real)


def test_a_fully_masked_row_is_uniform_not_nan() -> None:
    mask = additive_mask(torch.zeros(1, 2, 4, dtype=torch.bool), torch.float32)
    assert mask.shape == (1, 1, 2, 4)
    weights = torch.softmax(mask, dim=-1)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))
    half = additive_mask(torch.tensor([[[True, False]]]), torch.bfloat16)
    assert torch.isfinite(half).all()
    assert half[0, 0, 0].tolist() == [0.0, pytest.approx(MASK_FILL, rel=0.01)]
