"""Prompts as π0 and π0.5 were trained to read them; a prompt that cannot be written that way is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from selfalign_core.errors import CheckpointError, InputError
from selfalign_core.policy.tokenizer import PromptTokenizer, load_tokenizer, word_tokenizer

WORDS = ("pick", "up", "the", "red", "cube")


class Letters:
    """Stands in for a tokenizer: one id per character, so that the written text can be read back."""

    def token_to_id(self, token: str) -> int | None:
        return 1 if token == "<bos>" else None

    def encode(self, text: str, *, add_special_tokens: bool):
        assert not add_special_tokens
        return type("Encoding", (), {"ids": [ord(c) for c in text], "tokens": list(text)})()


def written(prompt: str, state: np.ndarray | None = None, *, pi05: bool) -> str:
    ids, mask = PromptTokenizer(Letters(), max_len=300, pi05=pi05)(prompt, state)
    assert ids[0] == 1
    return "".join(map(chr, ids[mask][1:]))


def test_pi0_writes_the_task_and_a_newline() -> None:
    assert written("pick up the cube", pi05=False) == "pick up the cube\n"
    assert written("  pick_up\nthe cube ", np.zeros(2), pi05=False) == "pick up the cube\n"


def test_pi05_writes_the_state_in_256_bins() -> None:
    state = np.array([-1.0, 0.0, 0.999, 1.0, -0.5], np.float32)
    assert written("pick_up ", state, pi05=True) == "Task: pick up, State: 0 128 255 255 64;\nAction: "


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8))
def test_bins_divide_the_range_evenly(state: list[float]) -> None:
    text = written("x", np.array(state, np.float32), pi05=True)
    found = [int(n) for n in text.split("State: ")[1].split(";")[0].split()]
    assert found == [min(int(np.floor(value * 128)) + 128, 255) for value in state]


def test_a_state_outside_the_quantiles_is_clipped_to_the_outer_bins() -> None:
    assert "State: -1 255;" in written("x", np.array([-3.0, 3.0]), pi05=True)  # openpi's digits for both


def test_ids_are_padded_on_the_right_with_zeros() -> None:
    tokenizer = word_tokenizer(WORDS)
    ids, mask = PromptTokenizer(tokenizer, max_len=8, pi05=False)("pick up the cube")
    assert (ids.dtype, mask.dtype) == (np.int64, bool)
    assert mask.tolist() == [True] * 6 + [False] * 2
    assert [tokenizer.id_to_token(i) for i in ids[mask]] == ["<bos>", "pick", "up", "the", "cube", "\n"]
    assert not ids[~mask].any()


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), st.booleans())
def test_case_and_spacing_do_not_matter_to_words(words: list[str], upper: bool) -> None:
    prompt = PromptTokenizer(word_tokenizer(WORDS), max_len=8, pi05=False)
    plain = prompt(" ".join(words))
    other = prompt("_".join(w.upper() if upper else w for w in words) + "\n")
    np.testing.assert_array_equal(plain[0], other[0])
    np.testing.assert_array_equal(plain[1], other[1])


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "_"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    for pi05 in (False, True):
        with pytest.raises(InputError, match="expected a task in words"):
            PromptTokenizer(Letters(), max_len=50, pi05=pi05)(prompt, np.zeros(2))


def test_an_unknown_word_is_refused_with_the_words_there_are() -> None:
    with pytest.raises(InputError, match=r"prompt: found 'pick up the teapot', .*\(cube, pick, red, the, up\)"):
        PromptTokenizer(word_tokenizer(WORDS), max_len=8, pi05=False)("pick up the teapot")


def test_a_prompt_too_long_is_refused_never_cut() -> None:
    prompt = PromptTokenizer(word_tokenizer(WORDS), max_len=4, pi05=False)
    assert prompt("red cube")[1].all()
    with pytest.raises(InputError, match="prompt: found 5 tokens in 'the red cube', expected at most 4"):
        prompt("the red cube")


def test_pi05_without_a_state_is_refused() -> None:
    with pytest.raises(InputError, match="prompt: found no state"):
        PromptTokenizer(Letters(), max_len=50, pi05=True)("pick up")


def test_a_tokenizer_without_a_beginning_is_refused() -> None:
    bare = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(CheckpointError, match="found no token '<bos>'"):
        PromptTokenizer(bare, max_len=5, pi05=False)


def test_tokenizers_load_from_a_file_or_its_directory(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = PromptTokenizer(load_tokenizer(path), max_len=6, pi05=False)("the cube")
        expected = PromptTokenizer(tokenizer, max_len=6, pi05=False)("the cube")
        np.testing.assert_array_equal(again, expected)
    with pytest.raises(CheckpointError, match=r"nowhere: found no such file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: found .* expected a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_saved_with_a_tokenizer_are_not_used(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(WORDS)
    plain = PromptTokenizer(tokenizer, max_len=8, pi05=False)("pick up the cube")
    tokenizer.enable_padding(length=6)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = PromptTokenizer(load_tokenizer(tmp_path), max_len=8, pi05=False)("pick up the cube")
    for found, expected in zip(loaded, plain, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_subword_tokenizer_works_too() -> None:
    """Public checkpoints bring their own; nothing relies on whole words."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, **{c: i for i, c in enumerate("abc \n", 2)}},
                                           unk_token="<unk>"))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ids, mask = PromptTokenizer(tokenizer, max_len=8, pi05=False)("cab a")
    assert ids[mask].tolist() == [1, 4, 2, 3, 5, 2, 6]
