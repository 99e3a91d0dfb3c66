"""Reductions of tiles along axes: sum, max, min, and any and all of boolean tiles.

Each thread first reduces its own elements as a balanced tree, then the lanes of a warp exchange partial results by butterfly
shuffles, and what is left (partial results of other warps, digits that are no power of two) is converted to a layout in which
each thread holds all the parts that it combines. The order depends on nothing but the layout, and all threads that hold a
result hold the same bits.

The functions at the end of this file hide Python's `sum`, `max`, `min`, `any` and `all` in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

from tilus.codegen.c import reduction as c_reduction
from tilus.codegen.c.context import CContext
from tilus.codegen.context import EmitContext
from tilus.codegen.conversion import stream_words
from tilus.dtypes import DataType, boolean, f32, int32, uint32
from tilus.errors import TilusError
from tilus.instructions.arithmetic import emit_binary
from tilus.instructions.cast import cast_tile, convert_values
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Array, Evaluation
from tilus.ir.instruction import Instruction
from tilus.ir.layout_rules import Derived, LayoutRule, tile_conversion
from tilus.ir.tensor import RegisterTensor
from tilus.layout import Digit, RegisterLayout
from tilus.layout.conversion import ConversionPlan
from tilus.layout.word_program import SHUFFLE_CYCLES
from tilus.ptx.module import Imm, Reg

WARP = 32
FULL_MASK = 0xFFFFFFFF

# By name: the operation on registers (elementwise names; bits of 32 for booleans), and the numpy reduction.
_OPERATIONS: dict[str, tuple[str, Callable[..., Array]]] = {
    "sum": ("+", np.add.reduce),
    "max": ("max", np.fmax.reduce),
    "min": ("min", np.fmin.reduce),
    "any": ("|", np.logical_or.reduce),
    "all": ("&", np.logical_and.reduce),
}


def accumulator_dtype(dtype: DataType) -> DataType:
    """The type in which elements are combined: f32 for floats, 32-bit integers for integers and booleans."""
    if dtype.is_float:
        return f32
    return int32 if dtype.kind == "int" else uint32


def result_dtype(op: str, dtype: DataType) -> DataType:
    """The type of a reduction: sums of integers and of 8-bit floats have 32 bits, everything else keeps its type."""
    return accumulator_dtype(dtype) if op == "sum" and (dtype.is_integer or dtype.is_small) else dtype


@dataclass(frozen=True)
class Plan:
    """How a layout is reduced.

    partial: what a thread holds after the shuffles; shape [parts, *shape with reduced axes 1]. lane_masks: of the butterfly
    shuffles. groups: for each slot of `partial`, the source slots that the thread combines.
    """

    partial: RegisterLayout
    lane_masks: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def parts(self) -> int:
        """How many partial results remain for each element."""
        return self.partial.shape[0]


@lru_cache(maxsize=1024)
def plan_reduction(layout: RegisterLayout, axes: tuple[int, ...]) -> Plan:
    """Split the digits of the reduced axes into slots, lanes that a butterfly reaches, and the rest."""
    threads: list[Digit] = []
    masks: list[int] = []
    parts = 1
    for term in reversed(layout.thread_terms):  # innermost first
        if term.dim not in axes:
            threads.append(Digit(term.size, None if term.dim is None else term.dim + 1, term.weight))
            continue
        inside = lanes_of(term.stride, term.size)
        masks += [term.stride << i for i in range(inside.bit_length() - 1)]
        rest = term.size // inside
        threads += [Digit(inside, None, 0), *([Digit(rest, 0, parts)] if rest > 1 else [])]
        parts *= rest
    kept = [d for d in layout.local_digits if d.dim is not None and d.dim not in axes]
    shape = tuple(1 if d in axes else n for d, n in enumerate(layout.shape))
    partial = RegisterLayout(
        (parts, *shape), tuple(reversed(threads)), tuple(Digit(d.size, (d.dim or 0) + 1, d.weight) for d in kept)
    )
    return Plan(partial, tuple(masks), _groups(layout, axes, partial))


def lanes_of(stride: int, size: int) -> int:
    """The largest power-of-two part of a thread digit `(t // stride) % size` that XORs of lane numbers walk through."""
    if stride & (stride - 1) or stride >= WARP:
        return 1
    return math.gcd(size, WARP // stride)


def _groups(layout: RegisterLayout, axes: Sequence[int], partial: RegisterLayout) -> tuple[tuple[int, ...], ...]:
    """The source slots of each partial slot; an element that a thread holds twice counts once."""
    first = layout.table()[0]  # the slots of thread 0; those of the others are shifted by what the thread decides
    slots: dict[tuple[int, ...], int] = {}
    for slot, index in enumerate(first.tolist()):
        slots.setdefault(tuple(index), slot)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, slot in slots.items():
        groups.setdefault(tuple(0 if d in axes else i for d, i in enumerate(index)), []).append(slot)
    return tuple(tuple(groups[tuple(index[1:])]) for index in partial.table()[0].tolist())


@dataclass(frozen=True, eq=False)
class Reduce(Instruction):
    """`out = op(src)` over `axes`, for op sum, max, min, any, all; the axes vanish, or get size 1 with `keepdims`.

    Floats are combined in f32 and rounded once; integers in 32 bits (see `result_dtype`; sums wrap). Of a number and NaN,
    max and min take the number. Result layout: the source's, with the threads of the reduced axes as replicas.
    """

    mnemonic = "reduce"

    out: RegisterTensor
    src: RegisterTensor
    axes: tuple[int, ...]
    op: str
    keepdims: bool = False

    def verify(self) -> None:
        if self.op not in _OPERATIONS:
            raise TilusError(f"reduction {self.op!r}, expected one of {', '.join(_OPERATIONS)}")
        rank = self.src.rank
        if len(set(self.axes)) != len(self.axes) or not set(self.axes) <= set(range(rank)):
            raise TilusError(f"{self.op} over axes {list(self.axes)} of a tile of rank {rank}, expected distinct axes")
        _check_dtype(self.op, self.src.dtype)
        shape, dtype = reduced_shape(self.src.shape, self.axes, self.keepdims), result_dtype(self.op, self.src.dtype)
        if (self.out.shape, self.out.dtype) != (shape, dtype):
            raise TilusError(
                f"{self.op} over axes {list(self.axes)} of {self.src.dtype.name}{list(self.src.shape)} is "
                f"{dtype.name}{list(shape)}, the result is {self.out.dtype.name}{list(self.out.shape)}"
            )

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return Derived(self.out, self.src, self._natural, self._exchange_cycles, num_threads)

    def _natural(self, layout: RegisterLayout) -> RegisterLayout:
        """The result's layout that needs no exchange beyond the reduction itself; no thread holds a value twice."""
        reduced = layout.reduce(self.axes, self.keepdims)
        slots = tuple(d for d in reduced.local_digits if d.dim is not None)
        return RegisterLayout(reduced.shape, reduced.thread_digits, slots)

    def evaluate(self, env: Evaluation) -> None:
        value = env.tile(self.src)
        accumulator = boolean if self.src.dtype == boolean else accumulator_dtype(self.src.dtype)
        value = value.astype(accumulator.compute, copy=False)
        with np.errstate(all="ignore"):
            axes = tuple(3 + axis for axis in self.axes)
            total = _OPERATIONS[self.op][1](value, axis=axes, dtype=value.dtype, keepdims=self.keepdims)
        env.set_tile(self.out, convert_values(total, accumulator, self.out.dtype))

    def conversions(self) -> Sequence[ConversionPlan]:
        """How partial results reach the threads that combine or hold them; none where these have them."""
        if self.src.layout is None or self.out.layout is None:
            return ()
        conversion = self._exchange(plan_reduction(self.src.layout, self.axes), self.out.layout)
        return () if conversion.slots is not None else (conversion,)

    def _exchange(self, plan: Plan, out: RegisterLayout) -> ConversionPlan:
        return tile_conversion(uint32, plan.partial, self._with_parts(plan, out))

    def _exchange_cycles(self, src: RegisterLayout, out: RegisterLayout) -> int:
        plan = plan_reduction(src, self.axes)
        shuffles = len(plan.lane_masks) * len(plan.groups)
        return SHUFFLE_CYCLES * shuffles + math.ceil(self._exchange(plan, out).chosen.cycles)

    def _with_parts(self, plan: Plan, out: RegisterLayout) -> RegisterLayout:
        """The result's layout with the axes of `Plan.partial`; each thread holds all parts, in its innermost slots."""
        for axis in () if self.keepdims else sorted(self.axes):
            out = out.unsqueeze(axis)
        return out.unsqueeze(0).local(plan.parts, *(1,) * out.rank)

    def emit(self, ctx: EmitContext) -> None:
        plan = plan_reduction(ctx.layout(self.src), self.axes)
        accumulator = accumulator_dtype(self.src.dtype)
        name = _OPERATIONS[self.op][0]

        def combine(x: Reg, y: Reg) -> Reg:
            return emit_binary(ctx, name, accumulator, [x], [y], 1)[0]

        words = _widened(ctx, self.src, accumulator)
        values = [_tree([words[slot] for slot in group], combine) for group in plan.groups]
        for mask in plan.lane_masks:
            values = [combine(value, butterfly(ctx, value, mask)) for value in values]
        layout = self._with_parts(plan, ctx.layout(self.out))
        moved = stream_words(ctx, uint32, values, plan.partial, layout)
        totals = [_tree(list(islice(moved, plan.parts)), combine) for _ in range(0, layout.num_locals, plan.parts)]
        ctx.note(self, self._note(plan))
        ctx.define(self.out, _narrowed(ctx, accumulator, self.out.dtype, totals))

    def emit_c(self, ctx: CContext) -> None:
        dtype = boolean if self.src.dtype == boolean else accumulator_dtype(self.src.dtype)
        total = c_reduction.reduce(ctx, self.op, ctx.read(self.src), dtype, self.axes)
        if not self.keepdims:
            total = total.renamed(self.out.shape, lambda layout: layout.reshape(self.out.shape))
        ctx.define(self.out, cast_tile(ctx, total, self.out.dtype))

    def _note(self, plan: Plan) -> str:
        steps = [f"{len(plan.groups[0])} values in a thread", f"{len(plan.lane_masks)} shuffles"]
        steps += [f"{plan.parts} parts, {conversion.chosen.name}" for conversion in self.conversions()]
        return f"{self.op} {self.src.name}: {', '.join(steps)}"


def reduced_shape(shape: Sequence[int], axes: Sequence[int], keepdims: bool) -> tuple[int, ...]:
    """The shape after a reduction over `axes`."""
    return tuple(1 if d in axes else n for d, n in enumerate(shape) if keepdims or d not in axes)


def butterfly(ctx: EmitContext, value: Reg, lane_mask: int) -> Reg:
    """The value of the lane whose number differs by XOR with `lane_mask`; all lanes of the warp take part."""
    return ctx.b.emit("shfl.sync.bfly.b32", value, Imm(lane_mask), Imm(WARP - 1), Imm(FULL_MASK))


def _check_dtype(op: str, dtype: DataType) -> None:
    if op in ("any", "all") and dtype != boolean:
        raise TilusError(f"{op} of a tile of {dtype.name}, expected boolean", hint="compare it first: x != 0")
    if op not in ("any", "all") and dtype == boolean:
        raise TilusError(
            f"{op} of a boolean tile, expected numbers", hint="use tilus.any or tilus.all, or cast it to int32"
        )
    if dtype.nbits > 32:
        raise TilusError(f"{op} of a tile of {dtype.name}, expected at most 32 bits", hint="cast it to int32 first")


def _tree(values: Sequence[Reg], combine: Callable[[Reg, Reg], Reg]) -> Reg:
    """The values combined pairwise: log2(n) dependent steps, and an error that grows with log2(n)."""
    level = list(values)
    while len(level) > 1:
        pairs = [combine(a, c) for a, c in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]


def _widened(ctx: EmitContext, src: RegisterTensor, accumulator: DataType) -> list[Reg]:
    """One 32-bit register per slot; booleans as 0 and 1."""
    words = ctx.words(src)
    if src.dtype == boolean:
        return [ctx.b.emit("selp.b32", Imm(1), Imm(0), word) for word in words]
    return ctx.cast(src.dtype, accumulator, words, ctx.layout(src).num_locals)


def _narrowed(ctx: EmitContext, accumulator: DataType, dtype: DataType, values: list[Reg]) -> list[Reg]:
    if dtype == boolean:
        return [ctx.b.emit("setp.ne.u32", value, Imm(0)) for value in values]
    return ctx.cast(accumulator, dtype, values, len(values))


def _build(
    b: IRBuilder,
    op: str,
    x: RegisterTensor,
    axis: int | Sequence[int] | None,
    keepdims: bool,
    layout: RegisterLayout | None = None,
) -> RegisterTensor:
    axes = tuple(range(x.rank)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -x.rank <= a < x.rank:
            raise TilusError(
                f"{op} over axis {a} of a tile of shape {list(x.shape)}, expected one of its {x.rank} axes"
            )
    axes = tuple(sorted(a % x.rank for a in axes))
    _check_dtype(op, x.dtype)
    out = b.tile(result_dtype(op, x.dtype), reduced_shape(x.shape, axes, keepdims), layout, op)
    return b.emit(Reduce(out, x, axes, op, keepdims)).out


@builtin
def sum(
    b: IRBuilder, x: RegisterTensor, axis: int | Sequence[int] | None = None, *, keepdims: bool = False,
    layout: RegisterLayout | None = None,
) -> RegisterTensor:  # fmt: skip
    """The sum of a tile over an axis, several, or all of them (None).

    Floats are summed in f32; f16 and bf16 are then rounded once, smaller ones give f32. Integers give int32 or uint32, and wrap.
    layout: pins the result's layout; partial sums of different warps then go to those that want them, and to no others.
    """
    return _build(b, "sum", x, axis, keepdims, layout)


@builtin
def max(
    b: IRBuilder, x: RegisterTensor, axis: int | Sequence[int] | None = None, *, keepdims: bool = False
) -> RegisterTensor:
    """The largest element over an axis, several, or all of them (None). NaN counts only where there is nothing else."""
    return _build(b, "max", x, axis, keepdims)


@builtin
def min(
    b: IRBuilder, x: RegisterTensor, axis: int | Sequence[int] | None = None, *, keepdims: bool = False
) -> RegisterTensor:
    """The smallest element over an axis, several, or all of them (None). NaN counts only where there is nothing else."""
    return _build(b, "min", x, axis, keepdims)


@builtin
def any(
    b: IRBuilder, x: RegisterTensor, axis: int | Sequence[int] | None = None, *, keepdims: bool = False
) -> RegisterTensor:
    """Whether a boolean tile holds somewhere along an axis, several, or all of them (None)."""
    return _build(b, "any", x, axis, keepdims)


@builtin
def all(
    b: IRBuilder, x: RegisterTensor, axis: int | Sequence[int] | None = None, *, keepdims: bool = False
) -> RegisterTensor:
    """Whether a boolean tile holds everywhere along an axis, several, or all of them (None)."""
    return _build(b, "all", x, axis, keepdims)
