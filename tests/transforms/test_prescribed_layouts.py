"""Instructions that can work with some layouts of a shared tensor only, as wgmma and TMA: the choice is among those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import tilus
from tilus import Const, Tensor, TilusError, f16
from tilus.codegen.shared_access import SharedAccess, shared_access
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.expr import as_expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.tensor import SharedTensor
from tilus.layout import (
    SharedLayout,
    column_major,
    padded,
    row_major,
    tma_tiles,
    wgmma_operand,
    wgmma_operands,
)
from tilus.target import DEFAULT_TARGET, Target
from tilus.transforms import run_pipeline
from tilus.transforms.layout_shared import uses


@dataclass(frozen=True, eq=False)
class Engine(Instruction):
    """Something like wgmma or TMA: no thread moves the data, and only some layouts will do."""

    mnemonic = "engine"

    src: SharedTensor
    legal: tuple[SharedLayout, ...]

    def effects(self) -> Effects:
        return Effects(reads=(self.src,), other=True)

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        rank = self.src.rank
        offsets = tuple(as_expr(0) for _ in range(rank))
        return ((self.src, shared_access(self.src, None, offsets, range(rank), self.src.shape, legal=self.legal)),)


@builtin
def engine(b: IRBuilder, src: SharedTensor, legal: tuple[SharedLayout, ...]) -> None:
    b.emit(Engine(src, legal))


@tilus.kernel
def product_of_engines(x: Tensor[f16, 64, 64], *, first: Const, second: Const, memory: Const = None):
    tilus.grid(1, warps=4)
    s = tilus.shared(f16, [64, 64], layout=memory)
    tilus.store_shared(s, tilus.load(x, [0, 0], shape=[64, 64]))
    tilus.sync()
    engine(s, first)
    engine(s, second)


def engines(first: Any, second: Any, memory: SharedLayout | None = None) -> SharedLayout | None:
    function = product_of_engines.specialize(first=first, second=second, memory=memory).function
    (tensor,) = uses(run_pipeline(function, DEFAULT_TARGET, after="layout_shared"), DEFAULT_TARGET)
    return tensor.layout


def test_legal_layouts_are_a_constraint() -> None:
    """TMA and wgmma agree on swizzles; what threads do decides among those."""
    operands, tiles = wgmma_operands((64, 64), 2), tma_tiles((64, 64), 2)
    assert engines(tiles, operands) == wgmma_operand((64, 64), 2, 128, "k")
    assert engines((padded((64, 64), 8), column_major((64, 64))), (column_major((64, 64)),)) == column_major((64, 64))
    assert engines(operands[4:], operands) in operands[4:]


def test_contradicting_constraints_show_both_lines() -> None:
    with pytest.raises(TilusError) as error:
        engines((row_major((64, 64)),), wgmma_operands((64, 64), 2))
    text = str(error.value)
    lines = [line.partition("| ")[2].strip() for line in text.splitlines() if "| " in line]
    assert lines == ["engine(s, first)", "engine(s, second)"], text
    assert text.startswith("no layout of s suits engine, which can work with row_major((64, 64)).swizzled(3, 3, 3), ")
    assert "hint: give the two accesses shared tensors of their own" in text


def test_a_constraint_that_nothing_meets() -> None:
    with pytest.raises(TilusError, match=r"engine has no layout for s of shape \[64, 64\] and f16"):
        engines((), ())


def test_a_pinned_layout_must_be_legal() -> None:
    operands = wgmma_operands((64, 64), 2)
    assert engines(operands, operands, memory=operands[2]) == operands[2]
    with pytest.raises(
        TilusError, match=r"engine cannot work with layout row_major\(\(64, 64\)\) of s; expected one of"
    ):
        engines(operands, operands, memory=row_major((64, 64)))
