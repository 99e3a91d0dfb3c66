"""A scalar in every slot of a 32-bit (or 64-bit) word."""

from __future__ import annotations

import numpy as np

from tilus.codegen.context import EmitContext
from tilus.dtypes import DataType, bf16, f16, f32, tf32
from tilus.errors import TilusError
from tilus.ir.expr import Const, Expr, cast
from tilus.ptx.module import Imm, Reg, RegClass


def splat_word(ctx: EmitContext, dtype: DataType, value: Expr) -> Reg:
    """A register whose every slot of `dtype` holds the scalar, rounded to the type.

    Raises: TilusError for a run-time scalar in a type below 16 bits.
    """
    if isinstance(value, Const):
        return _constant(ctx, dtype, value.value)
    b = ctx.b
    if dtype in (f16, bf16):
        single = ctx.scalars.value(cast(value, f32))
        return b.pure(f"cvt.rn.{dtype.name}x2.f32", single, single, out=RegClass.B32)
    if dtype == tf32:
        return b.pure("cvt.rna.tf32.f32", ctx.scalars.value(cast(value, f32)), out=RegClass.B32)
    if dtype.nbits == 64:
        return b.pure("cvt.s64.s32", ctx.integer(value))
    if dtype.nbits == 32:
        operand = ctx.scalars.value(cast(value, f32) if dtype.is_float else value)
        return operand if isinstance(operand, Reg) else b.pure("mov.b32", operand)
    if dtype.nbits == 16:
        low = ctx.integer(value)
        return b.pure("prmt.b32", low, low, Imm(0x1010))
    raise TilusError(f"a run-time scalar cannot fill a tile of {dtype.name}", hint="fill a f32 tile and cast it")


def _constant(ctx: EmitContext, dtype: DataType, value: float) -> Reg:
    code = int(dtype.encode(np.asarray([value], dtype=np.float64 if dtype.is_float else np.int64))[0])
    if dtype.nbits == 64:
        return ctx.b.const(code, RegClass.B64)
    word = 0
    for shift in range(0, 32, dtype.nbits):
        word |= code << shift
    if 32 % dtype.nbits and code != 0:
        raise TilusError(f"a tile of {dtype.name} can only be filled with zero", hint="fill a f32 tile and cast it")
    return ctx.b.const(word & 0xFFFFFFFF)
