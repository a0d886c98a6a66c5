"""``python -m selfalign_ros.replay BAG``: play a bag through policy, buffer and aligner in lock-step.

Only the command line is handled here; the playing is done by ``selfalign_ros.replay_node``, in a domain of its own so
that no robot hears it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from selfalign_ros.bag import Bag, BagError
from selfalign_ros.bringup import given_arguments, graph_parser
from selfalign_ros.graph import REPLAY, GraphError
from selfalign_ros.supervisor import Supervisor, free_domain


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the graph; 2 when the arguments or the bag cannot be used."""
    parser = graph_parser(REPLAY, "selfalign_ros.replay")
    options = parser.parse_intermixed_args(argv)
    if options.show_args:
        print(REPLAY.show_arguments())
        return 0
    try:
        # The bag may be given as a bare path: it is what this command is about.
        bags = [text for text in options.arguments if ":=" not in text]
        options.arguments = [text for text in options.arguments if ":=" in text] + [f"bag:={text}" for text in bags]
        given = given_arguments(options, REPLAY)
        given.setdefault("domain", str(free_domain()))
        graph = REPLAY(given)
        with Bag(Path(str(graph.node("replay").parameters["bag"]))):
            pass  # a bag that is none is found before any process is started
        return Supervisor(graph).run()
    except (GraphError, BagError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
