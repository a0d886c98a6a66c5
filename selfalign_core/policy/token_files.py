"""Files of E-Tokens, all safetensors: one token with its losses, or one for each of many bodies. Imports no torch.

A file that is damaged, or of another model, is refused; nothing here unpickles one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from selfalign_core.errors import CheckpointError
from selfalign_core.files import write_atomically
from selfalign_core.records import shown
from selfalign_core.robot.types import EToken

E_TOKEN_PARAMETER = "peft_prefix_token"
FORMAT = "selfalign-e-token-1"
MANY_FORMAT = "selfalign-tokens-1"


@dataclass(frozen=True)
class _File:
    """What a file of tokens holds: float32 arrays by name, and its metadata."""

    path: Path
    tokens: dict[str, np.ndarray]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: str | Path, expected: str, problem: Callable[[list[str], dict[str, str]], str]) -> _File:
        """``problem`` says of names and metadata what is wrong with them, or ""; only then are tensors read."""
        try:
            with safe_open(path, framework="np") as file:
                names, metadata = list(file.keys()), file.metadata() or {}
                if found := problem(names, metadata):
                    raise CheckpointError(f"{path}: {found}")
                tokens = {name: np.asarray(file.get_tensor(name), np.float32) for name in names}
                return cls(Path(path), tokens, metadata)
        except (SafetensorError, OSError, TypeError) as error:  # TypeError: a type that numpy lacks
            raise CheckpointError(f"{path}: found {error}, expected {expected}") from error

    def check_model(self, digest: str, what: str) -> None:
        owner = self.metadata.get("model_digest", "")
        if owner != digest:
            raise CheckpointError(f"{self.path}: found {what} of model {owner[:12]!r}, expected model {digest[:12]!r}")


def save_e_token(
    path: str | Path, token: EToken, *, losses: dict[str, float] | None = None, extra: dict[str, str] | None = None
) -> None:
    """Write a token as safetensors with its metadata, atomically; ``extra`` metadata is the caller's own.

    Raises:
        OSError: it cannot be written (a full disk, no permission); what was there before is left.
    """
    metadata = {
        "format": FORMAT,
        "model_digest": token.model_digest,
        "embodiment": token.embodiment,
        "version": str(token.version),
        "losses": json.dumps(losses or {}),
        **(extra or {}),
    }
    _save(path, {E_TOKEN_PARAMETER: np.array(token.data, np.float32)}, metadata)


def load_e_token(path: str | Path, *, model_digest: str, shape: tuple[int, ...]) -> EToken:
    """Read a token and check that it belongs to this model.

    Raises:
        CheckpointError: the file is not a token, is damaged, or is of another model, shape or holds NaN.
    """
    return load_e_token_and_metadata(path, model_digest=model_digest, shape=shape)[0]


def load_e_token_and_metadata(
    path: str | Path, *, model_digest: str, shape: tuple[int, ...]
) -> tuple[EToken, dict[str, str]]:
    """The same with what else the file says."""
    file = _read_e_token(path)
    file.check_model(model_digest, "a token")
    data, version = file.tokens[E_TOKEN_PARAMETER], file.metadata.get("version", "")
    if data.shape != tuple(shape):
        raise CheckpointError(f"{path}: found a token of shape {data.shape}, expected {tuple(shape)}")
    if not np.isfinite(data).all():
        raise CheckpointError(f"{path}: found NaN or infinity in the token")
    if not (version.isascii() and version.isdigit()):
        raise CheckpointError(f"{path}: found version {version!r}, expected an integer >= 0")
    return EToken(data, int(version), file.metadata.get("embodiment", ""), model_digest), file.metadata


def _read_e_token(path: str | Path) -> _File:
    def problem(names: list[str], metadata: dict[str, str]) -> str:
        fits = metadata.get("format") == FORMAT and names == [E_TOKEN_PARAMETER]
        return "" if fits else f"found tensors {shown(names)}, expected an E-Token file ({E_TOKEN_PARAMETER})"

    return _File.read(path, "an E-Token file", problem)


def save_tokens(path: str | Path, tokens: Mapping[str, np.ndarray], model_digest: str) -> None:
    """Write tokens (T, W) by embodiment, atomically."""
    _save(path, dict(tokens), {"format": MANY_FORMAT, "model_digest": model_digest})


def load_tokens(path: str | Path, *, model_digest: str) -> dict[str, np.ndarray]:
    """Tokens by embodiment, float32.

    Raises:
        CheckpointError: the file cannot be read, is no file of tokens, or they are of another model.
    """

    def problem(names: list[str], metadata: dict[str, str]) -> str:
        found = metadata.get("format")
        return "" if found == MANY_FORMAT else f"found format {found!r}, expected {MANY_FORMAT!r}"

    file = _File.read(path, "a file of tokens by embodiment", problem)
    file.check_model(model_digest, "tokens")
    return file.tokens


def _save(path: str | Path, tokens: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    def write(temporary: str) -> None:
        try:
            save_file(tokens, temporary, metadata)
        except SafetensorError as error:  # how safetensors reports whatever the system does
            raise OSError(f"{path}: {error}") from error

    write_atomically(Path(path), write)
