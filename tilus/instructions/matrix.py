"""ldmatrix and stmatrix: tiles between shared memory and the registers of a warp, as matrices of eight 16-byte rows.

Which tiles can move this way is decided in codegen.matrix_forms; `load_shared` and `store_shared` then become these.
Source: PTX ISA, "Warp-level matrix instructions: ldmatrix" and "stmatrix".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from tilus.codegen.c import shared as c_shared
from tilus.codegen.c.context import CContext
from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, of_const, of_reg, register
from tilus.codegen.matrix_forms import Matrices
from tilus.codegen.shared_access import SharedAccess
from tilus.errors import TilusError
from tilus.instructions.shared import check_shared_access, moving, placed
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.tensor import RegisterTensor, SharedTensor
from tilus.layout import RegisterLayout
from tilus.ptx.module import Address, Imm, Reg, RegClass, Vector
from tilus.target import Target


class MatrixMove(Instruction):
    """What `ldmatrix` and `stmatrix` have in common."""

    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    rows: int
    trans: bool
    groups: tuple[int, ...]

    def sides(self) -> tuple[RegisterTensor, SharedTensor]:
        """The tile and the tensor."""
        raise NotImplementedError(f"{type(self).__name__}.sides")

    def verify(self) -> None:
        tile, tensor = self.sides()
        check_shared_access(self.mnemonic, tensor, tile, self.offsets, self.dims)
        words = 0 if tile.layout is None else tile.layout.num_locals * tile.dtype.nbits // 32
        if tile.layout is not None and (sum(self.groups) != words or not set(self.groups) <= {1, 2, 4}):
            raise TilusError(
                f"{self.mnemonic}: groups {list(self.groups)} for {words} matrices of {tile.name}, expected 1, 2 or 4 each"
            )

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        return ((self.sides()[1], self._access()),)

    def _access(self) -> SharedAccess:
        tile, tensor = self.sides()
        return moving(tile, tensor, self.offsets, self.dims, writes=bool(self.effects().writes), by_matrices=True)

    def addresses(self, ctx: EmitContext) -> Iterator[Address]:
        """The rows that a lane addresses in each instruction; the text form of a kernel may name matrices that do not exist."""
        tile, tensor = self.sides()
        found = self._access().matrices(placed(tensor))
        if found is None or (found.row_axis, found.transposed, found.groups) != (self.rows, self.trans, self.groups):
            raise TilusError(
                f"{self.mnemonic} of {tensor.name} in layout {tensor.layout}, expected matrices with rows of 16 aligned bytes",
                hint="use load_shared and store_shared, which become matrix instructions where that fits",
            )
        rows, done = _RowAddresses(ctx, tensor, ctx.layout(tile), self.offsets, self.dims, found), 0
        for count in self.groups:
            yield rows.address(done, count)
            done += count
        ctx.note(self, f"{self.mnemonic} {tensor.name}: {self._summary()}")

    def opcode(self, count: int) -> str:
        return f"{self.mnemonic}.sync.aligned.m8n8.x{count}{'.trans' if self.trans else ''}.shared.b16"

    def _summary(self) -> str:
        """`6 matrices per warp, 1 of x4, 1 of x2, transposed`."""
        kinds = ", ".join(
            f"{number} of x{count}" for count, number in sorted(Counter(self.groups).items(), reverse=True)
        )
        return f"{sum(self.groups)} matrices per warp, {kinds}{', transposed' if self.trans else ''}"


@dataclass(frozen=True, eq=False)
class LdMatrix(MatrixMove):
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

    def sides(self) -> tuple[RegisterTensor, SharedTensor]:
        return self.out, self.src

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, env.load(self.src, self.offsets, self.out.shape, self.dims, checked=False))

    def emit_c(self, ctx: CContext) -> None:
        ctx.define(self.out, c_shared.load(ctx, self.src, self.offsets, self.out.shape, self.dims))

    def emit(self, ctx: EmitContext) -> None:
        regs: list[Reg] = []
        for count, address in zip(self.groups, self.addresses(ctx), strict=True):
            group = [ctx.b.reg(RegClass.B32) for _ in range(count)]
            ctx.b.emit_to(self.opcode(count), Vector(tuple(group)), address)
            regs += group
        ctx.define(self.out, regs)


@dataclass(frozen=True, eq=False)
class StMatrix(MatrixMove):
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

    def sides(self) -> tuple[RegisterTensor, SharedTensor]:
        return self.src, self.dst

    def effects(self) -> Effects:
        return Effects(writes=(self.dst,))

    def evaluate(self, env: Evaluation) -> None:
        env.store(self.dst, self.offsets, self.dims, env.tile(self.src), checked=False)

    def emit_c(self, ctx: CContext) -> None:
        c_shared.store(ctx, self.dst, self.offsets, self.dims, ctx.read(self.src))

    def emit(self, ctx: EmitContext) -> None:
        owner, words = ctx.guard(ctx.first_replica(ctx.layout(self.src))), iter(ctx.words(self.src))
        for count, address in zip(self.groups, self.addresses(ctx), strict=True):
            ctx.b.emit_to(self.opcode(count), address, Vector(tuple(islice(words, count))), guard=owner)


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
