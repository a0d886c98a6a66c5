"""``python -m selfalign_ros.tools.bringup``: start the graph under the supervisor, where there is no ``ros2 launch``.

Arguments are those of ``launch/bringup.launch.py``, written ``name:=value`` or ``--name value``. Only the command line
is handled here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from selfalign_ros.graph.declaration import BRINGUP, GraphDeclaration, GraphError
from selfalign_ros.graph.supervisor import Supervisor


def graph_parser(declaration: GraphDeclaration, command: str) -> argparse.ArgumentParser:
    """A parser with one option for each launch argument, which may be given as ``name:=value`` as well."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}", description=declaration.description, allow_abbrev=False
    )
    parser.add_argument("arguments", nargs="*", metavar="name:=value", help="launch arguments, as for ros2 launch")
    parser.add_argument("--show-args", action="store_true", help="list the launch arguments as ros2 launch does")
    for argument in declaration.arguments:
        names = [f"--{argument.name.replace('_', '-')}"]
        names += ["--params"] if argument.name == "params_file" else []
        text = f"{argument.description} (default: {argument.default!r})".replace("%", "%%")
        parser.add_argument(*names, dest=argument.name, metavar="VALUE", help=text)
    return parser


def given_arguments(options: argparse.Namespace, declaration: GraphDeclaration) -> dict[str, str]:
    """What was given on the command line, name -> text. Raises ``GraphError`` naming a text of another form."""
    given = {}
    for text in options.arguments:
        name, separator, value = text.partition(":=")
        if not separator or not name:
            raise GraphError(f"argument {text!r}: expected the form name:=value")
        given[name] = value
    for argument in declaration.arguments:
        if (value := getattr(options, argument.name)) is not None:
            given[argument.name] = value
    return given


def run(declaration: GraphDeclaration, command: str, argv: Sequence[str] | None) -> int:
    """Read the command line and run the graph. Returns its exit code; 2 when an argument cannot be used."""
    parser = graph_parser(declaration, command)
    options = parser.parse_intermixed_args(argv)
    if options.show_args:
        print(declaration.show_arguments())
        return 0
    try:
        return Supervisor(declaration(given_arguments(options, declaration))).run()
    except GraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the graph."""
    return run(BRINGUP, "selfalign_ros.tools.bringup", argv)


if __name__ == "__main__":
    sys.exit(main())
