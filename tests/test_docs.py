"""docs/instructions.md is what the docstrings say, and every instruction and function of the language is in it."""

from __future__ import annotations

import re
from pathlib import Path

from tilus.docs import render
from tilus.instructions import BUILTINS, INSTRUCTIONS
from tilus.instructions.mma_atoms import MMA_ATOMS
from tilus.instructions.wgmma_atoms import WGMMA_ATOMS

PAGE = Path(__file__).parents[1] / "docs" / "instructions.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


def test_nothing_is_missing() -> None:
    titles = re.findall(r"^### `(.*)`$", PAGE.read_text(), re.MULTILINE)
    assert len(titles) == len(set(titles))
    assert {f"tilus.{name}" for name in BUILTINS} | INSTRUCTIONS.keys() <= set(titles)


def rows_of_table(section: str) -> list[list[str]]:
    lines = (PAGE.parent / "language.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]


def test_the_language_page_lists_the_tensor_core_instructions() -> None:
    """The table there is the table of atoms, with the types of an instruction in one row."""
    listed: set[tuple[str, str, str, int, str]] = set()
    for operands, accumulators, instruction, step, targets in rows_of_table("Tensor cores"):
        names = re.findall(r"\w+\d\w*", operands)
        depths = [int(k) for k in re.findall(r"m16n8k(\d+)", instruction)]
        assert int(step) == min(depths)
        pairs = [(a, b) for a in names for b in names]
        listed |= {(a, b, c, k, targets) for a, b in pairs for c in accumulators.split(", ") for k in depths}
    assert listed == {(str(a.a), str(a.b), str(a.c), a.k, a.targets) for a in MMA_ATOMS}


def test_the_language_page_lists_the_products_of_warpgroups() -> None:
    listed: set[tuple[str, str, str, int]] = set()
    for operands, accumulators, step in rows_of_table("Products of warpgroups"):
        names = re.findall(r"\w+\d\w*", operands)
        listed |= {(a, b, c, int(step)) for a in names for b in names for c in accumulators.split(", ")}
    assert listed == {(str(a.a), str(a.b), str(a.d), a.k) for a in WGMMA_ATOMS}
