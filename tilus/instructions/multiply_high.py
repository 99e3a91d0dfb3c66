"""The upper halves of products of integers, which counter-based random numbers and divisions by constants are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tilus.codegen.c.context import CContext
from tilus.codegen.c.tile import joined
from tilus.codegen.context import EmitContext
from tilus.dtypes import int32, uint32
from tilus.errors import TilusError
from tilus.instructions.elementwise import Pointwise, Value, as_tile, broadcast_shapes, operand_words, rank_aligned
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.tensor import RegisterTensor


@dataclass(frozen=True, eq=False)
class MultiplyHigh(Pointwise):
    """`out = (lhs * rhs) >> 32` of the exact product, for tiles of int32 or uint32."""

    mnemonic = "multiply_high"

    out: RegisterTensor
    lhs: RegisterTensor
    rhs: RegisterTensor

    def verify(self) -> None:
        if self.lhs.dtype != self.rhs.dtype or self.lhs.dtype not in (int32, uint32):
            raise TilusError(
                f"multiply_high of tiles of {self.lhs.dtype.name} and {self.rhs.dtype.name}, expected int32 or uint32, both "
                "the same",
                hint="cast them first: tilus.cast(tile, tilus.uint32)",
            )

    def evaluate(self, env: Evaluation) -> None:
        wide = np.int64 if self.out.dtype == int32 else np.uint64
        a, c = (rank_aligned(env.tile(t), t.rank, self.out.rank).astype(wide) for t in (self.lhs, self.rhs))
        env.set_tile(self.out, ((a * c) >> wide(32)).astype(self.out.dtype.compute))

    def emit(self, ctx: EmitContext) -> None:
        layout, sign = ctx.layout(self.out), "s" if self.out.dtype == int32 else "u"
        a, c = operand_words(ctx, self.lhs, layout), operand_words(ctx, self.rhs, layout)
        ctx.define(self.out, [ctx.b.emit(f"mul.hi.{sign}32", x, y) for x, y in zip(a, c, strict=True)])

    def emit_c(self, ctx: CContext) -> None:
        narrow, wide = ("int32_t", "int64_t") if self.out.dtype == int32 else ("uint32_t", "uint64_t")
        operands = [ctx.read(self.lhs), ctx.read(self.rhs)]
        tile = joined(
            self.out.dtype, self.out.shape, operands, lambda e: f"({narrow})((({wide}){e[0]} * ({wide}){e[1]}) >> 32)"
        )
        ctx.define(self.out, tile)


@builtin
def multiply_high(b: IRBuilder, x: RegisterTensor, y: Value) -> RegisterTensor:
    """The upper 32 of the 64 bits of `x * y`, elementwise on int32 or uint32; `x * y` itself keeps the lower ones."""
    other = as_tile(b, y, x)
    shape = broadcast_shapes("multiply_high", x.shape, other.shape)
    return b.emit(MultiplyHigh(b.tile(x.dtype, shape), x, other)).out
