"""Matrix products of warpgroups (wgmma, sm_90a): they run on while the program goes on, and read shared memory themselves.

Each `wgmma` adds one group of instructions to the result's registers. Until a `wgmma_wait` that covers it, nobody may read the
result, write to the registers of A, or write to the operands in shared memory. What threads wrote to shared memory is visible to
it after `fence_async()` and a barrier.
Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, of_const
from tilus.codegen.matrix_descriptor import descriptor
from tilus.codegen.shared_access import SharedAccess, shared_access
from tilus.dtypes import f32, int32
from tilus.errors import TilusError
from tilus.instructions.mma import product
from tilus.instructions.mma_blocks import COLUMNS, ROWS, Extents
from tilus.instructions.shared import SharedOperand, full_offsets, placed
from tilus.instructions.wgmma_atoms import ROWS as INSTRUCTION_ROWS
from tilus.instructions.wgmma_atoms import WARPS, WGMMA_ATOMS, WgmmaAtom, wgmma_atom
from tilus.instructions.wgmma_blocks import FRAGMENT_COLUMNS, FRAGMENT_ROWS, Part, WgmmaWay, wgmma_ways
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Array, Evaluation
from tilus.ir.expr import Expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.layout_rules import LayoutPriority, LayoutRule, Layouts, OneOf, Way
from tilus.ir.ranges import divisor
from tilus.ir.tensor import RegisterTensor, SharedTensor
from tilus.layout import SharedLayout, WgmmaForm, slot_map, wgmma_forms
from tilus.ptx.module import Imm, Operand, Vector
from tilus.target import Target


@dataclass(frozen=True)
class SharedMatrix:
    """The operand [rows, k] of a product in shared memory; `rows` are those of A or the columns of B.

    offsets: where it starts in the tensor, whose last two dims are [rows, k], or [k, rows] if it is transposed.
    """

    tensor: SharedTensor
    offsets: tuple[Expr, ...]
    rows: int
    k: int
    transposed: bool

    @property
    def dims(self) -> tuple[int, int]:
        """The tensor's dims of rows and k."""
        last = self.tensor.rank - 1
        return (last, last - 1) if self.transposed else (last - 1, last)

    def value(self, env: Evaluation) -> Array:
        return env.load(self.tensor, self.offsets, (self.rows, self.k), self.dims, checked=False)

    def forms(self, atom: WgmmaAtom, starts: int, most: int) -> dict[SharedLayout, WgmmaForm]:
        """The layouts of the tensor from which instructions can read their rows: at multiples of `starts` from the first one (0:
        only there), `most` or fewer. Rows that are contiguous must start a block for each instruction, or lie in one."""
        order = (*range(self.tensor.rank - 2), *self.dims)
        step = math.gcd(starts, divisor(self.offsets[self.dims[0]]))
        found = wgmma_forms(tuple(self.tensor.shape[d] for d in order), atom.a.nbits // 8)
        return {
            layout.permute(order): form
            for layout, form in found.items()
            if form.major == "k" or step % form.width == 0 or (form.width % step == 0 and most <= step)
        }

    def index(self, ctx: EmitContext, row: Linear, k: int) -> list[Linear]:
        """An element relative to the start as an index of the tensor, with rows and k last."""
        rows, depth = self.dims
        index = [ctx.scalars.linear(offset) for offset in self.offsets]
        return [*index[:-2], index[rows] + row, index[depth] + of_const(k)]

    def access(self, legal: Sequence[SharedLayout]) -> SharedAccess:
        extents = (self.rows, self.k)
        return shared_access(self.tensor, None, self.offsets, self.dims, extents, legal=tuple(legal))

    def verify(self, name: str, atom: WgmmaAtom) -> None:
        tensor = self.tensor
        if tensor.rank < 2 or len(self.offsets) != tensor.rank:
            raise TilusError(f"wgmma: {len(self.offsets)} offsets for {name}, {tensor.name} of rank {tensor.rank}")
        for what, extent, unit, d in zip(("rows", "k"), (self.rows, self.k), (8, atom.k), self.dims, strict=True):
            if extent > tensor.shape[d]:
                raise TilusError(
                    f"wgmma: {name} has {extent} {what}, dim {d} of {tensor.name} only {tensor.shape[d]}",
                    hint=f"{name} is [{'k, ' * self.transposed}rows{', k' * (not self.transposed)}] here",
                )
            if divisor(self.offsets[d]) % unit:
                raise TilusError(
                    f"wgmma: {name} starts at {self.offsets[d]} of dim {d} of {tensor.name}, expected a multiple of {unit}",
                    hint="let the offset be a product with that number",
                )


@dataclass(frozen=True, eq=False)
class Wgmma(Instruction):
    """`out = a @ b^T + acc`, begun: `shape` is (m, n, k). a: a tile [m, k], or a shared tensor at `a_offsets`; b: a shared tensor at
    `b_offsets`. Their last two dims are [m, k] and [n, k], transposed [k, m] and [k, n]. Without acc the sum starts at zero.
    """

    mnemonic = "wgmma"
    needs_gpu = True
    layout_priority = LayoutPriority.MATRIX
    accumulates = True
    asynchronous = True

    out: RegisterTensor
    a: RegisterTensor | SharedTensor
    b: SharedTensor
    acc: RegisterTensor | None
    shape: tuple[int, int, int]
    a_offsets: tuple[Expr, ...]
    b_offsets: tuple[Expr, ...]
    a_transposed: bool = False
    b_transposed: bool = False

    def effects(self) -> Effects:
        return Effects(reads=tuple(t for t in (self.a, self.b) if isinstance(t, SharedTensor)), other=True)

    def accumulator(self) -> RegisterTensor | None:
        return self.acc

    @property
    def atom(self) -> WgmmaAtom:
        found = wgmma_atom(self.a.dtype, self.b.dtype, self.out.dtype)
        if found is None:
            raise _no_atom(self.a, self.b, self.out)
        return found

    @property
    def matrix_a(self) -> SharedMatrix | None:
        if isinstance(self.a, RegisterTensor):
            return None
        return SharedMatrix(self.a, self.a_offsets, self.shape[0], self.shape[2], self.a_transposed)

    @property
    def matrix_b(self) -> SharedMatrix:
        return SharedMatrix(self.b, self.b_offsets, *self.shape[1:], self.b_transposed)

    def verify(self) -> None:
        atom, (m, n, k) = self.atom, self.shape
        if m % INSTRUCTION_ROWS or n % FRAGMENT_COLUMNS or k % atom.k or min(self.shape) < 1:
            raise TilusError(
                f"wgmma of m, n, k = {m}, {n}, {k} and {self.a.dtype.name}: "
                f"expected multiples of {INSTRUCTION_ROWS}, {FRAGMENT_COLUMNS} and {atom.k}",
                hint="pad the tiles: copies give zeros outside of a tensor",
            )
        if isinstance(self.a, RegisterTensor) and self.a.shape != (m, k):
            raise TilusError(f"wgmma: a is a tile of shape {list(self.a.shape)}, the product needs {[m, k]}")
        for tile in (self.out, self.acc):
            if tile is not None and (tile.shape, tile.dtype) != ((m, n), self.out.dtype):
                raise TilusError(
                    f"wgmma: the accumulator is {tile.dtype.name}{list(tile.shape)}, the product {self.out.dtype.name}{[m, n]}"
                )
        for name, matrix in (("a", self.matrix_a), ("b", self.matrix_b)):
            if matrix is not None:
                matrix.verify(name, atom)

    # Layouts.

    def ways(self, known: Layouts, num_threads: int) -> tuple[WgmmaWay, ...]:
        """How the group of threads can compute it, best first."""
        if num_threads % (32 * WARPS):
            raise TilusError(
                f"wgmma is run by {num_threads // 32} warps, expected a multiple of {WARPS}",
                hint="change `warps` in tilus.grid, or the count of tilus.warps",
            )
        m, n, k = self.shape
        a, acc, out = (known.get(t) if isinstance(t, RegisterTensor) else None for t in (self.a, self.acc, self.out))
        in_registers = isinstance(self.a, RegisterTensor)
        return wgmma_ways(self.atom, Extents(1, m, n, k), num_threads // 32, in_registers, (a, acc, out))

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return OneOf(lambda known: [(self._layouts(way), self._cycles(way)) for way in self.ways(known, num_threads)])

    def _layouts(self, way: WgmmaWay) -> Way:
        a, d = way.layouts
        tiles = {self.out: d} if self.acc is None else {self.acc: d, self.out: d}
        return {self.a: a, **tiles} if isinstance(self.a, RegisterTensor) else tiles

    def _cycles(self, way: WgmmaWay) -> int:
        return way.num_steps * sum(way.atom.cycles(part.width) for part in way.parts())

    def _way(self, num_threads: int) -> WgmmaWay:
        """The way that the layouts of all tiles ask for."""
        tiles = (t for t in (self.a, self.acc, self.out) if isinstance(t, RegisterTensor))
        return self.ways({t: t.layout for t in tiles if t.layout is not None}, num_threads)[0]

    # Operands in shared memory.

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        way = self._way(num_threads)
        forms = ((self.matrix_a, self.a_forms(way)), (self.matrix_b, self.b_forms(way)))
        return tuple((matrix.tensor, matrix.access(tuple(legal))) for matrix, legal in forms if matrix is not None)

    def a_forms(self, way: WgmmaWay) -> dict[SharedLayout, WgmmaForm]:
        return {} if self.matrix_a is None else self.matrix_a.forms(way.atom, INSTRUCTION_ROWS, INSTRUCTION_ROWS)

    def b_forms(self, way: WgmmaWay) -> dict[SharedLayout, WgmmaForm]:
        columns = [part.column for part in way.parts()]
        starts = math.gcd(*columns, way.num_columns if way.num_columns < self.shape[1] else 0)
        return self.matrix_b.forms(way.atom, starts, max(part.width for part in way.parts()))

    # Meaning.

    def evaluate(self, env: Evaluation) -> None:
        a = env.tile(self.a) if isinstance(self.a, RegisterTensor) else None
        left = a if self.matrix_a is None else self.matrix_a.value(env)
        if left is None:
            raise ValueError("wgmma without a left operand passed the verifier")
        total = np.zeros((), self.out.dtype.compute) if self.acc is None else env.tile(self.acc)
        env.set_tile(self.out, product(left, self.matrix_b.value(env).swapaxes(-1, -2), total, self.out.dtype))

    def emit(self, ctx: EmitContext) -> None:
        _require_sm_90a(ctx, "wgmma")
        way = self._way(ctx.num_threads)
        sums, operands = _Sums(ctx, self.out, self.acc, way), _Operands(ctx, self, way)
        steps = [(part, step) for part in way.parts() for step in range(way.num_steps)]
        code = [(operands.a(part, step), operands.b(part, step)) for part, step in steps]
        ctx.b.emit_to("wgmma.fence.sync.aligned")
        for (part, step), sources in zip(steps, code, strict=True):
            adds = ctx.b.pure("setp.ne.s32", ctx.b.const(int(step > 0 or self.acc is not None)), Imm(0))
            ctx.b.emit_to(way.atom.opcode(part.width), sums.registers(part), *sources, adds, *operands.modes)
        ctx.b.emit_to("wgmma.commit_group.sync.aligned")
        sizes = Counter(part.width for part in way.parts() for _ in range(way.num_steps))
        kinds = ", ".join(f"{count} x m{INSTRUCTION_ROWS}n{n}k{way.atom.k}" for n, count in sizes.items())
        ctx.note(self, f"wgmma: {kinds} per warpgroup")


class _Sums:
    """The registers of the result, which are those of the accumulator when they are the same variable."""

    def __init__(self, ctx: EmitContext, out: RegisterTensor, acc: RegisterTensor | None, way: WgmmaWay) -> None:
        self.way = way
        layout = ctx.layout(out)
        words = ctx.words(out) if out in ctx.tiles else ctx.allocate(out)
        if acc is not None and acc is not out:
            for word, value in zip(words, ctx.aligned_words(acc, layout), strict=True):
                ctx.b.mov(word, value)
        per_word = 32 // out.dtype.nbits
        order = slot_map(way.layouts[1], layout)
        if any(slot % per_word != place % per_word for place, slot in enumerate(order)):
            raise TilusError(f"wgmma: layout {layout} of {out.name} tears words apart", hint=f"pin it to {way.layouts[1]}")
        self.words = [words[slot // per_word] for slot in order[::per_word]]
        self.per_word = per_word

    def registers(self, part: Part) -> Vector:
        return Vector(tuple(self.words[slot // self.per_word] for slot in self.way.d_slots(part)[:: self.per_word]))


class _Operands:
    """The fragments or descriptors of A, and the descriptors of B."""

    def __init__(self, ctx: EmitContext, inst: Wgmma, way: WgmmaWay) -> None:
        self.ctx, self.inst, self.way = ctx, inst, way
        self.b_form = _form(inst.matrix_b, inst.b_forms(way))
        self.a_form = None if inst.matrix_a is None else _form(inst.matrix_a, inst.a_forms(way))
        self.a_words = None
        if isinstance(inst.a, RegisterTensor):
            self.a_words = ctx.aligned_words(inst.a, way.layouts[0])
        self.first_row = self._warpgroup_index(ROWS, FRAGMENT_ROWS)
        self.first_column = self._warpgroup_index(COLUMNS, FRAGMENT_COLUMNS)

    def _warpgroup_index(self, dim: int, size: int) -> Linear:
        """The part of an element's index that the warpgroup decides."""
        index = of_const(0)
        for term in self.way.blocks.thread_terms:
            inside = min(term.size, max(1, WARPS // term.stride))  # a digit may span the warps of a group, too
            if term.dim == dim and inside < term.size:
                digit = self.ctx.digit(32 * term.stride * inside, term.size // inside)
                index = index + digit.scaled(term.weight * inside * size)
        return index

    def a(self, part: Part, step: int) -> Operand:
        if self.a_words is not None:
            per_word = 32 // self.way.atom.a.nbits
            return Vector(tuple(self.a_words[slot // per_word] for slot in self.way.a_slots(part, step)[::per_word]))
        matrix, form = self.inst.matrix_a, self.a_form
        row = self.first_row + of_const(FRAGMENT_ROWS * self.way.rows[part.row])
        return descriptor(self.ctx, matrix.tensor, form, matrix.index(self.ctx, row, step * self.way.atom.k))

    def b(self, part: Part, step: int) -> Operand:
        matrix, column = self.inst.matrix_b, self.first_column + of_const(part.column)
        return descriptor(self.ctx, matrix.tensor, self.b_form, matrix.index(self.ctx, column, step * self.way.atom.k))

    @property
    def modes(self) -> list[Operand]:
        """What follows the predicate: floats may be negated, operands of 16 bits in shared memory have a contiguous dim."""
        if self.way.atom.a.is_integer:
            return []
        forms = [form for form in (self.a_form, self.b_form) if form is not None] if self.way.atom.may_transpose else []
        return [Imm(1), Imm(1), *(Imm(int(form.major == "mn")) for form in forms)]


def _form(matrix: SharedMatrix, forms: Mapping[SharedLayout, WgmmaForm]) -> WgmmaForm:
    found = forms.get(placed(matrix.tensor))
    if found is None:
        raise TilusError(
            f"wgmma cannot read {matrix.tensor.name} in layout {matrix.tensor.layout}",
            hint="leave the layout of the shared tensor to the compiler",
        )
    return found


@dataclass(frozen=True, eq=False)
class WgmmaWait(Instruction):
    """Wait until at most `pending` of this warpgroup's last `wgmma` are under way."""

    mnemonic = "wgmma_wait"
    needs_gpu = True

    pending: int

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def verify(self) -> None:
        if not 0 <= self.pending <= 7:
            raise TilusError(f"wgmma_wait({self.pending}): expected 0 to 7 products under way")

    def awaits(self) -> int | None:
        return self.pending

    def evaluate(self, env: Evaluation) -> None:
        """Products of the reference execution are done already."""

    def emit(self, ctx: EmitContext) -> None:
        _require_sm_90a(ctx, "wgmma_wait")
        ctx.b.emit_to("wgmma.wait_group.sync.aligned", Imm(self.pending))


def _require_sm_90a(ctx: EmitContext, what: str) -> None:
    """Later GPUs have other instructions in place of these."""
    if ctx.target.name != "sm_90a":
        raise TilusError(
            f"{what} needs sm_90a, the target is {ctx.target}",
            hint='use tilus.dot, compile for sm_90a, or run it on device "reference" or "emulator"',
        )


def _no_atom(a: RegisterTensor | SharedTensor, b: SharedTensor, out: RegisterTensor) -> TilusError:
    sums = dict.fromkeys(atom.d.name for atom in WGMMA_ATOMS if (atom.a, atom.b) == (a.dtype, b.dtype))
    if sums:
        return TilusError(
            f"wgmma of {a.dtype.name} and {b.dtype.name} adds up in {' or '.join(sums)}, not in {out.dtype.name}"
        )
    partners = dict.fromkeys(atom.b.name for atom in WGMMA_ATOMS if atom.a == a.dtype)
    every = dict.fromkeys(atom.a.name for atom in WGMMA_ATOMS)
    expected = f"{a.dtype.name} with {' or '.join(partners)}" if partners else f"operands of {', '.join(every)}"
    return TilusError(
        f"wgmma of {a.dtype.name} and {b.dtype.name}, expected {expected}",
        hint="cast a tile in registers: tilus.cast(x, tilus.f16)",
    )


@builtin
def wgmma(
    b: IRBuilder, x: RegisterTensor | SharedOperand, y: SharedOperand, acc: RegisterTensor | None = None, *,
    shape: Sequence[int] | None = None, x_offsets: Sequence[Expr | int] | None = None, y_offsets: Sequence[Expr | int] | None = None,
    x_transposed: bool = False, y_transposed: bool = False,
) -> RegisterTensor:  # fmt: skip
    """Begin `x @ y^T + acc` on the tensor cores of warpgroups (sm_90a): x [m, k], y [n, k], acc [m, n] (zero when not given).

    x: a tile, or a shared tensor like y. y: a shared tensor or `tensor[i]`. Of these, all is taken, or the part at x_offsets and
    y_offsets of the extents `shape` = (m, n, k). transposed: it is indexed [k, m] or [k, n]; with 16-bit elements any dim may be
    contiguous, else k must be.
    Types: f16 or bf16 with the same, float8_e4m3 and float8_e5m2 in any mix, int8 and uint8 in any mix. Sums: f32, for integers int32,
    and f16 where acc is f16 (not with bf16). m is a multiple of 64, n of 8, k of 32 bytes; the number of warps one of 4.

    The product is under way until a `wgmma_wait` that covers it: only then may the result be read, x and y be overwritten. Assign
    the result to the variable of acc, so that it stays in its registers. Before, `fence_async()` and a barrier make what threads
    wrote to x and y visible.
    """
    extents = tuple(shape) if shape is not None else _extents(x, y, x_transposed, y_transposed)
    if len(extents) != 3:
        raise TilusError(f"wgmma: shape {list(extents)}, expected (m, n, k)")
    left, starts = (x, ()) if isinstance(x, RegisterTensor) else full_offsets(x, x_offsets, 2)
    right, y_starts = full_offsets(y, y_offsets, 2)
    dtype = acc.dtype if acc is not None else int32 if left.dtype.is_integer else f32
    out = b.tile(dtype, extents[:2], name="acc")
    return b.emit(Wgmma(out, left, right, acc, extents, starts, y_starts, x_transposed, y_transposed)).out


def _extents(
    x: RegisterTensor | SharedOperand, y: SharedOperand, x_transposed: bool, y_transposed: bool
) -> tuple[int, int, int]:
    """(m, n, k) of two whole operands."""
    if x.rank != 2 or y.rank != 2:
        raise TilusError(
            f"wgmma of operands of rank {x.rank} and {y.rank}, expected 2 and 2",
            hint="index the first dims of a shared tensor: tensor[stage]",
        )
    m, k = reversed(x.shape) if x_transposed else x.shape
    n, depth = reversed(y.shape) if y_transposed else y.shape
    if k != depth:
        raise TilusError(
            f"wgmma of shapes {list(x.shape)} and {list(y.shape)}: k is {k} and {depth}",
            hint="the operands are [m, k] and [n, k], unless x_transposed or y_transposed says otherwise; `shape` takes parts",
        )
    return m, n, k


@builtin
def wgmma_wait(b: IRBuilder, pending: int = 0) -> None:
    """Wait until at most `pending` of the last `wgmma` are under way. The results of earlier ones may be read, their operands reused."""
    b.emit(WgmmaWait(pending))
