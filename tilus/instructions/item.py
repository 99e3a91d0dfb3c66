"""The element of a tile as a scalar: what a reduction found decides about loops, branches and addresses."""

from __future__ import annotations

from dataclasses import dataclass

from tilus.codegen.c.context import CContext
from tilus.codegen.context import EmitContext
from tilus.dtypes import f32, int32
from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Var
from tilus.ir.instruction import Instruction
from tilus.ir.layout_rules import LayoutRule, OneOf
from tilus.ir.tensor import RegisterTensor
from tilus.layout import replicated

SCALARS = (int32, f32)


@dataclass(frozen=True, eq=False)
class Item(Instruction):
    """The only element of a tile as a scalar of all threads, each of which has to hold it."""

    mnemonic = "item"

    out: Var
    src: RegisterTensor

    def verify(self) -> None:
        if self.src.size != 1:
            raise TilusError(
                f"item of a tile of shape {list(self.src.shape)}, expected one element",
                hint="reduce it first: tilus.item(tilus.max(x)); loops and branches on whole tiles are tilus.where",
            )
        if self.src.dtype not in SCALARS:
            names = " or ".join(dtype.name for dtype in SCALARS)
            raise TilusError(
                f"item of a tile of {self.src.dtype.name}, expected {names}", hint="cast it: x.to(tilus.f32)"
            )

    def layout_rule(self, num_threads: int) -> LayoutRule:
        everywhere = replicated(num_threads, self.src.rank)
        return OneOf(lambda known: [({self.src: everywhere}, 0)])

    def evaluate(self, env: Evaluation) -> None:
        value = env.tile(self.src)
        env.set_scalar(self.out, value.reshape(value.shape[:3]))

    def emit(self, ctx: EmitContext) -> None:
        (word,) = ctx.words(self.src)
        ctx.scalars.variables[self.out] = word

    def emit_c(self, ctx: CContext) -> None:
        leaf = ctx.read_array(self.src)
        ctx.define_scalar(self.out, leaf.source.element("0"))


@builtin
def item(b: IRBuilder, x: RegisterTensor) -> Var:
    """The only element of a tile of int32 or f32 as a scalar, for example that of a reduction over all axes.

    Loops, branches and offsets may depend on it. Threads exchange the element where not all of them hold it.
    """
    out = Var(b.fresh(x.name), x.dtype)
    b.emit(Item(out, x))
    return out
