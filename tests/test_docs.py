"""docs/instructions.md is what the docstrings say, and every instruction and function of the language is in it."""

from __future__ import annotations

import re
from pathlib import Path

from tilus.docs import render
from tilus.instructions import BUILTINS, INSTRUCTIONS

PAGE = Path(__file__).parents[1] / "docs" / "instructions.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


def test_nothing_is_missing() -> None:
    titles = re.findall(r"^### `(.*)`$", PAGE.read_text(), re.MULTILINE)
    assert len(titles) == len(set(titles))
    assert {f"tilus.{name}" for name in BUILTINS} | INSTRUCTIONS.keys() <= set(titles)
