"""``python -m selfalign_ros.tools.replay BAG``: play a bag through policy, buffer and aligner in lock-step.

With ``--against FILE`` or ``--against-checkpoint FOLDER`` it is played twice, and what differs is told.

Only the command line is handled here; the playing is done by ``selfalign_ros.tools.replay_node``, in a domain of its
own so that no robot hears it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from selfalign_core.data.rosbag_file import BagFile
from selfalign_core.errors import SelfAlignError
from selfalign_ros.graph.declaration import REPLAY, GraphError
from selfalign_ros.graph.supervisor import Supervisor, free_domain
from selfalign_ros.tools.bringup import given_arguments, graph_parser
from selfalign_ros.tools.replay_pair import run_pair

COMPARISON = "runs/replay/comparison.json"
"""Where the comparison of two replays is written, unless ``report`` says otherwise."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the graph; 2 when the arguments or the bag cannot be used."""
    parser = graph_parser(REPLAY, "selfalign_ros.tools.replay")
    parser.add_argument("--against", metavar="FILE", help="replay again with this parameter file, and compare")
    parser.add_argument("--against-checkpoint", metavar="FOLDER", help="replay again with this policy, and compare")
    options = parser.parse_intermixed_args(argv)
    if options.show_args:
        print(REPLAY.show_arguments())
        return 0
    try:
        # The bag may be given as a bare path: it is what this command is about.
        bags = [text for text in options.arguments if ":=" not in text]
        options.arguments = [text for text in options.arguments if ":=" in text] + [f"bag:={text}" for text in bags]
        given = given_arguments(options, REPLAY)
        against = {"params_file": options.against, "checkpoint": options.against_checkpoint}
        different = {name: value for name, value in against.items() if value}
        graph = REPLAY({"domain": str(free_domain())} | given)
        # A bag that is none is found before any process is started.
        BagFile.completed(Path(str(graph.node("replay").parameters["bag"])))
        if different:
            return run_pair(given, different, Path(given.get("report") or COMPARISON))
        return Supervisor(graph).run()
    except (GraphError, SelfAlignError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
