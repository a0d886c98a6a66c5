"""``python -m selfalign_ros.bringup``: start the graph under the supervisor, for machines without ``ros2 launch``.

Arguments are those of ``launch/bringup.launch.py`` (``name:=value``); ``--duration`` and ``--report`` are short for
two of them. Only the command line is handled here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from selfalign_ros.graph import BRINGUP, Graph, GraphDeclaration, GraphError
from selfalign_ros.supervisor import Supervisor


def split_arguments(texts: Sequence[str]) -> dict[str, str]:
    """``name:=value`` texts as a mapping. Raises ``GraphError`` naming a text of another form."""
    values = {}
    for text in texts:
        name, separator, value = text.partition(":=")
        if not separator or not name:
            raise GraphError(f"argument {text!r}: expected the form name:=value")
        values[name] = value
    return values


def add_graph_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments every graph command has."""
    parser.add_argument("arguments", nargs="*", metavar="name:=value", help="launch arguments, see --show-args")
    parser.add_argument("--show-args", action="store_true", help="list the launch arguments and end")


def run(declaration: GraphDeclaration, given: dict[str, str]) -> int:
    """Assemble and run a graph; a bad argument is printed and gives exit code 2."""
    try:
        graph: Graph = declaration(given)
        return Supervisor(graph).run()
    except GraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def given_options(options: argparse.Namespace, *names: str) -> dict[str, str]:
    """The options of these names that were given, as launch arguments beside ``options.arguments``."""
    named = {name: str(getattr(options, name)) for name in names if getattr(options, name) is not None}
    return split_arguments(options.arguments) | named


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the graph."""
    parser = argparse.ArgumentParser(prog="python -m selfalign_ros.bringup", description=BRINGUP.description)
    parser.add_argument("--duration", help="seconds after which everything stops by itself")
    parser.add_argument("--report", help="JSON file for the run report; a PNG is written beside it")
    add_graph_arguments(parser)
    options = parser.parse_args(argv)
    if options.show_args:
        print(BRINGUP.show_arguments())
        return 0
    try:
        given = given_options(options, "duration", "report")
    except GraphError as error:
        parser.error(str(error))
    return run(BRINGUP, given)


if __name__ == "__main__":
    sys.exit(main())
