"""Blocks of vector accumulators in registers, and operands as C reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilus.codegen.c.nest import stride
from tilus.codegen.c.tile import Leaf
from tilus.layout import SharedLayout

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext

M, N = 1, 2


@dataclass(frozen=True)
class Operand:
    """An operand in memory, linear in each of its dims. steps: along the batch, the result's dim, and k."""

    name: str
    origin: int
    steps: tuple[int, int, int]

    def at(self, batch: str, index: str, k: str) -> str:
        parts = [f"({x}) * {s}" for x, s in zip((batch, index, k), self.steps, strict=True) if s and x != "0"]
        return " + ".join([f"{self.name}[{self.origin}", *parts]) + "]"


def operand(leaf: Leaf, dims: Sequence[int]) -> Operand:
    """An array whose every dim has one stride, as [batch, index, k]: `dims` of its layout."""
    steps = tuple(stride(leaf.layout, d, 1) if leaf.layout.shape[d] > 1 else 0 for d in dims)
    return Operand(leaf.name, leaf.layout.origin, (steps[0], steps[1], steps[2]))


def run_length(layout: SharedLayout, dim: int) -> int:
    """How many elements follow each other along a dim."""
    return next((t.size for t in layout.terms[dim] if t.weight == 1 and t.stride == 1), 1)


def registers(ctx: CContext) -> int:
    """Accumulators that registers hold beside operands."""
    return 12 if ctx.target.arch == "x86_64" and ctx.target.lanes < 16 else 24


class Block:
    """Accumulators of `columns` times `vectors` vectors of `lanes`, at some place of the result."""

    def __init__(
        self,
        ctx: CContext,
        lanes: int,
        vectors: int,
        columns: int,
        batch: str,
        first: str,
        column: str,
        target: Operand,
    ) -> None:
        self.writer = ctx.writer
        self.lanes = lanes
        self.places = {
            (i, j): target.at(batch, f"{first} + {i * lanes}", f"{column} + {j}")
            for i in range(vectors) for j in range(columns)
        }  # fmt: skip

    def open(self, reads: bool) -> None:
        kind = f"tl_f32x{self.lanes}"
        zero = "{0}" if self.lanes > 1 else "0"
        for (i, j), place in self.places.items():
            self.writer.line(f"{kind} c{i}_{j} = {f'tl_load_f32x{self.lanes}(&{place})' if reads else zero};")

    def add(self, column: int, element: str, vectors: Sequence[str]) -> None:
        x = self.writer.name("x")
        self.writer.line(f"const float {x} = {element};")
        for i, vector in enumerate(vectors):
            sum_ = f"c{i}_{column}"
            self.writer.line(f"{sum_} = tl_scaled_f32x{self.lanes}({vector}, {x}, {sum_});")

    def close(self) -> None:
        for (i, j), place in self.places.items():
            self.writer.line(f"tl_store_f32x{self.lanes}(&{place}, c{i}_{j});")
