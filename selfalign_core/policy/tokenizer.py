"""Prompts to token ids: the prompt formats of π0 and π0.5 over a ``tokenizer.json`` from a local path.

Public checkpoints use PaliGemma's ``tokenizer.json``; the tiny model uses :func:`word_tokenizer`, which needs no file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from selfalign_core.errors import CheckpointError, InputError

BOS, UNKNOWN = "<bos>", "<unk>"
SPECIAL_TOKENS = ("<pad>", "<eos>", BOS, UNKNOWN, "\n")


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """A tokenizer with one id per word, after the special tokens; a word outside it is refused, never guessed."""
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *(word.lower() for word in words)])
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in ``path``: a ``tokenizer.json`` or a directory that holds one."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"{file}: found no such file, expected a tokenizer.json (PaliGemma's, or the checkpoint's own)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file}: found {error}, expected a tokenizer.json") from error
    # A file saved after use may carry these; padding is ours to add, and nothing is ever cut.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class PromptTokenizer:
    """Writes a prompt as the model was trained to read it.

    π0: ``<bos>text\\n``. π0.5: ``<bos>Task: text, State: 12 200 …;\\nAction:`` and a space, with the normalised state
    in 256 bins.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_len: int, pi05: bool):
        self._tokenizer = tokenizer
        self._max_len = max_len
        self._pi05 = pi05
        self._encode = functools.lru_cache(maxsize=16)(self._ids)  # a robot is told the same again and again
        bos = tokenizer.token_to_id(BOS)
        if bos is None:
            raise CheckpointError(f"tokenizer: found no token {BOS!r}, expected it in the vocabulary")
        self._bos = bos

    def _ids(self, text: str) -> tuple[list[int], bool]:
        """Ids of ``text``, and whether it holds a word that the tokenizer does not know."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, UNKNOWN in encoding.tokens

    def __call__(self, prompt: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (max_len,) int64, padded on the right with 0, and their mask (max_len,) bool.

        ``state``: (state_dim,) normalised to [-1, 1], read by π0.5 only.

        Raises:
            InputError: the prompt is empty, too long, or holds a word that the tokenizer does not know.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt: found {type(prompt).__name__} {prompt!r}, expected a string")
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        if not text.strip():
            raise InputError(f"prompt: found {prompt!r}, expected a task in words")
        if self._pi05:
            if state is None:
                raise InputError("prompt: found no state, expected it (π0.5 writes the state into the prompt)")
            bins = np.digitize(state, bins=np.linspace(-1, 1, 257)[:-1]) - 1
            pieces = [f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: "]
        else:
            pieces = [text, "\n"]
        ids: list[int] = [self._bos]
        for piece in pieces:
            found, unknown = self._encode(piece)
            if unknown:
                raise InputError(f"prompt: found {prompt!r}, expected only words of the tokenizer ({self._words()})")
            ids += found
        if len(ids) > self._max_len:
            raise InputError(f"prompt: found {len(ids)} tokens in {prompt!r}, expected at most {self._max_len}")
        tokens, mask = np.zeros(self._max_len, np.int64), np.zeros(self._max_len, bool)
        tokens[: len(ids)], mask[: len(ids)] = ids, True
        return tokens, mask

    def _words(self) -> str:
        words = [w for w in self._tokenizer.get_vocab() if w not in SPECIAL_TOKENS]
        return ", ".join(sorted(words)[:40])
