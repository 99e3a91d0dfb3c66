"""Elementwise instructions: arithmetic, comparison, selection, and those that `math_functions` call by name.

Operands broadcast like numpy's: from the last dim, size 1 against any size. Each is computed in its own type; f16 and bf16
are computed two at a time where the hardware has the operation, otherwise in f32 with one rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilus.codegen.c.arithmetic import binary_text, compare_text, unary_text
from tilus.codegen.c.context import CContext
from tilus.codegen.c.tile import joined
from tilus.codegen.context import EmitContext
from tilus.codegen.lanes import SELECT
from tilus.dtypes import DataType, bf16, boolean, f16, f32, tf32
from tilus.errors import TilusError
from tilus.instructions.arithmetic import (
    FLOAT_FUNCTIONS,
    NUMPY_BINARY,
    NUMPY_UNARY,
    emit_binary,
    emit_compare,
    emit_unary,
)
from tilus.instructions.fill import Full
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Array, Evaluation
from tilus.ir.expr import BINARY_OPS, COMPARISONS, UNARY_OPS, Expr, Number, as_expr, binary, cast, unary
from tilus.ir.instruction import Instruction
from tilus.ir.layout_rules import Elementwise, LayoutRule
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout, slot_map
from tilus.ptx.module import Imm, Reg

Tile = RegisterTensor
Value = RegisterTensor | Expr | Number


def broadcast_shapes(what: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The numpy broadcast of shapes.

    Raises: TilusError naming the shapes when they do not broadcast.
    """
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise TilusError(
            f"{what}: shapes {' and '.join(str(list(s)) for s in shapes)} do not broadcast",
            hint="dims are matched from the last one; they must be equal or 1: reduce with keepdims=True, or "
            "tilus.reshape(x, [n, 1])",
        ) from None


class Pointwise(Instruction):
    """Instructions whose result element depends on the same (broadcast) element of every operand: one layout rule."""

    out: RegisterTensor

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return Elementwise(self.out, self.register_operands, num_threads)


def _expanded_rank(layout: RegisterLayout, rank: int) -> RegisterLayout:
    while layout.rank < rank:
        layout = layout.unsqueeze(0)
    return layout


def operand_words(ctx: EmitContext, operand: RegisterTensor, target: RegisterLayout) -> list[Reg]:
    """The operand's registers in the slot order of a (broadcast) result layout."""
    own = _expanded_rank(ctx.layout(operand), target.rank)
    if own == target:
        return ctx.words(operand)
    return ctx.pick(operand.dtype, ctx.words(operand), slot_map(target, own))


def rank_aligned(value: Array, rank: int, to: int) -> Array:
    """A tile value with size-1 axes put in front of its tile axes, so that it broadcasts against rank `to`."""
    return value.reshape(*value.shape[:3], *(1,) * (to - rank), *value.shape[3:])


@dataclass(frozen=True, eq=False)
class BinaryTile(Pointwise):
    """`out = lhs op rhs` for + - * / // % min max & | ^ << >>; both operands have the dtype of the result."""

    mnemonic = "binary"

    out: RegisterTensor
    op: str
    lhs: RegisterTensor
    rhs: RegisterTensor

    def verify(self) -> None:
        _same_dtype(self.op, self.lhs, self.rhs)
        _check_op(self.op, self.lhs.dtype)

    def evaluate(self, env: Evaluation) -> None:
        rank = self.out.rank
        a = rank_aligned(env.tile(self.lhs), self.lhs.rank, rank)
        c = rank_aligned(env.tile(self.rhs), self.rhs.rank, rank)
        env.set_tile(self.out, _rounded(NUMPY_BINARY[self.op](a, c), self.out.dtype))

    def emit(self, ctx: EmitContext) -> None:
        layout = ctx.layout(self.out)
        a, c = operand_words(ctx, self.lhs, layout), operand_words(ctx, self.rhs, layout)
        ctx.define(self.out, emit_binary(ctx, self.op, self.out.dtype, a, c, layout.num_locals))

    def emit_c(self, ctx: CContext) -> None:
        op, dtype, operands = self.op, self.out.dtype, [ctx.read(self.lhs), ctx.read(self.rhs)]
        tile = joined(
            dtype, self.out.shape, operands, lambda e: binary_text(op, dtype, e[0], e[1]), unrounded=dtype.is_float
        )
        ctx.define(self.out, tile)


@dataclass(frozen=True, eq=False)
class CompareTile(Pointwise):
    """`out = lhs op rhs` for the six comparisons; the result is boolean."""

    mnemonic = "compare"

    out: RegisterTensor
    op: str
    lhs: RegisterTensor
    rhs: RegisterTensor

    def verify(self) -> None:
        _same_dtype(self.op, self.lhs, self.rhs)

    def evaluate(self, env: Evaluation) -> None:
        rank = self.out.rank
        a = rank_aligned(env.tile(self.lhs), self.lhs.rank, rank)
        c = rank_aligned(env.tile(self.rhs), self.rhs.rank, rank)
        env.set_tile(self.out, NUMPY_BINARY[self.op](a, c))

    def emit(self, ctx: EmitContext) -> None:
        layout = ctx.layout(self.out)
        a, c = operand_words(ctx, self.lhs, layout), operand_words(ctx, self.rhs, layout)
        ctx.define(self.out, emit_compare(ctx, self.op, self.lhs.dtype, a, c, layout.num_locals))

    def emit_c(self, ctx: CContext) -> None:
        op, operands = self.op, [ctx.read(self.lhs), ctx.read(self.rhs)]
        ctx.define(self.out, joined(boolean, self.out.shape, operands, lambda e: compare_text(op, e[0], e[1])))


@dataclass(frozen=True, eq=False)
class UnaryTile(Pointwise):
    """`out = op(src)`: neg, abs, not, and for floats those of `FLOAT_FUNCTIONS` (exp, log2, sqrt, tanh, floor ...)."""

    mnemonic = "unary"

    out: RegisterTensor
    op: str
    src: RegisterTensor

    def verify(self) -> None:
        if self.op in FLOAT_FUNCTIONS and not self.src.dtype.is_float:
            raise TilusError(
                f"{self.op} of a tile of {self.src.dtype.name}, expected a float type",
                hint="cast it first: tilus.cast(tile, tilus.f32)",
            )
        _check_op(self.op, self.src.dtype)

    def evaluate(self, env: Evaluation) -> None:
        with np.errstate(all="ignore"):
            env.set_tile(self.out, _rounded(NUMPY_UNARY[self.op](env.tile(self.src)), self.out.dtype))

    def emit(self, ctx: EmitContext) -> None:
        layout = ctx.layout(self.out)
        words = operand_words(ctx, self.src, layout)
        ctx.define(self.out, emit_unary(ctx, self.op, self.out.dtype, words, layout.num_locals))

    def emit_c(self, ctx: CContext) -> None:
        op, dtype, operands = self.op, self.out.dtype, [ctx.read(self.src)]
        tile = joined(dtype, self.out.shape, operands, lambda e: unary_text(op, dtype, e[0]), unrounded=dtype.is_float)
        ctx.define(self.out, tile)


@dataclass(frozen=True, eq=False)
class FusedMultiplyAdd(Pointwise):
    """`out = x * y + z` with one rounding (the reference execution rounds f16 and bf16 from f32, so at most one ulp off)."""

    mnemonic = "fma"

    out: RegisterTensor
    x: RegisterTensor
    y: RegisterTensor
    z: RegisterTensor

    def verify(self) -> None:
        _same_dtype("fma", self.x, self.y)
        _same_dtype("fma", self.x, self.z)
        if self.x.dtype not in (f16, bf16, f32):
            raise TilusError(f"fma of tiles of {self.x.dtype.name}, expected f16, bf16 or f32")

    def evaluate(self, env: Evaluation) -> None:
        x, y, z = (rank_aligned(env.tile(t), t.rank, self.out.rank) for t in (self.x, self.y, self.z))
        env.set_tile(self.out, _rounded(x * y + z, self.out.dtype))

    def emit(self, ctx: EmitContext) -> None:
        layout, dtype = ctx.layout(self.out), self.out.dtype
        kind = "f32" if dtype == f32 else f"{dtype.name}x2"
        sources = [operand_words(ctx, t, layout) for t in (self.x, self.y, self.z)]
        words = [ctx.b.emit(f"fma.rn.{kind}", x, y, z) for x, y, z in zip(*sources, strict=True)]
        ctx.define(self.out, words)

    def emit_c(self, ctx: CContext) -> None:
        operands = [ctx.read(t) for t in (self.x, self.y, self.z)]
        tile = joined(
            self.out.dtype, self.out.shape, operands, lambda e: f"__builtin_fmaf({', '.join(e)})", unrounded=True
        )
        ctx.define(self.out, tile)


@dataclass(frozen=True, eq=False)
class Where(Pointwise):
    """`out = on_true where cond, else on_false`, elementwise."""

    mnemonic = "where"

    out: RegisterTensor
    cond: RegisterTensor
    on_true: RegisterTensor
    on_false: RegisterTensor

    def verify(self) -> None:
        if self.cond.dtype != boolean:
            raise TilusError(f"where: the condition is a tile of {self.cond.dtype.name}, expected boolean")
        _same_dtype("where", self.on_true, self.on_false)

    def evaluate(self, env: Evaluation) -> None:
        sides = (rank_aligned(env.tile(t), t.rank, self.out.rank) for t in (self.cond, self.on_true, self.on_false))
        env.set_tile(self.out, np.where(*sides))

    def emit(self, ctx: EmitContext) -> None:
        layout, dtype = ctx.layout(self.out), self.out.dtype
        preds = operand_words(ctx, self.cond, layout)
        a, c = operand_words(ctx, self.on_true, layout), operand_words(ctx, self.on_false, layout)
        ctx.define(self.out, select_words(ctx, dtype, preds, a, c))

    def emit_c(self, ctx: CContext) -> None:
        operands = [ctx.read(t) for t in (self.cond, self.on_true, self.on_false)]
        tile = joined(self.out.dtype, self.out.shape, operands, lambda e: f"({e[0]} ? {e[1]} : {e[2]})")
        ctx.define(self.out, tile)


def select_words(
    ctx: EmitContext, dtype: DataType, preds: Sequence[Reg], a: Sequence[Reg], c: Sequence[Reg]
) -> list[Reg]:
    """Words whose slot i comes from `a` where `preds[i]`, else from `c`."""
    b = ctx.b
    if dtype == boolean:
        both = [b.emit("and.pred", p, x) for p, x in zip(preds, a, strict=True)]
        other = [b.emit("and.pred", b.emit("not.pred", p), y) for p, y in zip(preds, c, strict=True)]
        return [b.emit("or.pred", x, y) for x, y in zip(both, other, strict=True)]
    if dtype.nbits >= 32:
        return [b.emit(f"selp.b{dtype.nbits}", x, y, p) for p, x, y in zip(preds, a, c, strict=True)]
    if 32 % dtype.nbits == 0:
        lanes = 32 // dtype.nbits
        masks = [_lane_mask(ctx, dtype.nbits, preds[i : i + lanes]) for i in range(0, len(preds), lanes)]
        return [b.emit("lop3.b32", y, x, m, Imm(SELECT)) for x, y, m in zip(a, c, masks, strict=True)]
    codes = [
        b.emit("selp.b32", ctx.extract(dtype.nbits, a, i), ctx.extract(dtype.nbits, c, i), p)
        for i, p in enumerate(preds)
    ]
    return ctx.pack(dtype.nbits, codes)


def _lane_mask(ctx: EmitContext, nbits: int, preds: Sequence[Reg]) -> Reg:
    """All bits of those lanes of a word whose predicate holds. Words with the same predicates share it."""
    b, whole = ctx.b, (1 << nbits) - 1
    parts = [b.pure("selp.b32", Imm(whole << nbits * lane), Imm(0), pred) for lane, pred in enumerate(preds)]
    return functools.reduce(lambda x, y: b.pure("or.b32", x, y), parts)


def _same_dtype(what: str, a: RegisterTensor, c: RegisterTensor) -> None:
    if a.dtype != c.dtype:
        raise TilusError(
            f"{what}: operands of {a.dtype.name} and {c.dtype.name}",
            hint=f"cast one of them, for example tilus.cast(x, tilus.{a.dtype.name})",
        )


_BITWISE = ("&", "|", "^", "<<", ">>")


def _check_op(op: str, dtype: DataType) -> None:
    if dtype.is_small:
        raise TilusError(
            f"{op} on tiles of {dtype.name}: arithmetic is done in 16 or more bits",
            hint="cast to f16, f32 or int32 first, and back afterwards",
        )
    if dtype == tf32:
        raise TilusError(
            f"{op} on tiles of tf32, which tensor cores multiply", hint="cast to f32 first, and back afterwards"
        )
    if dtype == boolean and op not in ("&", "|", "^", "not"):
        raise TilusError(f"{op} on boolean tiles, expected & | ^ or not")
    if dtype.is_float and op in _BITWISE:
        raise TilusError(f"{op} on tiles of {dtype.name}, expected integers", hint="use tilus.view to get at the bits")


def _rounded(value: Array, dtype: DataType) -> Array:
    """Values rounded once to the dtype (integers wrap like the registers)."""
    if dtype.is_float:
        return dtype.round(value) if dtype != f32 else value.astype(np.float32, copy=False)
    return value.astype(dtype.compute, copy=False)


# What users call.


def as_tile(b: IRBuilder, value: Value, like: RegisterTensor) -> RegisterTensor:
    if isinstance(value, RegisterTensor):
        return value
    expr = as_expr(value)
    if expr.dtype.is_float and not like.dtype.is_float:
        raise TilusError(
            f"a tile of {like.dtype.name} meets the float {expr}",
            hint="cast the tile to a float type, or use an integer",
        )
    if like.dtype != boolean and (like.dtype.is_float or not expr.dtype.is_float):
        expr = cast(expr, f32) if like.dtype.is_float else expr
    return b.emit(Full(b.tile(like.dtype, (1,) * like.rank, name="c"), expr)).out


def binary_op(b: IRBuilder, op: str, lhs: Value, rhs: Value) -> RegisterTensor | Expr:
    """`lhs op rhs` for any mix of tiles and scalars; a scalar takes the tile's dtype."""
    if not isinstance(lhs, RegisterTensor) and not isinstance(rhs, RegisterTensor):
        if op not in BINARY_OPS:
            raise TilusError(f"unknown operation {op!r}")
        return binary(op, lhs, rhs)
    like = lhs if isinstance(lhs, RegisterTensor) else rhs
    if not isinstance(like, RegisterTensor):
        raise TilusError(f"{op} needs at least one tile")
    op = {"and": "&", "or": "|"}.get(op, op)
    a, c = as_tile(b, lhs, like), as_tile(b, rhs, like)
    shape = broadcast_shapes(op, a.shape, c.shape)
    if op in COMPARISONS:
        return b.emit(CompareTile(b.tile(boolean, shape), op, a, c)).out
    if op == "/" and not like.dtype.is_float:
        raise TilusError(f"/ on tiles of {like.dtype.name}", hint="use //, or cast to a float type")
    return b.emit(BinaryTile(b.tile(like.dtype, shape), op, a, c)).out


def unary_op(b: IRBuilder, op: str, value: Value) -> RegisterTensor | Expr:
    if not isinstance(value, RegisterTensor):
        if op not in UNARY_OPS:
            return _scalar_function(op, as_expr(value))
        return unary(op, value)
    return b.emit(UnaryTile(b.tile(value.dtype, value.shape), op, value)).out


def _scalar_function(op: str, value: Expr) -> Expr:
    raise TilusError(f"{op} of the scalar {value}; scalars have {', '.join(sorted(UNARY_OPS))}")


@builtin
def where(b: IRBuilder, cond: RegisterTensor, on_true: Value, on_false: Value) -> RegisterTensor:
    """`on_true` where the boolean tile `cond` holds, else `on_false`; tiles or scalars, at least one of them a tile."""
    like = on_true if isinstance(on_true, RegisterTensor) else on_false
    if not isinstance(like, RegisterTensor):
        raise TilusError("where: both sides are scalars, so their dtype is unknown", hint="make one a tile: tilus.full")
    a, c = as_tile(b, on_true, like), as_tile(b, on_false, like)
    shape = broadcast_shapes("where", cond.shape, a.shape, c.shape)
    return b.emit(Where(b.tile(like.dtype, shape), cond, a, c)).out


@builtin
def fma(b: IRBuilder, x: RegisterTensor, y: Value, z: Value) -> RegisterTensor:
    """`x * y + z` with one rounding, elementwise on f16, bf16 or f32."""
    c, d = as_tile(b, y, x), as_tile(b, z, x)
    shape = broadcast_shapes("fma", x.shape, c.shape, d.shape)
    return b.emit(FusedMultiplyAdd(b.tile(x.dtype, shape), x, c, d)).out
