"""How well a policy reaches, in the simulator: ``python -m selfalign_core.evaluate CHECKPOINT``.

Runs seeded closed-loop episodes on the nominal body and prints, with 95 % intervals, how often the target is reached
with the body's own E-Token, with other bodies' tokens (each episode another one), with the mean of the bank, and how
often with a wrong prompt. The same arguments give the same numbers, whatever the number of processes.

    python -m selfalign_core.evaluate CHECKPOINT --json figures.json --gif episode.gif
    python -m selfalign_core.evaluate CHECKPOINT --body dataset:DIR             # every body of a simulated dataset
    python -m selfalign_core.evaluate CHECKPOINT --bodies 16 --rows own other   # 16 bodies that nothing was trained on
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from selfalign_core.data.dataset import run_command
from selfalign_core.errors import ConfigError
from selfalign_core.files import write_text
from selfalign_core.policy import Policy
from selfalign_core.sim import JOINTS
from selfalign_core.study.animation import check_animation_path, save_animation
from selfalign_core.study.rollout import PolicyPlanner, RolloutConfig
from selfalign_core.study.table import (
    ROWS,
    default_rows,
    episode_record,
    find_bodies,
    format_table,
    load_policy,
    plan_row,
    run_episodes,
    summarise,
    unseen_bodies,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m selfalign_core.evaluate", description="How well a policy reaches, in the simulator."
    )
    parser.add_argument("checkpoint", help="checkpoint directory")
    bodies = parser.add_mutually_exclusive_group()
    bodies.add_argument(
        "--body",
        default="nominal",
        metavar="BODY",
        help="nominal, a body file, or dataset:DIR[:EMBODIMENT] for those of a simulated dataset; default: nominal",
    )
    bodies.add_argument("--bodies", type=int, metavar="N", help="N random bodies that the checkpoint's bank has not")
    rows = f"of {', '.join(ROWS)}, or keys of the bank; default: those four, as far as there are tokens for them"
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=rows)
    parser.add_argument("--episodes", type=int, default=200, help="per row; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes and of the bodies of --bodies; default: 0")
    joints = "that the policy commands; default: those the checkpoint names, or the arm's first"
    parser.add_argument("--joints", nargs="+", metavar="JOINT", help=joints)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument("--json", metavar="FILE", help="write every episode and the rows")
    parser.add_argument("--gif", metavar="FILE", help="write an animation of the first episode")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when evaluated, 2 on anything a user can act on."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.gif:
        check_animation_path(options.gif)
    policy = load_policy(options.checkpoint)
    planner = PolicyPlanner(policy)
    config = RolloutConfig(joints=_joints(options.joints, policy))
    if options.seed < 0:
        raise ConfigError(f"seed: found {options.seed}, expected >= 0")
    if options.bodies is None:
        bodies = find_bodies(options.body)
    else:
        bodies = unseen_bodies(options.bodies, options.seed, config.joints, policy.config.bank_keys)
    rows = tuple(dict.fromkeys(options.rows or default_rows(policy)))
    planned = [one for row in rows for one in plan_row(row, policy, bodies, options.episodes, options.seed)]

    results = []
    with tqdm(total=len(planned), unit="episode", disable=None) as bar:
        for batch in run_episodes(options.checkpoint, [one.episode for one in planned], config, options.jobs):
            results += batch
            bar.update(len(batch))
    pairs = list(zip(planned, results, strict=True))
    figures = [summarise(row, [pair for pair in pairs if pair[0].row == row]) for row in rows]
    print(format_table(figures))
    if options.json:
        document = {
            "checkpoint": options.checkpoint,
            "model_digest": policy.digest,
            "config": {
                "body": options.body if options.bodies is None else None,
                "bodies": len(bodies),
                "seed": options.seed,
                "episodes": options.episodes,
                "rollout": dataclasses.asdict(config),
            },
            "rows": figures,
            "episodes": [episode_record(*pair) for pair in pairs],
        }
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        write_text(Path(options.json), text)
    if options.gif:
        save_animation(options.gif, planner, planned[0].episode, config)


def _joints(names: Sequence[str] | None, policy: Policy) -> tuple[str, ...]:
    dims = {policy.state_dim, policy.action_dim}
    joints = tuple(names or policy.config.joints or JOINTS[: policy.action_dim])
    if dims != {len(joints)}:
        raise ConfigError(
            f"joints: found {len(joints)} ({', '.join(joints)}), expected as many as the checkpoint's state_dim="
            f"{policy.state_dim} and action_dim={policy.action_dim}"
        )
    return joints


if __name__ == "__main__":
    sys.exit(main())
