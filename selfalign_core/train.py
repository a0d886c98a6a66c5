"""Train a policy: ``python -m selfalign_core.train --config FILE [--resume [DIR]] [key=value …]``, or under torchrun.

On one machine with four GPUs, and on N machines (the same command on each, HOST being one of them)::

    torchrun --nproc-per-node 4 -m selfalign_core.train --config FILE parallel=fsdp
    torchrun --nnodes N --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m selfalign_core.train --config FILE parallel=fsdp --resume

``output`` must be in a folder that all machines share: every rank reads the checkpoint and the cached image features
that the first one writes there. A job whose ranks do not see the same ends with an error that names the path.
"""

from __future__ import annotations

import argparse

from selfalign_core.command_line import run_command
from selfalign_core.errors import SelfAlignError
from selfalign_core.training.config import TrainConfig
from selfalign_core.training.parallel import end_process, start_ranks
from selfalign_core.training.state import find_checkpoint, read_info
from selfalign_core.training.trainer import Trainer


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when trained to the end, 2 on anything a user can act on."""
    parser = argparse.ArgumentParser(prog="python -m selfalign_core.train", description="Train a policy.")
    parser.add_argument("--config", help="YAML file; without it, that of the run to resume")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="DIR",
        help="go on from the newest checkpoint of the run (or of DIR); starts the run if there is none yet",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values in place of the file's")
    # intermixed: overrides may stand on both sides of options
    options = parser.parse_intermixed_args(arguments)
    if isinstance(options.resume, str) and "=" in options.resume:  # `--resume key=value`
        options.overrides.append(options.resume)
        options.resume = True

    def work() -> None:
        config = _config(options)
        with start_ranks(config.device) as ranks:
            policy = Trainer(config, ranks, resume=options.resume).run()
            if ranks.first:
                print(f"policy: {policy}")

    return run_command(work, "the newest checkpoint is kept")


def _config(options: argparse.Namespace) -> TrainConfig:
    if options.config:
        return TrainConfig.load(options.config, options.overrides)
    if not isinstance(options.resume, str):
        raise SelfAlignError("found no --config, expected one, or --resume DIR")
    checkpoint = find_checkpoint(options.resume)
    if checkpoint is None:
        raise SelfAlignError(f"--resume {options.resume}: found no training checkpoint, expected one")
    return TrainConfig.from_dict(read_info(checkpoint)["config"], options.overrides)


if __name__ == "__main__":
    end_process(main())
