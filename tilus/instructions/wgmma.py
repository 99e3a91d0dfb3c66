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
from tilus.codegen.shared_access import SharedAccess
from tilus.dtypes import f32, int32
from tilus.errors import TilusError
from tilus.instructions.mma import product
from tilus.instructions.mma_blocks import COLUMNS, ROWS, Extents
from tilus.instructions.shared import SharedOperand, full_offsets
from tilus.instructions.wgmma_atoms import ROWS as INSTRUCTION_ROWS
from tilus.instructions.wgmma_atoms import WARPS, WgmmaAtom, wgmma_atom
from tilus.instructions.wgmma_blocks import FRAGMENT_COLUMNS, FRAGMENT_ROWS, Part, WgmmaWay, wgmma_ways
from tilus.instructions.wgmma_matrix import SharedMatrix
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.layout_rules import LayoutPriority, LayoutRule, Layouts, OneOf, Way
from tilus.ir.tensor import RegisterTensor, SharedTensor
from tilus.layout import SharedLayout, WgmmaForm, slot_map
from tilus.ptx.module import Imm, Operand, Reg, Vector
from tilus.target import Target


@dataclass(frozen=True, eq=False)
class Wgmma(Instruction):
    """`out = a @ b^T + acc`, begun: `shape` is (m, n, k).

    a: a tile [m, k], or a shared tensor at `a_offsets`; b: a shared tensor at `b_offsets`. The last two dims of shared tensors
    are [m, k] and [n, k], transposed [k, m] and [k, n]. Without acc the sum starts at zero.
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
        shared = tuple(t for t in (self.a, self.b) if isinstance(t, SharedTensor))
        return Effects(reads=shared, other=True, by_proxy=True)

    def accumulator(self) -> RegisterTensor | None:
        return self.acc

    @property
    def atom(self) -> WgmmaAtom:
        return wgmma_atom(self.a.dtype, self.b.dtype, self.out.dtype)

    @property
    def left(self) -> RegisterTensor | SharedMatrix:
        """A as a tile or a part of a shared tensor."""
        if isinstance(self.a, RegisterTensor):
            return self.a
        return SharedMatrix("a", self.a, self.a_offsets, self.shape[0], self.shape[2], self.a_transposed)

    @property
    def right(self) -> SharedMatrix:
        return SharedMatrix("b", self.b, self.b_offsets, *self.shape[1:], self.b_transposed)

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
        for matrix in (self.left, self.right):
            if isinstance(matrix, SharedMatrix):
                matrix.verify(atom)

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
        b = (self.b, self.right.access(self.b_forms(way)))
        a = self.left
        return ((a.tensor, a.access(self.a_forms(a, way))), b) if isinstance(a, SharedMatrix) else (b,)

    def a_forms(self, matrix: SharedMatrix, way: WgmmaWay) -> Mapping[SharedLayout, WgmmaForm]:
        """How A can be read from shared memory."""
        return matrix.forms(way.atom, INSTRUCTION_ROWS, INSTRUCTION_ROWS)

    def b_forms(self, way: WgmmaWay) -> Mapping[SharedLayout, WgmmaForm]:
        """How B can be read from shared memory."""
        columns = [part.column for part in way.parts()]
        starts = math.gcd(*columns, way.num_columns if way.num_columns < self.shape[1] else 0)
        return self.right.forms(way.atom, starts, max(part.width for part in way.parts()))

    # Meaning.

    def evaluate(self, env: Evaluation) -> None:
        a = self.left
        left = a.value(env) if isinstance(a, SharedMatrix) else env.tile(a)
        total = np.zeros((), self.out.dtype.compute) if self.acc is None else env.tile(self.acc)
        env.set_tile(self.out, product(left, self.right.value(env).swapaxes(-1, -2), total, self.out.dtype))

    def emit(self, ctx: EmitContext) -> None:
        _require_sm_90a(ctx, "wgmma")
        way = self._way(ctx.num_threads)
        sums, operands = _Sums(ctx, self.out, self.acc, way), _Operands(ctx, self, way)
        steps = [(part, step) for part in way.parts() for step in range(way.num_steps)]
        sources = [operands.of(part, step) for part, step in steps]
        ctx.b.emit_to("wgmma.fence.sync.aligned")
        for (part, step), (a, b) in zip(steps, sources, strict=True):
            adds = ctx.b.pure("setp.ne.s32", ctx.b.const(int(step > 0 or self.acc is not None)), Imm(0))
            ctx.b.emit_to(way.atom.opcode(part.width), sums.registers(part), a, b, adds, *operands.modes)
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
            raise TilusError(
                f"wgmma: layout {layout} of {out.name} tears words apart", hint=f"pin it to {way.layouts[1]}"
            )
        self.words = [words[slot // per_word] for slot in order[::per_word]]
        self.per_word = per_word

    def registers(self, part: Part) -> Vector:
        return Vector(tuple(self.words[slot // self.per_word] for slot in self.way.d_slots(part)[:: self.per_word]))


class _Operands:
    """The fragments or descriptors of A, and the descriptors of B."""

    def __init__(self, ctx: EmitContext, inst: Wgmma, way: WgmmaWay) -> None:
        self.ctx, self.way = ctx, way
        a, b = inst.left, inst.right
        self.a: list[Reg] | tuple[SharedMatrix, WgmmaForm]
        if isinstance(a, SharedMatrix):
            self.a = a, a.form(inst.a_forms(a, way))
        else:
            self.a = ctx.aligned_words(a, way.layouts[0])
        self.b = b, b.form(inst.b_forms(way))
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

    def of(self, part: Part, step: int) -> tuple[Operand, Operand]:
        """A and B of one instruction."""
        column = self.first_column + of_const(part.column)
        matrix, form = self.b
        return self._a(part, step), matrix.descriptor(self.ctx, form, column, step * self.way.atom.k)

    def _a(self, part: Part, step: int) -> Operand:
        atom = self.way.atom
        if isinstance(self.a, list):
            per_word = 32 // atom.a.nbits
            return Vector(tuple(self.a[slot // per_word] for slot in self.way.a_slots(part, step)[::per_word]))
        matrix, form = self.a
        row = self.first_row + of_const(FRAGMENT_ROWS * self.way.rows[part.row])
        return matrix.descriptor(self.ctx, form, row, step * atom.k)

    @property
    def modes(self) -> list[Operand]:
        """What follows the predicate: floats may be negated, 16-bit operands in shared memory say which dim is contiguous."""
        if self.way.atom.a.is_integer:
            return []
        matrices = [m for m in (self.a, self.b) if isinstance(m, tuple) and self.way.atom.may_transpose]
        return [Imm(1), Imm(1), *(Imm(int(form.major == "mn")) for _, form in matrices)]


@dataclass(frozen=True, eq=False)
class WgmmaWait(Instruction):
    """Wait until at most `pending` of this warpgroup's last `wgmma` are under way."""

    mnemonic = "wgmma_wait"
    needs_gpu = True

    pending: int

    def effects(self) -> Effects:
        return Effects(barrier=True)

    def verify(self) -> None:
        if self.pending < 0:
            raise TilusError(f"wgmma_wait({self.pending}): expected 0 or more products under way")

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


@builtin
def wgmma(
    b: IRBuilder, x: RegisterTensor | SharedOperand, y: SharedOperand, acc: RegisterTensor | None = None, *,
    shape: Sequence[int] | None = None, x_offsets: Sequence[Expr | int] | None = None,
    y_offsets: Sequence[Expr | int] | None = None, x_transposed: bool = False, y_transposed: bool = False,
) -> RegisterTensor:  # fmt: skip
    """Begin `x @ y^T + acc` on the tensor cores of warpgroups (sm_90a): x [m, k], y [n, k], acc [m, n] (zero when not given).

    x: a tile, or a shared tensor like y. y: a shared tensor or `tensor[i]`. Of these, all is taken, or the part at x_offsets and
    y_offsets of the extents `shape` = (m, n, k). transposed: it is indexed [k, m] or [k, n]; either dim may be contiguous in
    memory where elements have 16 bits, else k must be. m is a multiple of 64, n of 8, k of 32 bytes.
    Types: f16 or bf16 with the same, float8_e4m3 and float8_e5m2 in any mix, int8 and uint8 in any mix. Sums: f32, for integers
    int32, and f16 where acc is f16 (not with bf16). Products are exact and added up in no promised order.
    The block or role that runs it has a multiple of 4 warps.

    The product is under way until a `wgmma_wait` that covers it: only then may the result be read, x and y be overwritten. Assign
    the result to the variable of acc at once, so that it stays in its registers. What threads wrote to x and y is visible to it
    after `fence_async()` and a barrier.
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
    """Wait until at most `pending` of the last `wgmma` are under way; results of earlier ones may be read, operands reused."""
    b.emit(WgmmaWait(pending))
