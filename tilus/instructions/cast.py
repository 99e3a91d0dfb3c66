"""Conversion of a tile's elements to another type."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tilus.codegen.c.context import CContext
from tilus.codegen.c.numbers import converted
from tilus.codegen.c.tile import Tile, first, joined
from tilus.codegen.cast_plan import plan_slots
from tilus.codegen.context import EmitContext, num_words
from tilus.dtypes import DataType, boolean, f32, int32
from tilus.errors import TilusError
from tilus.instructions.elementwise import Pointwise
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Array, Evaluation
from tilus.ir.expr import Expr, as_expr
from tilus.ir.expr import cast as cast_scalar
from tilus.ir.instruction import expect_same_shape
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout, slot_map
from tilus.ptx.module import FloatImm, Imm, Reg


@dataclass(frozen=True, eq=False)
class Cast(Pointwise):
    """`out = dtype(src)`: to floats rounded to nearest even; to integers and to floats without infinity also saturated.

    The result may hold a thread's elements in another local order than the operand. Codes whose order is free are cast for less
    in packed order: `unpack_codes`.
    """

    mnemonic = "cast"

    out: RegisterTensor
    src: RegisterTensor

    def verify(self) -> None:
        expect_same_shape("cast", self.out, self.src)
        if self.out.dtype == boolean:
            raise TilusError(f"cast of a tile of {self.src.dtype.name} to boolean", hint="compare it: x != 0")

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, convert_values(env.tile(self.src), self.src.dtype, self.out.dtype))

    def emit(self, ctx: EmitContext) -> None:
        src, dst = self.src.dtype, self.out.dtype
        layout, own = ctx.layout(self.out), ctx.layout(self.src)
        slots = list(range(layout.num_locals)) if layout == own else list(slot_map(layout, own))
        words = ctx.words(self.src)
        if src == boolean:
            ctx.define(self.out, _from_boolean(ctx, dst, words, slots))
        elif 64 in (src.nbits, dst.nbits):
            ctx.define(self.out, _through_64(ctx, src, dst, ctx.pick(src, words, slots), len(slots)))
        elif src == dst:
            ctx.define(self.out, ctx.pick(src, words, slots))
        else:
            plan = plan_slots(src, dst, ctx.target, len(words), slots)
            ctx.define(self.out, plan.emit(ctx.b, words))
            if src.nbits <= 8 or dst.nbits <= 8:
                ctx.note(self, plan.summary())

    def emit_c(self, ctx: CContext) -> None:
        ctx.define(self.out, cast_tile(ctx, ctx.read(self.src), self.out.dtype))


def cast_tile(ctx: CContext, tile: Tile, dtype: DataType) -> Tile:
    """A tile's values as those of another type, while C is written."""
    ctx.needs_values_of(dtype)
    src = tile.dtype
    unrounded = converted(src, dtype, "")[1]
    if src.is_float and dtype.is_float and not unrounded:  # floats of all types look alike
        return joined(dtype, tile.shape, [tile], first) if tile.unrounded else replace(tile, dtype=dtype)
    return joined(dtype, tile.shape, [tile], lambda e: converted(src, dtype, e[0])[0], unrounded=unrounded)


def convert_values(value: Array, src: DataType, dst: DataType) -> Array:
    """Values of one type as values of another, with the rounding of `DataType.encode`."""
    if src == dst:
        return value
    if dst.is_float and (src.is_float or src.nbits <= 16) and _holds_exactly(src, dst):
        return value.astype(dst.compute)
    if dst.is_float:
        return dst.round(value.astype(np.float64) if src.nbits >= 32 and not src.is_float else value).astype(
            dst.compute
        )
    return dst.decode(dst.encode(value))


def _holds_exactly(src: DataType, dst: DataType) -> bool:
    """Whether every value of `src` is a value of the float type `dst`."""
    if dst == f32:
        return src.is_float or src.nbits <= 16
    if src.is_float:
        return src.is_small and src.exponent_nbits <= dst.exponent_nbits and src.mantissa_nbits <= dst.mantissa_nbits
    return src.nbits <= dst.mantissa_nbits + 1


def _from_boolean(ctx: EmitContext, dst: DataType, preds: list[Reg], slots: list[int]) -> list[Reg]:
    one = FloatImm(0x3F800000) if dst.is_float else Imm(1)
    zero = FloatImm(0) if dst.is_float else Imm(0)
    wide = [ctx.b.emit("selp.b32", one, zero, preds[slot]) for slot in slots]
    return ctx.cast(f32 if dst.is_float else int32, dst, wide, len(wide))


def _through_64(ctx: EmitContext, src: DataType, dst: DataType, words: list[Reg], count: int) -> list[Reg]:
    """Casts to and from 64-bit integers go through 32-bit integers of the same sign."""
    if src.is_float or dst.is_float:
        raise TilusError(f"cast from {src.name} to {dst.name}", hint="go through int32")
    if dst.nbits == 64:
        narrow = words if src.nbits == 32 else ctx.cast(src, int32, words, count)
        return [ctx.b.emit("cvt.s64.s32" if src.is_signed else "cvt.u64.u32", w) for w in narrow[:count]]
    if dst.nbits == 32 and src.nbits == 64:
        return [ctx.b.emit("cvt.sat.s32.s64" if dst.is_signed else "cvt.sat.u32.u64", w) for w in words]
    if src.nbits == 64 and src.is_signed == dst.is_signed and num_words(src, count) == num_words(dst, count):
        return words
    raise TilusError(f"cast from {src.name} to {dst.name}", hint="go through int32")


@builtin
def cast(
    b: IRBuilder, x: RegisterTensor | Expr | float, dtype: DataType, *, layout: RegisterLayout | None = None
) -> RegisterTensor | Expr:
    """A tile or scalar in another type: rounded to nearest even, saturated where the type has no infinity.

    layout: pins the result's layout, which may have another local order than the operand's.
    """
    if not isinstance(x, RegisterTensor):
        return cast_scalar(as_expr(x), dtype)
    if x.dtype == dtype and layout is None:
        return x
    return b.emit(Cast(b.tile(dtype, x.shape, layout), x)).out
