"""docs/layouts.md is true: its code blocks run, what it shows is what is printed, its pictures are those that its commands draw,
and each of its laws names a test."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tilus.cli import main

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "layouts.md"
TEXT = PAGE.read_text()
PICTURES = re.findall(r"^!\[.+\]\((.+)\)\n\n    tilus layout (.+) --svg docs/(.+)$", TEXT, re.MULTILINE)
LAWS = re.findall(r"^\| (.+) \| `(\w+\.py)::(\w+)` \|$", TEXT, re.MULTILINE)


def check_excerpt(shown: list[str], printed: list[str]) -> None:
    """Line by line; a shown `...` stands for any number of lines."""
    at, skips = 0, False
    for line in shown:
        if line == "...":
            skips = True
            continue
        at = printed.index(line, at) if skips else at
        assert printed[at] == line
        at, skips = at + 1, False
    assert skips or at == len(printed)


def indented(block: str) -> list[str]:
    return [line[4:] for line in block.splitlines()]


def test_every_code_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = list(re.finditer(r"^```python\n(.*?)^```\n(?:\n((?:    [^\n]*\n)+))?", TEXT, re.MULTILINE | re.DOTALL))
    assert len(blocks) == TEXT.count("```python") >= 18
    names: dict[str, Any] = {}
    outputs = 0
    for block in blocks:
        # Blank lines keep the line numbers of the page in a traceback.
        code = "\n" * TEXT[: block.start(1)].count("\n") + block[1]
        exec(compile(code, str(PAGE), "exec"), names)
        printed = capsys.readouterr().out
        assert bool(printed) == bool(block[2]), "output is shown, and nothing else is indented behind a code block"
        if printed:
            check_excerpt(indented(block[2]), printed.splitlines())
            outputs += 1
    assert outputs >= 1


def test_commands_print_what_is_shown() -> None:
    blocks = re.findall(r"^    \$ tilus (.+)\n((?:    .*\n)+)", TEXT, re.MULTILINE)
    assert len(blocks) == TEXT.count("$ tilus") >= 1
    for command, shown in blocks:
        check_excerpt(indented(shown), CliRunner().invoke(main, shlex.split(command)).output.splitlines())


def test_every_picture_has_the_command_that_draws_it() -> None:
    assert len(PICTURES) == len(re.findall(r"^!\[", TEXT, re.MULTILINE)) >= 8
    assert all(shown == drawn for shown, _, drawn in PICTURES)
    committed = {f"images/{path.name}" for path in (DOCS / "images").iterdir()}
    assert {shown for shown, _, _ in PICTURES} == committed


@pytest.mark.parametrize(("name", "arguments", "_"), PICTURES, ids=[name for name, _, _ in PICTURES])
def test_pictures_are_what_is_drawn_now(name: str, arguments: str, _: str, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    result = CliRunner().invoke(main, ["layout", *shlex.split(arguments), "--svg", str(drawn)])
    assert result.exit_code == 0, result.output
    assert (DOCS / name).read_text() == drawn.read_text(), "run `make docs`"
    assert drawn.stat().st_size < 150_000


def test_every_law_names_a_test() -> None:
    assert len(LAWS) == TEXT.split("\n| law | test |\n")[1].count("\n| ") >= 30
    for law, file, test in LAWS:
        assert re.search(rf"^def {test}\(", (Path(__file__).parent / file).read_text(), re.MULTILINE), law
