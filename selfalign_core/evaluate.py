"""How well a policy reaches, in the simulator: ``python -m selfalign_core.evaluate CHECKPOINT``.

Runs seeded closed-loop episodes on the nominal body and prints, with 95 % intervals, how often the target is reached
with the body's own E-Token, with other bodies' tokens (each episode another one), with the mean of the bank, and how
often with a wrong prompt. The same arguments give the same numbers, whatever the number of processes.

    python -m selfalign_core.evaluate CHECKPOINT --json figures.json --gif episode.gif
    python -m selfalign_core.evaluate CHECKPOINT --body dataset:DIR             # every body of a simulated dataset
    python -m selfalign_core.evaluate CHECKPOINT --bodies 16 --rows own other   # 16 bodies that nothing was trained on
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from selfalign_core.command_line import CORES, File, More, command
from selfalign_core.errors import ConfigError
from selfalign_core.files import write_text
from selfalign_core.policy import Policy
from selfalign_core.sim import JOINTS
from selfalign_core.study.animation import check_animation_path, save_animation
from selfalign_core.study.processes import load_policy
from selfalign_core.study.rollout import PolicyPlanner, RolloutConfig
from selfalign_core.study.table import (
    NOMINAL,
    ROWS,
    default_rows,
    episode_record,
    find_bodies,
    format_table,
    plan_row,
    run_episodes,
    summarise,
    unseen_bodies,
)


def run(
    checkpoint: Annotated[str, "checkpoint directory"],
    *,
    body: Annotated[
        str | None,
        "nominal, a body file, or dataset:DIR[:EMBODIMENT] for those of a simulated dataset; default: nominal",
        More(metavar="BODY"),
    ] = None,
    bodies: Annotated[int | None, "N random bodies that the checkpoint's bank has not", More(metavar="N")] = None,
    rows: Annotated[
        tuple[str, ...] | None,
        f"of {', '.join(ROWS)}, or keys of the bank; default: those four, as far as there are tokens for them",
        More(metavar="ROW"),
    ] = None,
    episodes: Annotated[int, "per row"] = 200,
    seed: Annotated[int, "of the episodes and of the bodies of --bodies"] = 0,
    joints: Annotated[
        tuple[str, ...] | None,
        "that the policy commands; default: those the checkpoint names, or the arm's first",
        More(metavar="JOINT"),
    ] = None,
    jobs: Annotated[int, "processes; default: one per core"] = CORES,
    json: Annotated[File, "write every episode and the rows"] = None,
    gif: Annotated[File, "write an animation of the first episode"] = None,
) -> None:
    """How well a policy reaches, in the simulator."""
    if gif:
        check_animation_path(gif)
    if body is not None and bodies is not None:
        raise ConfigError("--bodies: found --body too, expected one of the two")
    policy = load_policy(checkpoint)
    planner = PolicyPlanner(policy)
    config = RolloutConfig(joints=_joints(joints, policy))
    if seed < 0:
        raise ConfigError(f"seed: found {seed}, expected >= 0")
    if bodies is None:
        found = find_bodies(body or NOMINAL)
    else:
        found = unseen_bodies(bodies, seed, config.joints, policy.config.bank_keys)
    chosen = tuple(dict.fromkeys(rows or default_rows(policy)))
    planned = [one for row in chosen for one in plan_row(row, policy, found, episodes, seed)]

    results = []
    with tqdm(total=len(planned), unit="episode", disable=None) as bar:
        for batch in run_episodes(checkpoint, [one.episode for one in planned], config, jobs):
            results += batch
            bar.update(len(batch))
    pairs = list(zip(planned, results, strict=True))
    figures = [summarise(row, [pair for pair in pairs if pair[0].row == row]) for row in chosen]
    print(format_table(figures))
    if json:
        document = {
            "checkpoint": checkpoint,
            "model_digest": policy.digest,
            "config": {
                "body": body or NOMINAL if bodies is None else None,
                "bodies": len(found),
                "seed": seed,
                "episodes": episodes,
                "rollout": dataclasses.asdict(config),
            },
            "rows": figures,
            "episodes": [episode_record(*pair) for pair in pairs],
        }
        write_text(Path(json), dumps(document, indent=2, allow_nan=False) + "\n")
    if gif:
        save_animation(gif, planner, planned[0].episode, config)


def _joints(names: Sequence[str] | None, policy: Policy) -> tuple[str, ...]:
    dims = {policy.state_dim, policy.action_dim}
    joints = tuple(names or policy.config.joints or JOINTS[: policy.action_dim])
    if dims != {len(joints)}:
        raise ConfigError(
            f"joints: found {len(joints)} ({', '.join(joints)}), expected as many as the checkpoint's state_dim="
            f"{policy.state_dim} and action_dim={policy.action_dim}"
        )
    return joints


main = command("selfalign_core.evaluate", run)

if __name__ == "__main__":
    sys.exit(main())
