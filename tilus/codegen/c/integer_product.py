"""Products of 8-bit integers by the dot products of four that processors have, or one by one.

x86 multiplies unsigned by signed bytes (VNNI), Arm signed by signed (DOTPROD). An operand of the other sign is shifted by 128
while it is brought into the order of the instruction, and sums of the other operand put that right:
sum (x + p) (y + q) = sum x y + q sum x + p sum y + k p q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilus.codegen.c.blocks import Operand, operand
from tilus.codegen.c.tile import Leaf
from tilus.dtypes import DataType, int32, uint8

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext

FOUR = 4
ROWS = 8  # of a block of accumulators


@dataclass(frozen=True)
class Factor:
    """An operand as an array, linear in each dim."""

    leaf: Leaf
    dtype: DataType


def integer_product(ctx: CContext, a: Factor, b: Factor, target: Leaf) -> None:
    """Add a [batch, m, k] times b [batch, k, n] to the int32 array [batch, m, n]; sums wrap."""
    k, n = a.leaf.layout.shape[2], b.leaf.layout.shape[2]
    lanes = ctx.target.lanes
    while lanes > FOUR and n % lanes:
        lanes //= 2
    if has_dot(ctx, lanes) and k % FOUR == 0 and n % lanes == 0:
        _ByFours(ctx, a, b, operand(target, (0, 1, 2)), lanes).emit()
    else:
        _one_by_one(ctx, a.leaf, b.leaf, target)


def has_dot(ctx: CContext, lanes: int) -> bool:
    """Whether the processor adds up four products of bytes in each of so many lanes."""
    features = ctx.target.features
    if "__ARM_FEATURE_DOTPROD" in features:
        return lanes == FOUR
    wide = "__AVX512VNNI__" in features and "__AVX512VL__" in features
    return wide or ("__AVXVNNI__" in features and lanes == 8)


def _one_by_one(ctx: CContext, a: Leaf, b: Leaf, target: Leaf) -> None:
    left, right, out = (operand(leaf, (0, 1, 2)) for leaf in (a, b, target))
    batch, m, k = a.layout.shape
    with ctx.writer.loops([batch, m, k, b.layout.shape[2]]) as (at, i, j, column):
        product = f"(int32_t){left.at(at, i, j)} * (int32_t){right.at(at, j, column)}"
        place = out.at(at, i, column)
        ctx.writer.line(f"{place} = (int32_t)((uint32_t){place} + (uint32_t)({product}));")


class _ByFours:
    def __init__(self, ctx: CContext, a: Factor, b: Factor, target: Operand, lanes: int) -> None:
        self.ctx, self.a, self.b, self.target, self.lanes = ctx, a, b, target, lanes
        self.batch, self.m, self.k = a.leaf.layout.shape
        self.n = b.leaf.layout.shape[2]
        left_is_signed = "__ARM_FEATURE_DOTPROD" in ctx.target.features
        # What is taken away from elements, so that they fit the instruction's type.
        self.p = (128 if left_is_signed else 0) if a.dtype.kind == "uint" else (0 if left_is_signed else -128)
        self.q = 128 if b.dtype.kind == "uint" else 0

    def emit(self) -> None:
        """One product of the batch after the other."""
        ctx, writer = self.ctx, self.ctx.writer
        left, right = (ctx.array(uint8, size, "bytes").name for size in (self.m * self.k, self.k * self.n))
        by_row, by_column = (ctx.array(int32, size, "sums").name for size in (self.m, self.n))
        with writer.loops([self.batch]) as (at,):
            writer.line(f"memset({by_row}, 0, sizeof {by_row}); memset({by_column}, 0, sizeof {by_column});")
            x = operand(self.a.leaf, (0, 1, 2)).at(at, "i", "j")
            with writer.block(f"for (int64_t i = 0; i < {self.m}; i++) for (int64_t j = 0; j < {self.k}; j++)"):
                writer.line(f"const int32_t x = {x} - ({self.p});")
                writer.line(f"{left}[i * {self.k} + j] = (uint8_t)x; {by_row}[i] += x;")
            self._interleave(at, right, by_column)
            self._blocks(at, left, right, by_row, by_column)

    def _interleave(self, at: str, right: str, by_column: str) -> None:
        """The right operand as [k / 4, n, 4]: words of four bytes, which vectorise."""
        writer, y = self.ctx.writer, operand(self.b.leaf, (0, 1, 2))
        with writer.block(f"for (int64_t j = 0; j < {self.k // FOUR}; j++) for (int64_t i = 0; i < {self.n}; i++)"):
            for part in range(FOUR):
                writer.line(f"const int32_t y{part} = {y.at(at, f'(j * {FOUR} + {part})', 'i')} - {self.q};")
            word = " | ".join(f"(uint32_t)(uint8_t)y{part} << {8 * part}" for part in range(FOUR))
            writer.line(f"((uint32_t *){right})[j * {self.n} + i] = {word};")
            writer.line(f"{by_column}[i] += {' + '.join(f'y{part}' for part in range(FOUR))};")

    def _blocks(self, at: str, left: str, right: str, by_row: str, by_column: str) -> None:
        writer, kind = self.ctx.writer, f"tl_i32x{self.lanes}"
        whole, rest = divmod(self.m, ROWS)
        for count, rows, start in ((whole, ROWS, 0), (1, rest, whole * ROWS)):
            if not count or not rows:
                continue
            with writer.block(), writer.loops([count, self.n // self.lanes]) as (block, vector):
                row, column = f"({block} * {rows} + {start})", f"{vector} * {self.lanes}"
                for i in range(rows):
                    writer.line(f"{kind} c{i} = {{0}};")
                with writer.block(f"for (int64_t j = 0; j < {self.k}; j += {FOUR})"):
                    writer.line(
                        f"const {kind} y = tl_load_i32x{self.lanes}({right} + j * {self.n} + {column} * {FOUR});"
                    )
                    for i in range(rows):
                        four = f"tl_u32({left} + ({row} + {i}) * {self.k} + j)"
                        writer.line(f"c{i} = tl_dot_i32x{self.lanes}(c{i}, {four}, y);")
                for i in range(rows):
                    with writer.block(f"for (int64_t lane = 0; lane < {self.lanes}; lane++)"):
                        place = self.target.at(at, f"{row} + {i}", f"{column} + lane")
                        shift = f"{self.q} * {by_row}[{row} + {i}] + {self.p} * {by_column}[{column} + lane]"
                        fixed = self.k * self.p * self.q
                        total = f"(uint32_t){place} + (uint32_t)c{i}[lane] + (uint32_t)({shift} + {fixed})"
                        writer.line(f"{place} = (int32_t)({total});")
