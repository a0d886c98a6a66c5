"""The rows of an evaluation: which episodes with which token and prompt, run in parallel processes, and summed up.

Episodes are dealt to batches by their number alone, so the number of processes changes no result, not by a bit. Must
not know the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.sim_demos import DemoConfig, sample_bodies
from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.policy import Policy
from selfalign_core.sim import TARGET_NAMES, BodyConfig
from selfalign_core.study.processes import BATCH, in_batches, policy_of, run_tasks
from selfalign_core.study.rollout import EpisodeResult, EpisodeSpec, PolicyPlanner, RolloutConfig
from selfalign_core.study.statistics import mean_interval, share_interval
from selfalign_core.text_table import align_columns

OWN, OTHER, MEAN, WRONG_PROMPT = "own", "other", "mean", "wrong-prompt"
ROWS = (OWN, OTHER, MEAN, WRONG_PROMPT)
NOMINAL, DEPLOYED = "nominal", "deployed"
"""The body that a robot is taken for; and, in place of a bank key, the checkpoint's ``peft_prefix_token``."""


@dataclass(frozen=True)
class EvaluatedBody:
    """``key``: the body's embodiment key, by which a bank may hold its token; None for a body without one."""

    key: str | None
    body: BodyConfig


@dataclass(frozen=True)
class TableEpisode:
    """An episode of the row ``row``; ``token`` says which one: a bank key, ``mean`` or ``deployed``."""

    row: str
    token: str
    episode: EpisodeSpec


# ---------------------------------------------------------------------------------------------------------- bodies


def find_bodies(spec: str) -> list[EvaluatedBody]:
    """``nominal``, a body file, ``dataset:DIR`` (every body of a simulated dataset) or ``dataset:DIR:EMBODIMENT``.

    Raises:
        ConfigError: no such file, dataset or embodiment, or a dataset that was not simulated.
    """
    nominal = EvaluatedBody(NOMINAL, BodyConfig())
    if spec == NOMINAL:
        return [nominal]
    if spec.startswith("dataset:"):
        return _bodies_of_dataset(spec.removeprefix("dataset:"))
    if not Path(spec).is_file():
        raise ConfigError(f"body: found no file {spec!r}, expected nominal, a body file or dataset:DIR[:EMBODIMENT]")
    body = BodyConfig.from_yaml(spec)
    return [nominal if body == BodyConfig() else EvaluatedBody(None, body)]


def unseen_bodies(count: int, seed: int, joints: Sequence[str], known: Sequence[str]) -> list[EvaluatedBody]:
    """``count`` bodies drawn as those of simulated datasets are; ``ConfigError`` if the bank knows one of them."""
    if count < 1:
        raise ConfigError(f"bodies: found {count}, expected >= 1")
    drawn = sample_bodies(count + 1, seed, DemoConfig(joints=tuple(joints)))
    drawn.pop("nominal")
    seen = [name for name in drawn if name in known]
    if seen:
        raise ConfigError(f"bodies: found {seen[0]} of seed {seed} in the checkpoint's bank, expected another seed")
    return [EvaluatedBody(None, body) for body in drawn.values()]


def _bodies_of_dataset(spec: str) -> list[EvaluatedBody]:
    directory, embodiment = (spec, None) if Path(spec).is_dir() else spec.rpartition(":")[::2]
    sources = TransitionDataset(directory or spec).meta.sources
    bodies = {source["embodiment"]: source["body"] for source in sources if "body" in source}
    if not bodies:
        raise ConfigError(f"{directory}: found no simulated bodies, expected a dataset made by sim_demos")
    if embodiment is not None and embodiment not in bodies:
        some = ", ".join(list(bodies)[:3])
        raise ConfigError(f"{directory}: found no body {embodiment!r}, expected one of its {len(bodies)}: {some} …")
    chosen = bodies if embodiment is None else {embodiment: bodies[embodiment]}
    return [EvaluatedBody(key, BodyConfig.from_dict(body)) for key, body in chosen.items()]


# ------------------------------------------------------------------------------------------------------------ rows


def default_rows(policy: Policy) -> tuple[str, ...]:
    """``ROWS``, as far as the checkpoint's bank has the tokens for them."""
    keys = policy.config.bank_keys
    if len(keys) > 1:
        return ROWS
    return (OWN, WRONG_PROMPT)


def plan_row(row: str, policy: Policy, bodies: Sequence[EvaluatedBody], count: int, seed: int) -> list[TableEpisode]:
    """The ``count`` episodes of a row: ``own``, ``other``, ``mean``, ``wrong-prompt`` (own token) or a bank key.

    Bodies and targets take turns. Episode i has the same body, target and seed in every row.

    Raises:
        ConfigError: a token that the checkpoint has not; fewer than one episode.
    """
    if count < 1:
        raise ConfigError(f"episodes: found {count}, expected >= 1")
    bank = _Bank(policy, row)
    order = np.random.default_rng(seed).permutation(max(len(bank.keys), 1))
    planned = []
    for i in range(count):
        body, turn = bodies[i % len(bodies)], i // len(bodies)
        target = (i % len(bodies) + turn) % len(TARGET_NAMES)
        prompt = None
        if row == WRONG_PROMPT:
            prompt = TARGET_NAMES[(target + 1 + (i // len(TARGET_NAMES)) % 2) % len(TARGET_NAMES)]
        name, token = bank.token_for(row, body.key, np.roll(order, -i))
        episode = EpisodeSpec(body.body, _episode_seed(seed, i), TARGET_NAMES[target], prompt, token)
        planned.append(TableEpisode(row, name, episode))
    return planned


class _Bank:
    def __init__(self, policy: Policy, row: str) -> None:
        self.keys = policy.config.bank_keys
        tokens = np.empty(0) if policy.bank is None else policy.bank.detach().float().cpu().numpy()
        if len(tokens) < len(self.keys):
            raise CheckpointError(f"bank: found {len(tokens)} tokens, expected one for each of {len(self.keys)} keys")
        self.rows = tokens[: len(self.keys)]
        if row in (OWN, WRONG_PROMPT):
            return
        if row in (OTHER, MEAN):
            if len(self.keys) < 2:
                raise ConfigError(f"row {row}: found a bank of {len(self.keys)} token(s), expected 2 or more")
        elif row not in self.keys:
            keys = ", ".join(self.keys[:3])
            bank = f"one of the bank's {len(self.keys)} keys ({keys} …)" if keys else "a key of a bank"
            raise ConfigError(f"row {row!r}: found no such token, expected {', '.join(ROWS)} or {bank}")

    def token_for(self, row: str, key: str | None, order: np.ndarray) -> tuple[str, np.ndarray | None]:
        """Its name and value; ``order``: rows in the order in which another body's token is looked for."""
        if row == MEAN:
            return MEAN, self.rows.mean(0)
        if row == OTHER:
            other = next(int(i) for i in order if self.keys[i] != key)
            return self.keys[other], self.rows[other]
        wanted = key if row in (OWN, WRONG_PROMPT) else row
        if wanted in self.keys:
            return wanted, self.rows[self.keys.index(wanted)]
        return DEPLOYED, None


def _episode_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


# ------------------------------------------------------------------------------------------------------- processes


def run_episodes(
    checkpoint: str, episodes: Sequence[EpisodeSpec], config: RolloutConfig, jobs: int
) -> Iterator[list[EpisodeResult]]:
    """The results of one batch after the other, in order."""
    if jobs < 1:
        raise ConfigError(f"jobs: found {jobs}, expected >= 1")
    batches = [episodes[i : i + BATCH] for i in range(0, len(episodes), BATCH)]
    yield from run_tasks(_run_batch, [(checkpoint, batch, config) for batch in batches], jobs)


def _run_batch(checkpoint: str, batch: Sequence[EpisodeSpec], config: RolloutConfig) -> list[EpisodeResult]:
    return in_batches(PolicyPlanner(policy_of(checkpoint)), batch, config)


# --------------------------------------------------------------------------------------------------------- figures


def summarise(row: str, results: Sequence[tuple[TableEpisode, EpisodeResult]]) -> dict[str, Any]:
    """A row's figures: shares and their 95 % intervals, median distance [m], mean action error [rad]."""
    n = len(results)
    errors = [result.action_error for _, result in results]
    figures: dict[str, Any] = {"row": row, "n": n}
    figures |= _share("success", sum(result.success for _, result in results), n)
    if row == WRONG_PROMPT:
        figures |= _share("reached_prompted", sum(r.reached[p.episode.told] for p, r in results), n)
    figures["final_distance_median"] = float(np.median([result.final_distance for _, result in results]))
    figures["action_error"] = float(np.mean(errors))
    figures["action_error_interval"] = list(mean_interval(errors))
    return figures


def _share(name: str, successes: int, n: int) -> dict[str, Any]:
    return {name: successes / n, f"{name}_interval": list(share_interval(successes, n))}


def episode_record(planned: TableEpisode, result: EpisodeResult) -> dict[str, Any]:
    """One episode as plain data."""
    episode = planned.episode
    return {
        "row": planned.row,
        "body": episode.body.name,
        "seed": episode.seed,
        "target": episode.target,
        "prompt": episode.told,
        "token": planned.token,
        **dataclasses.asdict(result),
    }


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text in columns."""
    names = {
        OWN: "own token",
        OTHER: "another body's token",
        MEAN: "mean of the bank",
        WRONG_PROMPT: "wrong prompt: target",
    }
    head = ("", "reached", "95 % interval", "median distance", "action error", "n")
    lines = [head]
    for row in rows:
        rest = f"{100 * row['final_distance_median']:.1f} cm", f"{row['action_error']:.3f} rad", str(row["n"])
        lines.append((names.get(row["row"], f"token of {row['row']}"), *_percent(row, "success"), *rest))
        if "reached_prompted" in row:
            lines.append(("wrong prompt: prompted", *_percent(row, "reached_prompted"), "", "", str(row["n"])))
    return align_columns(lines)


def _percent(row: dict[str, Any], name: str) -> tuple[str, str]:
    low, high = row[f"{name}_interval"]
    return f"{100 * row[name]:.1f} %", f"{100 * low:.1f} … {100 * high:.1f} %"
