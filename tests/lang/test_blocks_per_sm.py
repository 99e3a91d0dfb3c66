"""`blocks_per_sm` of tilus.grid reaches the assembler, also through the text form of the IR."""

from __future__ import annotations

from typing import Any

import pytest

import tilus
from tilus import Const, Tensor, f32
from tilus.compiler import compile_function
from tilus.instructions import INSTRUCTIONS
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.target import get_target


@tilus.kernel
def double(x: Tensor[f32, "n"], *, blocks: Const):
    tilus.grid(1, warps=2, blocks_per_sm=blocks)
    tilus.store(x, [0], 2 * tilus.load(x, [0], [64]))


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_it_is_a_directive(blocks: int) -> None:
    function = double.ir(blocks=blocks)
    parsed = parse_function(print_function(function), INSTRUCTIONS)
    for each in (function, parsed):
        lines = compile_function(each, get_target("sm_90a")).ptx.splitlines()
        assert [line for line in lines if "nctapersm" in line] == [f".minnctapersm {blocks}"]


@pytest.mark.parametrize("blocks", [0, -1, True, 1.5, None])
def test_other_values_are_refused(blocks: Any) -> None:
    with pytest.raises(tilus.TilusError, match=f"blocks_per_sm is {blocks}, expected a positive compile-time int"):
        double.ir(blocks=blocks)
