"""docs/layouts.md is true: its code blocks run, one after another, and its printed table is what is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"


def test_every_code_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 12
    names: dict[str, Any] = {}
    for block in blocks:
        # Blank lines keep the line numbers of the page in a traceback.
        code = "\n" * text[: block.start(1)].count("\n") + block[1]
        exec(compile(code, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    shown = [line[4:] for line in text.splitlines() if re.match(r"    .*(thread:slot|\|)|    -+\+", line)]
    assert len(shown) == 6
    assert all(line in printed for line in shown)
