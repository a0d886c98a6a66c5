"""Which known token fits this robot best: successive elimination over the trusted tokens, under common noise.

All candidates are scored on few transitions, the best quarter on more, and so on, a handful on everything. The current
token is never dropped, so the margin over it is always known. The work hardly grows with the bank: twice as many tokens
are one more small heat. Only the last handful is asked to predict the next observation, too: that is half of a pass,
and what comes next looks much the same whatever the body.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfalign_core.alignment.budget import Budget, OutOfTimeError
from selfalign_core.alignment.config import Identify
from selfalign_core.alignment.scoring import Prepared, Scorer
from selfalign_core.alignment.trusted import Trusted

CURRENT = "current"
_STEP_ROWS = 256
"""Rows that count together or, when the budget ends among them, not at all."""


@dataclass(frozen=True)
class Identification:
    """The best candidate and how it compares.

    ``scores``: of the last heat's candidates, best first: losses relative to the typical candidate's on the same
    transition and noise, 1 is typical. ``margin``: the current token's score minus the best one's, 0 if it is the
    best. ``evaluations``: (token, transition, draw) triples scored. ``note``: why it ended early, or "".
    """

    token: Tensor
    name: str
    scores: dict[str, float]
    margin: float
    evaluations: int
    note: str


def identify(
    scorer: Scorer,
    data: Prepared,
    current: Tensor,
    trusted: Trusted,
    config: Identify,
    *,
    seed: int,
    budget: Budget,
) -> Identification:
    """Score ``current`` (T, W) and every trusted token on ``data``; the best so far when the budget ends it."""
    names, tokens = (CURRENT, *trusted.names), torch.cat([current[None], trusted.tokens])
    noise = scorer.noise(data, config.draws, seed)
    alive = torch.arange(len(names), device=current.device)
    totals, trials, evaluations, note = torch.zeros(len(names), device=current.device), 0, 0, ""
    try:
        for keep, rows in _heats(len(names), len(data), config):
            alive = _best(totals, alive, keep)
            score = scorer.score if keep <= config.finalists else scorer.rank
            for part in rows.to(current.device).split(max(1, _STEP_ROWS // len(alive))):
                losses = score(data, noise, tokens[alive], part, budget.check)
                totals[alive] += relative(losses).sum(1)
                trials, evaluations = trials + len(part), evaluations + losses.numel()
    except OutOfTimeError as why:
        note = str(why)
    order = alive[totals[alive].argsort(stable=True)]
    scores = {names[row]: float(totals[row]) / max(trials, 1) for row in order.tolist()}
    best = names[int(order[0])]
    if scores[best] == scores[CURRENT]:
        best = CURRENT
    return Identification(
        token=tokens[names.index(best)].clone(),
        name=best,
        scores=scores,
        margin=scores[CURRENT] - scores[best],
        evaluations=evaluations,
        note=note,
    )


def relative(losses: Tensor) -> Tensor:
    """(C, R) → each loss divided by the candidates' median at that transition and noise.

    So a transition that is hard for every token, an outlier among them, has no more say than any other.
    """
    return losses / losses.median(0).values.clamp(min=torch.finfo(losses.dtype).tiny)


def _heats(candidates: int, count: int, config: Identify) -> list[tuple[int, Tensor]]:
    """How many candidates each heat keeps, and the rows of noise (draw * count + transition) that it scores.

    Each heat keeps a quarter and scores it on twice as many transitions as the heat before, all spread over time.
    """
    finalists, heats, left = min(config.finalists, candidates), [], torch.arange(count)
    keep, size = candidates, config.first_count
    while len(left) and keep > finalists:
        chosen = torch.linspace(0, len(left) - 1, min(size, len(left))).round().long()
        heats.append((keep, left[chosen]))
        rest = torch.ones(len(left), dtype=torch.bool)
        rest[chosen] = False
        left = left[rest]
        keep, size = max(finalists, -(-keep // 4)), 2 * size
    return [*heats, (finalists, torch.cat([left, torch.arange(count, config.draws * count)]))]


def _best(totals: Tensor, alive: Tensor, keep: int) -> Tensor:
    """The ``keep`` of ``alive`` with the lowest totals, in their order; the first candidate stays in any case."""
    if keep >= len(alive):
        return alive
    chosen = alive[totals[alive].argsort(stable=True)[:keep]]
    return torch.cat([alive.new_zeros(1), chosen[chosen != 0]]).sort().values
