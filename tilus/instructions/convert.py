"""The same tile in another register layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilus.codegen.c.context import CContext
from tilus.codegen.context import EmitContext
from tilus.codegen.conversion import convert_words
from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.instruction import Instruction, expect_same_shape
from tilus.ir.layout_rules import LayoutPriority, LayoutRule, Moved, tile_conversion
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout
from tilus.layout.conversion import ConversionPlan


@dataclass(frozen=True, eq=False)
class Convert(Instruction):
    """The same tile in another layout, by the cheapest of renaming, permutes, shuffles and a trip through shared memory.

    Inserted by `infer_layouts`, or by the user.
    """

    mnemonic = "convert"
    layout_priority = LayoutPriority.MOVE

    out: RegisterTensor
    src: RegisterTensor

    def remark(self) -> str:
        """Whose layouts the two are."""
        return "" if self.src.origin is None or self.out.origin is None else f"{self.src.origin} -> {self.out.origin}"

    def verify(self) -> None:
        expect_same_shape("convert", self.out, self.src)
        if self.out.dtype != self.src.dtype:
            raise TilusError(
                f"convert of a tile of {self.src.dtype.name} to one of {self.out.dtype.name}, expected the same dtype",
                hint="change the dtype with tilus.cast",
            )

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, env.tile(self.src))

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return Moved(self.out, self.src, num_threads)

    def conversions(self) -> Sequence[ConversionPlan]:
        if self.src.layout is None or self.out.layout is None:
            return ()
        return (tile_conversion(self.src.dtype, self.src.layout, self.out.layout),)

    def emit_c(self, ctx: CContext) -> None:
        ctx.define(self.out, ctx.read(self.src))

    def emit(self, ctx: EmitContext) -> None:
        words = convert_words(ctx, self.src.dtype, ctx.words(self.src), ctx.layout(self.src), ctx.layout(self.out))
        ctx.define(self.out, words)


@builtin
def with_layout(b: IRBuilder, x: RegisterTensor, layout: RegisterLayout) -> RegisterTensor:
    """The same tile with its layout pinned; data moves only where the layout inferred for `x` differs."""
    return b.emit(Convert(b.tile(x.dtype, x.shape, layout), x)).out
