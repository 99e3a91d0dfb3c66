"""ldmatrix and stmatrix: tiles between shared memory and the registers of a warp, as matrices of eight 16-byte rows.

Which tiles can move this way is decided in codegen.matrix_forms; `load_shared` and `store_shared` then become these.
Source: PTX ISA, "Warp-level matrix instructions: ldmatrix" and "stmatrix".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, of_const, of_reg, register
from tilus.codegen.matrix_forms import Matrices
from tilus.codegen.shared_access import SharedAccess
from tilus.errors import TilusError
from tilus.instructions.shared import check_shared_access, placed, reading, writing
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.tensor import RegisterTensor, SharedTensor
from tilus.layout import RegisterLayout
from tilus.ptx.module import Address, Imm, Reg, RegClass, Vector
from tilus.target import Target


@dataclass(frozen=True, eq=False)
class LdMatrix(Instruction):
    """A tile of a shared tensor as fragments, eight 16-byte rows a matrix; every lane gives the address of one row.

    rows: the tile's axis along which the rows of a matrix follow each other. trans: each matrix arrives transposed.
    groups: matrices of each instruction (1, 2 or 4), in the order of a lane's words.
    """

    mnemonic = "ldmatrix"

    out: RegisterTensor
    src: SharedTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    rows: int
    trans: bool
    groups: tuple[int, ...]

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def verify(self) -> None:
        check_shared_access("ldmatrix", self.src, self.out, self.offsets, self.dims)
        _check_groups("ldmatrix", self.out, self.groups)

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, env.load(self.src, self.offsets, self.out.shape, self.dims, checked=False))

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        return ((self.src, reading(self.out, self.src, self.offsets, self.dims)),)

    def emit(self, ctx: EmitContext) -> None:
        access = reading(self.out, self.src, self.offsets, self.dims)
        rows = _RowAddresses(ctx, self.src, ctx.layout(self.out), self.offsets, self.dims, _matrices(self, access))
        regs: list[Reg] = []
        for count in self.groups:
            address = rows.address(len(regs), count)
            group = [ctx.b.reg(RegClass.B32) for _ in range(count)]
            ctx.b.emit_to(f"ldmatrix.{_suffix(count, self.trans)}", Vector(tuple(group)), address)
            regs += group
        ctx.note(self, f"ldmatrix {self.src.name}: {_summary(self.groups, self.trans)}")
        ctx.define(self.out, regs)


@dataclass(frozen=True, eq=False)
class StMatrix(Instruction):
    """Write a tile to a shared tensor as matrices of eight 16-byte rows; the fields are those of `ldmatrix` (sm_90 and later).

    Of several warps that hold the same elements one writes.
    """

    mnemonic = "stmatrix"

    dst: SharedTensor
    src: RegisterTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    rows: int
    trans: bool
    groups: tuple[int, ...]

    def effects(self) -> Effects:
        return Effects(writes=(self.dst,))

    def verify(self) -> None:
        check_shared_access("stmatrix", self.dst, self.src, self.offsets, self.dims)
        _check_groups("stmatrix", self.src, self.groups)

    def evaluate(self, env: Evaluation) -> None:
        env.store(self.dst, self.offsets, self.dims, env.tile(self.src), checked=False)

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        return ((self.dst, writing(self.src, self.dst, self.offsets, self.dims, by_matrices=True)),)

    def emit(self, ctx: EmitContext) -> None:
        layout, access = ctx.layout(self.src), writing(self.src, self.dst, self.offsets, self.dims, by_matrices=True)
        rows = _RowAddresses(ctx, self.dst, layout, self.offsets, self.dims, _matrices(self, access))
        owner, words = ctx.guard(ctx.first_replica(layout)), ctx.words(self.src)
        done = 0
        for count in self.groups:
            source = Vector(tuple(words[done : done + count]))
            ctx.b.emit_to(f"stmatrix.{_suffix(count, self.trans)}", rows.address(done, count), source, guard=owner)
            done += count
        ctx.note(self, f"stmatrix {self.dst.name}: {_summary(self.groups, self.trans)}")


@dataclass(frozen=True)
class _RowAddresses:
    """Addresses of matrix rows: lane 8 j + r gives row r of matrix j of an instruction."""

    ctx: EmitContext
    tensor: SharedTensor
    layout: RegisterLayout
    offsets: Sequence[Expr]
    dims: Sequence[int]
    matrices: Matrices

    def address(self, first: int, count: int) -> Address:
        """Of an instruction for `count` matrices from the one in a lane's word `first` on."""
        ctx = self.ctx
        index = [ctx.scalars.linear(e) for e in self.offsets]
        starts = self.matrices.starts[first : first + count]
        for axis, (by_warp, by_matrix) in enumerate(zip(self._warp_index(), self._matrix_index(starts), strict=True)):
            index[self.dims[axis]] = index[self.dims[axis]] + by_warp + by_matrix
        row_dim = self.dims[self.matrices.row_axis]
        index[row_dim] = index[row_dim] + ctx.digit(1, 8)
        return ctx.shared_address(self.tensor, index)

    def _warp_index(self) -> list[Linear]:
        """The part of the tile index that the warp decides."""
        index = [of_const(0) for _ in self.layout.shape]
        for term in self.layout.thread_terms:
            if term.dim is None or term.stride * term.size <= 32:
                continue
            # A digit may span lanes and warps: split it at the warp boundary.
            inside = max(1, 32 // term.stride) if term.stride < 32 else 1
            digit = self.ctx.digit(term.stride * inside, term.size // inside)
            index[term.dim] = index[term.dim] + digit.scaled(term.weight * inside)
        return index

    def _matrix_index(self, starts: Sequence[Sequence[int]]) -> list[Linear]:
        """Where the matrix begins whose row a lane addresses; all terms are positive, as addresses must not wrap."""
        index = [of_const(part) for part in starts[0]]
        for bit in (bit for bit in (1, 2) if bit < len(starts)):
            later = self.ctx.digit(8 * bit, 2)
            for axis, (begin, first) in enumerate(zip(starts[bit], starts[0], strict=True)):
                if begin >= first:
                    index[axis] = index[axis] + later.scaled(begin - first)
                else:
                    earlier = self.ctx.b.pure("xor.b32", register(self.ctx.b, later), Imm(1))
                    index[axis] = index[axis] + of_const(begin - first) + of_reg(earlier).scaled(first - begin)
        return index


def _matrices(inst: LdMatrix | StMatrix, access: SharedAccess) -> Matrices:
    """The matrices that the instruction names; the text form of a kernel may name others than its layouts allow."""
    tensor = inst.src if isinstance(inst, LdMatrix) else inst.dst
    found = access.matrices(placed(tensor))
    if found is None or (found.row_axis, found.transposed, found.groups) != (inst.rows, inst.trans, inst.groups):
        raise TilusError(
            f"{inst.mnemonic} of {tensor.name} in layout {tensor.layout}, expected matrices with rows of 16 aligned bytes",
            hint="use load_shared and store_shared, which become matrix instructions where that fits",
        )
    return found


def _suffix(count: int, trans: bool) -> str:
    return f"sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16"


def _summary(groups: Sequence[int], trans: bool) -> str:
    """`6 matrices per warp, 1 of x4, 1 of x2, transposed`."""
    counts = sorted(Counter(groups).items(), reverse=True)
    kinds = ", ".join(f"{number} of x{count}" for count, number in counts)
    return f"{sum(groups)} matrices per warp, {kinds}{', transposed' if trans else ''}"


def _check_groups(what: str, tile: RegisterTensor, groups: Sequence[int]) -> None:
    if tile.layout is None:
        return
    words = tile.layout.num_locals * tile.dtype.nbits // 32
    if sum(groups) != words or not set(groups) <= {1, 2, 4}:
        raise TilusError(f"{what}: groups {list(groups)} for {words} matrices of {tile.name}, expected 1, 2 or 4 each")
