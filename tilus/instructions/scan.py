"""Prefix sums and running maxima of tiles along an axis, over any layout.

The digits of the axis are worked off from the lowest weight up. At each step a *chunk* (the indices that agree in all digits
still to come) has a total that all its threads know; the step joins `size` neighbouring chunks into one and gives each of
them the total of those before it as its offset. In a thread the joining is a chain, across lanes it is one butterfly shuffle
per bit, and across warps (or digits that are no power of two) the totals are converted to a layout in which each thread
holds those of its neighbours. In the end the offsets of all steps are added once to each element. The step across lanes is
the network of Kogge and Stone (1973) in its recursive form (Blelloch, "Prefix sums and their applications", 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tilus.codegen.c import reduction as c_reduction
from tilus.codegen.c.context import CContext
from tilus.codegen.context import EmitContext
from tilus.codegen.conversion import convert_words
from tilus.codegen.linear import register
from tilus.dtypes import DataType, boolean, f32, int32, uint32
from tilus.errors import TilusError
from tilus.instructions.arithmetic import emit_binary
from tilus.instructions.cast import cast_tile, convert_values
from tilus.instructions.elementwise import Pointwise, operand_words
from tilus.instructions.reduce import accumulator_dtype, butterfly, lanes_of, result_dtype
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Array, Evaluation
from tilus.ir.instruction import expect_same_shape
from tilus.ir.layout_rules import tile_conversion
from tilus.ir.tensor import RegisterTensor
from tilus.layout import Digit, RegisterLayout, Term
from tilus.layout.conversion import ConversionPlan
from tilus.ptx.module import Imm, Reg

Key = tuple[int, ...]
"""A chunk as its threads see it: the local part of its index, in chunks along the axis."""

# By name: the operation on registers, and the numpy scan.
_OPERATIONS: dict[str, tuple[str, Callable[..., Array]]] = {
    "sum": ("+", np.add.accumulate),
    "max": ("max", np.fmax.accumulate),
    "min": ("min", np.fmin.accumulate),
}

# What leaves every value as it is: -0.0 for float sums, NaN for the maxima of PTX, which prefer numbers.
_NEUTRAL: dict[tuple[str, DataType], int] = {
    ("sum", f32): 0x80000000, ("max", f32): 0x7FFFFFFF, ("min", f32): 0x7FFFFFFF,
    ("sum", int32): 0, ("max", int32): 0x80000000, ("min", int32): 0x7FFFFFFF,
    ("sum", uint32): 0, ("max", uint32): 0, ("min", uint32): 0xFFFFFFFF,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One digit of the axis: `place` says what joins chunks of size `term.weight`: slots, lanes (butterflies) or threads."""

    place: str
    term: Term


def plan_scan(layout: RegisterLayout, axis: int) -> tuple[Step, ...]:
    """The digits of the axis from the lowest weight up; a thread digit gives its power-of-two part to the lanes."""
    steps = [Step("slots", term) for term in layout.local_terms if term.dim == axis]
    for term in layout.thread_terms:
        if term.dim == axis:
            inside = lanes_of(term.stride, term.size)
            if inside > 1:
                steps.append(Step("lanes", Term(term.stride, inside, axis, term.weight)))
            if inside < term.size:
                outer = Term(term.stride * inside, term.size // inside, axis, term.weight * inside)
                steps.append(Step("threads", outer))
    return tuple(sorted(steps, key=lambda step: step.term.weight))


@dataclass(frozen=True, eq=False)
class Scan(Pointwise):
    """`out[..., i, ...] = op(src[..., 0 .. i, ...])` along `axis`, for op sum, max, min; element i itself is included.

    Floats are combined in f32 and rounded once; integers in 32 bits, as in a reduction.
    """

    mnemonic = "scan"

    out: RegisterTensor
    src: RegisterTensor
    axis: int
    op: str

    def verify(self) -> None:
        if self.op not in _OPERATIONS:
            raise TilusError(f"scan {self.op!r}, expected one of {', '.join(_OPERATIONS)}")
        expect_same_shape("scan", self.out, self.src)
        if not 0 <= self.axis < self.src.rank:
            raise TilusError(f"cumulative {self.op} along axis {self.axis} of a tile of rank {self.src.rank}")
        _check_dtype(self.op, self.src.dtype)
        expected = result_dtype(self.op, self.src.dtype)
        if self.out.dtype != expected:
            raise TilusError(
                f"cumulative {self.op} of {self.src.dtype.name} has dtype {self.out.dtype.name}, expected {expected.name}"
            )

    def evaluate(self, env: Evaluation) -> None:
        accumulator = accumulator_dtype(self.src.dtype)
        value = env.tile(self.src).astype(accumulator.compute, copy=False)
        with np.errstate(all="ignore"):
            scanned = _OPERATIONS[self.op][1](value, axis=3 + self.axis, dtype=value.dtype)
        env.set_tile(self.out, convert_values(scanned, accumulator, self.out.dtype))

    def conversions(self) -> Sequence[ConversionPlan]:
        """How the totals of each step reach their neighbours, where shuffles do not join them."""
        layout = self.out.layout
        if layout is None:
            return ()
        outer = [step.term for step in plan_scan(layout, self.axis) if step.place == "threads"]
        return [tile_conversion(uint32, *totals_and_neighbours(layout, self.axis, term)) for term in outer]

    def emit(self, ctx: EmitContext) -> None:
        layout, accumulator = ctx.layout(self.out), accumulator_dtype(self.src.dtype)
        words = ctx.cast(self.src.dtype, accumulator, operand_words(ctx, self.src, layout), layout.num_locals)
        steps = plan_scan(layout, self.axis)
        scan = _Scan(ctx, layout, self.axis, self.op, accumulator, words)
        for step in steps:
            scan.join(step)
        kinds = ", ".join(f"{step.place} {step.term.size}" for step in steps)
        ctx.note(self, f"cumulative {self.op} of {self.src.name}: {kinds}")
        values = scan.finish()
        ctx.define(self.out, ctx.cast(accumulator, self.out.dtype, values, len(values)))

    def emit_c(self, ctx: CContext) -> None:
        dtype = accumulator_dtype(self.src.dtype)
        total = c_reduction.scan(ctx, self.op, ctx.read(self.src), dtype, self.axis)
        ctx.define(self.out, cast_tile(ctx, total, self.out.dtype))


@dataclass
class _Scan:
    """State of one scan: `prefix` of each element within its first chunk, `totals` of the present chunks, and for each
    later step the offsets of its chunks (a chunk without an offset is the first in every thread)."""

    ctx: EmitContext
    layout: RegisterLayout
    axis: int
    op: str
    dtype: DataType
    words: list[Reg]
    width: int = 1
    prefix: dict[Key, Reg] = field(default_factory=dict[Key, Reg])
    totals: dict[Key, Reg] = field(default_factory=dict[Key, Reg])
    offsets: list[tuple[int, dict[Key, Reg]]] = field(default_factory=list[tuple[int, dict[Key, Reg]]])

    def __post_init__(self) -> None:
        for slot, word in enumerate(self.words):  # an element that a thread holds twice is scanned once
            self.prefix.setdefault(tuple(self.ctx.local_index(self.layout, slot)), word)
        self.totals = dict(self.prefix)

    def combine(self, x: Reg, y: Reg) -> Reg:
        return emit_binary(self.ctx, _OPERATIONS[self.op][0], self.dtype, [x], [y], 1)[0]

    def chunk(self, index: Key, width: int) -> Key:
        """The chunk of `width` that an element belongs to."""
        return tuple(i // width if d == self.axis else i for d, i in enumerate(index))

    def join(self, step: Step) -> None:
        """Make chunks of `size` neighbours each."""
        match step.place:
            case "slots":
                offsets = self._join_slots(step.term.size)
            case "lanes":
                offsets = self._join_lanes(step.term)
            case _:
                offsets = self._join_threads(step.term)
        if offsets:
            self.offsets.append((self.width, offsets))
        self.width *= step.term.size

    def _join_slots(self, size: int) -> dict[Key, Reg]:
        joined: dict[Key, Reg] = {}
        offsets: dict[Key, Reg] = {}
        for key in sorted(self.totals, key=lambda k: k[self.axis]):
            whole = self.chunk(key, size)
            if whole in joined:
                offsets[key] = joined[whole]
                joined[whole] = self.combine(joined[whole], self.totals[key])
            else:
                joined[whole] = self.totals[key]
            if self.width == 1:  # the first run of slots: its running totals are the prefixes themselves
                self.prefix[key] = joined[whole]
        self.totals = joined
        return {} if self.width == 1 else offsets

    def _join_lanes(self, term: Term) -> dict[Key, Reg]:
        b = self.ctx.b
        offsets: dict[Key, Reg] = {}
        neutral = b.const(_NEUTRAL[self.op, self.dtype])
        for bit in range(term.size.bit_length() - 1):
            mask = term.stride << bit
            is_later = b.pure("setp.ne.u32", b.pure("and.b32", self.ctx.thread_id(), Imm(mask)), Imm(0))
            for key, total in self.totals.items():
                other = butterfly(self.ctx, total, mask)
                before = b.emit("selp.b32", other, neutral, is_later)
                offsets[key] = self.combine(before, offsets[key]) if key in offsets else before
                self.totals[key] = self.combine(total, other)
        self._widen_totals(term.size)
        return offsets

    def _join_threads(self, term: Term) -> dict[Key, Reg]:
        """Each thread gets the totals of its `term.size` neighbours, and adds those in front of its own."""
        ctx, b = self.ctx, self.ctx.b
        chunks, neighbours = totals_and_neighbours(self.layout, self.axis, term)
        keys = [tuple(ctx.local_index(chunks, slot)) for slot in range(chunks.num_locals)]
        totals = convert_words(ctx, uint32, [self.totals[key] for key in keys], chunks, neighbours)
        offsets: dict[Key, Reg] = {}
        neutral = b.const(_NEUTRAL[self.op, self.dtype])
        place = register(b, ctx.digit(term.stride, term.size))
        for slot, key in enumerate(keys):
            running, *others = totals[slot :: len(keys)]
            offset = neutral
            for position, total in enumerate(others, 1):
                here = b.pure("setp.eq.u32", place, Imm(position))
                offset = b.emit("selp.b32", running, offset, here)
                running = self.combine(running, total)
            offsets[key], self.totals[key] = offset, running
        self._widen_totals(term.size)
        return offsets

    def _widen_totals(self, size: int) -> None:
        self.totals = {self.chunk(key, size): total for key, total in self.totals.items()}

    def finish(self) -> list[Reg]:
        """The words of the result. The offsets of outer steps are joined first: there are fewer of them."""
        outer: tuple[int, dict[Key, Reg]] | None = None
        for width, offsets in reversed(self.offsets):
            joined: dict[Key, Reg] = {}
            for key in dict.fromkeys(self.chunk(index, width) for index in self.prefix):
                parts = [] if outer is None else _found(outer[1], self.chunk(key, outer[0] // width))
                parts += _found(offsets, key)
                if parts:
                    joined[key] = parts[0] if len(parts) == 1 else self.combine(*parts)
            outer = width, joined
        result: dict[Key, Reg] = {}
        for index, prefix in self.prefix.items():
            parts = [] if outer is None else _found(outer[1], self.chunk(index, outer[0]))
            result[index] = self.combine(parts[0], prefix) if parts else prefix
        return [result[tuple(self.ctx.local_index(self.layout, slot))] for slot in range(self.layout.num_locals)]


def _found(values: dict[Key, Reg], key: Key) -> list[Reg]:
    return [values[key]] if key in values else []


def totals_and_neighbours(layout: RegisterLayout, axis: int, term: Term) -> tuple[RegisterLayout, RegisterLayout]:
    """The layout of the totals of chunks of `term.weight`, and that in which the threads that the thread digit `term` numbers
    hold each other's totals, in their outermost slots."""
    chunks = coarser(layout, axis, term.weight)
    threads = [
        Digit(t.size, None, 0) if t.stride == term.stride and t.dim == axis else Digit(t.size, t.dim, t.weight)
        for t in chunks.thread_terms
    ]
    return chunks, RegisterLayout(chunks.shape, tuple(threads), (Digit(term.size, axis, 1), *chunks.local_digits))


def coarser(layout: RegisterLayout, axis: int, width: int) -> RegisterLayout:
    """The layout of chunks of `width` along `axis`; a thread holds each of its chunks once."""

    def split(digit: Digit) -> list[Digit]:
        if digit.dim != axis:
            return [digit]
        inside = min(digit.size, max(1, width // digit.weight))
        return [Digit(digit.size // inside, axis, digit.weight * inside // width), Digit(inside, None, 0)]

    threads = [part for digit in layout.thread_digits for part in split(digit) if part.size > 1]
    slots = [part for digit in layout.local_digits for part in split(digit) if part.size > 1 and part.dim is not None]
    shape = tuple(n // width if d == axis else n for d, n in enumerate(layout.shape))
    return RegisterLayout(shape, tuple(threads), tuple(slots))


def _check_dtype(op: str, dtype: DataType) -> None:
    if dtype == boolean or dtype.nbits > 32:
        raise TilusError(
            f"cumulative {op} of a tile of {dtype.name}, expected a number of at most 32 bits",
            hint="cast it to int32 first",
        )


def _build(b: IRBuilder, op: str, x: RegisterTensor, axis: int) -> RegisterTensor:
    if not -x.rank <= axis < x.rank:
        raise TilusError(
            f"cumulative {op} along axis {axis} of a tile of shape {list(x.shape)}, expected one of its axes"
        )
    _check_dtype(op, x.dtype)
    return b.emit(Scan(b.tile(result_dtype(op, x.dtype), x.shape, name=f"cum{op}"), x, axis % x.rank, op)).out


@builtin
def cumsum(b: IRBuilder, x: RegisterTensor, axis: int = -1) -> RegisterTensor:
    """The sums of all elements up to and including each one, along an axis; types as those of `sum`."""
    return _build(b, "sum", x, axis)


@builtin
def cummax(b: IRBuilder, x: RegisterTensor, axis: int = -1) -> RegisterTensor:
    """The largest of all elements up to and including each one, along an axis. NaN counts only where nothing else was."""
    return _build(b, "max", x, axis)


@builtin
def cummin(b: IRBuilder, x: RegisterTensor, axis: int = -1) -> RegisterTensor:
    """The smallest of all elements up to and including each one, along an axis. NaN counts only where nothing else was."""
    return _build(b, "min", x, axis)
