"""A command line from a function: its parameters are the options, and what it raises is told in one line.

::

    def info(*datasets: Annotated[Path, "dataset directories"], json: File = None) -> None:
        \"\"\"What datasets hold.\"\"\"

    main = command("package.module", info)

What may stand before ``*`` is positional (``*names``: one or more words), what stands after it is an option ``--name``,
which must be given if it has no default. ``bool`` is a switch, ``tuple[T, ...]`` takes one or more words, ``Literal``
names the words allowed. In ``Annotated``, a text is the help.

It stands on argparse and not on tyro 1.0, which has no "one or more words" (a command would run on none), takes
the word ``None`` for no value, and says what is wrong in wrapped boxes of several lines.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from selfalign_core.errors import ConfigError, SelfAlignError


class More(dict[str, Any]):
    """What ``add_argument`` takes besides, in ``Annotated``."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # for Annotated[...] | None


Work = Callable[..., int | None]
Main = Callable[..., int]
CORES = os.cpu_count() or 1
File = Annotated[Path | None, "file to write", More(metavar="FILE")]


def command(
    module: str, work: Work | Mapping[str, Work], *, about: str = "", interrupted: str = "nothing was written"
) -> Main:
    """What runs ``work`` with the words of a command line, those of the process if None, and returns the exit code.

    Several by name are the commands of one program, ``about`` something. ``interrupted``: what is said after Ctrl-C.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
        if callable(work):
            parser.description = _summary(work)
            _add_parameters(parser, work)
        else:
            commands = parser.add_subparsers(required=True, metavar="|".join(work))
            for name, one in work.items():
                _add_parameters(commands.add_parser(name, help=_summary(one)), one)
        parsed = vars(parser.parse_args(arguments))
        chosen, words = parsed.pop("work"), list[Any]()
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in parsed.items()}
        for name, parameter in inspect.signature(chosen).parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY:
                words += options.pop(name, ()) if parameter.kind is parameter.VAR_POSITIONAL else [options.pop(name)]
        return run_command(lambda: chosen(*words, **options), interrupted)

    return main


def run_command(work: Callable[[], int | None], interrupted: str = "nothing was written") -> int:
    """Run what a command does; its exit code. What a user can mend is printed without a traceback."""
    try:
        return work() or 0
    except (SelfAlignError, OSError) as error:  # OSError: a file that cannot be read or written
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130


def expect_at_least(least: float, **options: float | None) -> None:
    """Raise ``ConfigError`` naming an option below ``least``; one that is None was not given."""
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ConfigError(f"{_flag(name)}: found {value}, expected at least {least}")


def expect_more_than_0(**options: float) -> None:
    """Raise ``ConfigError`` naming an option that is not."""
    for name, value in options.items():
        if not value > 0:
            raise ConfigError(f"{_flag(name)}: found {value}, expected more than 0")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _summary(work: Work) -> str:
    return " ".join((work.__doc__ or "").split("\n\n")[0].split())


def _add_parameters(parser: argparse.ArgumentParser, work: Work) -> None:
    hints = get_type_hints(work, include_extras=True)
    for name, parameter in inspect.signature(work).parameters.items():
        found = _argument(hints[name])
        if parameter.kind is parameter.KEYWORD_ONLY:
            required = parameter.default is parameter.empty
            unsaid = required or parameter.default == () or parameter.default is None or parameter.default is False
            default = argparse.SUPPRESS if unsaid else parameter.default
            if "help" in found and not unsaid:
                found["help"] += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
            parser.add_argument(_flag(name), **found, required=required, default=default)
        else:
            many = {"nargs": "+", "default": argparse.SUPPRESS} if parameter.kind is parameter.VAR_POSITIONAL else {}
            parser.add_argument(name, **many | found)
    parser.set_defaults(work=work)


def _argument(hint: Any) -> dict[str, Any]:
    """What ``add_argument`` takes of a parameter with that type."""
    origin, kinds = get_origin(hint), [kind for kind in get_args(hint) if kind is not types.NoneType]
    if origin is Annotated:
        texts = ({"help": one.replace("%", "%%")} if isinstance(one, str) else one for one in hint.__metadata__)
        return {key: value for part in (_argument(kinds[0]), *texts) for key, value in part.items()}
    if origin in (Union, types.UnionType):
        return _argument(kinds[0])
    if origin is tuple:
        return {**_argument(kinds[0]), "nargs": "+" if kinds[-1] is Ellipsis else len(kinds)}
    if origin is Literal:
        return {"choices": kinds}
    return {"action": "store_true"} if hint is bool else {"type": hint}
