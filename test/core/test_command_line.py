"""Command lines made of functions: what is written is what the function gets, what is wrong is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from selfalign_core.command_line import File, More, command, expect_at_least
from selfalign_core.errors import InputError

got: dict[str, Any] = {}


def convert(
    *bags: Annotated[Path, "bags"],
    output: Annotated[Path, "where to"],
    image_size: Annotated[tuple[int, ...], "100 % of the picture", More(metavar="PIXELS")] = (64,),
    span: tuple[float, float] = (0.0, 1.0),
    device: Literal["cpu", "cuda"] = "cpu",
    steps: Annotated[int | None, "how many"] = None,
    seed: Annotated[int, "of all"] = 0,
    fast: bool = False,
    json: File = None,
) -> None:
    """Make one of
    several.

    More about it.
    """
    expect_at_least(1, steps=steps)
    got.update(locals())


main = command("convert", convert)


def test_options_are_what_the_function_gets() -> None:
    words = ["a", "b", "--output", "o", "--image-size", "48", "64", "--span", "1", "2", "--fast", "--json", "j.json"]
    assert main([*words, "--device", "cuda"]) == 0
    assert got["bags"] == (Path("a"), Path("b")) and got["output"] == Path("o") and got["json"] == Path("j.json")
    assert (got["image_size"], got["span"], got["device"], got["fast"]) == ((48, 64), (1.0, 2.0), "cuda", True)
    assert main(["a", "--output", "o"]) == 0
    assert (got["image_size"], got["steps"], got["seed"], got["fast"], got["json"]) == ((64,), None, 0, False, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "o"], "error: the following arguments are required: bags"),
        (["a"], "error: the following arguments are required: --output"),
        (["a", "--output", "o", "--device", "tpu"], "error: argument --device: invalid choice: 'tpu'"),
        (["a", "--output", "o", "--span", "1"], "error: argument --span: expected 2 arguments"),
        (["a", "--output", "o", "--steps", "many"], "error: argument --steps: invalid int value: 'many'"),
    ],
)
def test_a_wrong_word_ends_with_2_and_its_name(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_what_the_function_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a", "--output", "o", "--steps", "0"]) == 2
    assert capsys.readouterr().err == "error: --steps: found 0, expected at least 1\n"


def test_help_has_what_it_does_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Make one of several." in text and "More about it" not in text
    assert "--image-size PIXELS [PIXELS ...] 100 % of the picture (default: 64)" in text
    assert "--seed SEED of all (default: 0)" in text and "how many --seed" in text


def test_commands_of_one_program_and_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        """Stop."""
        raise KeyboardInterrupt

    def refuse(name: str) -> int:
        """Refuse."""
        raise InputError(f"{name}: found nothing")

    both = command("both", {"stop": stop, "refuse": refuse}, about="Two.", interrupted="half is kept")
    assert both(["stop"]) == 130 and capsys.readouterr().err == "interrupted: half is kept\n"
    assert both(["refuse", "x"]) == 2 and capsys.readouterr().err == "error: x: found nothing\n"
