"""ldmatrix and stmatrix: tiles between shared memory and the registers of a warp, as matrices of eight 16-byte rows.

A lane holds one 32-bit word of each matrix: word c of row r is in lane 4 r + c, or, transposed, elements 2c and 2c + 1 of a
column (16-bit elements only). So a tile can move this way when that fragment divides its layout and every row is 16 aligned
consecutive bytes of shared memory; elements of other widths than 16 bits travel as parts of such rows.
Source: PTX ISA, "Warp-level matrix instructions: ldmatrix" and "stmatrix".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tilus.codegen.access import shared_vector_size
from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, of_const, of_reg, register
from tilus.errors import TilusError
from tilus.instructions.shared import check_shared_access
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.tensor import RegisterTensor, SharedTensor
from tilus.layout import RegisterLayout, local, spatial
from tilus.layout.atoms import ldmatrix, ldmatrix_trans
from tilus.ptx.module import Address, Imm, Reg, RegClass, Vector
from tilus.target import Target

ROW_NBITS = 128


@dataclass(frozen=True)
class MatrixForm:
    """How matrices cover a tile. rows, columns: the tile's axes along which the rows of a matrix follow each other and along
    which a row runs. trans: a lane's two elements stand below each other. places: the quotient, one matrix a slot."""

    rows: int
    columns: int
    trans: bool
    places: RegisterLayout


def matrix_forms(layout: RegisterLayout, nbits: int) -> Iterator[MatrixForm]:
    """All ways in which the fragment of a matrix divides the layout of a tile of `nbits` wide elements."""
    if 32 % nbits:
        return
    fragments = [(False, ldmatrix(nbits))] + ([(True, ldmatrix_trans())] if nbits == 16 else [])
    for columns in reversed(range(layout.rank)):
        for rows in (axis for axis in range(layout.rank) if axis != columns):
            for trans, fragment in fragments:
                places = layout.try_divide(_along(fragment, layout.rank, rows, columns))
                if places is not None:
                    yield MatrixForm(rows, columns, trans, places)


def _along(matrix: RegisterLayout, rank: int, rows: int, columns: int) -> RegisterLayout:
    """A layout of two dims as one of `rank`, whose dims are those two axes."""
    while matrix.rank < rank:
        matrix = matrix.unsqueeze(0)
    others = iter(range(rank - 2))
    return matrix.permute([rank - 2 if a == rows else rank - 1 if a == columns else next(others) for a in range(rank)])


def matrix_form(
    tensor: SharedTensor, layout: RegisterLayout, offsets: Sequence[Expr], dims: Sequence[int]
) -> MatrixForm | None:
    """The form in which a tile of a shared tensor, whose layout is known, can move; None where there is none."""
    count = ROW_NBITS // tensor.dtype.nbits
    for form in matrix_forms(layout, tensor.dtype.nbits):
        one_row_a_thread = _along(spatial(8, 1) * local(1, count), layout.rank, form.rows, form.columns)
        if shared_vector_size(tensor, form.places * one_row_a_thread, offsets, dims) == count:
            return form
    return None


def matrix_groups(layout: RegisterLayout, nbits: int) -> tuple[int, ...]:
    """How many matrices each instruction moves, 4 where possible: four whose places are sums of two steps, or any one or two."""
    starts = _starts(layout, nbits)
    groups: list[int] = []
    while (done := sum(groups)) < len(starts):
        left = starts[done:]
        four = len(left) >= 4 and all(d == b + c - a for a, b, c, d in zip(*left[:4], strict=True))
        groups.append(4 if four else min(2, len(left)))
    return tuple(groups)


def _starts(layout: RegisterLayout, nbits: int) -> list[list[int]]:
    """Where each of a warp's matrices begins, relative to the warp's first element."""
    return layout.table()[0, :: 32 // nbits].tolist()


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

    def emit(self, ctx: EmitContext) -> None:
        layout, nbits = ctx.layout(self.out), self.src.dtype.nbits
        rows = _RowAddresses(ctx, self.src, layout, self.offsets, self.dims, self.rows)
        regs: list[Reg] = []
        for count in self.groups:
            address = rows.address(len(regs), count)
            group = [ctx.b.reg(RegClass.B32) for _ in range(count)]
            ctx.b.emit_to(f"ldmatrix.{_suffix(count, self.trans)}", Vector(tuple(group)), address)
            regs += group
        ctx.note(self, f"ldmatrix {self.src.name}: {_summary(self.groups, self.trans)}")
        ctx.note_shared(self, self.src, layout, self.offsets, self.dims, 32 // nbits, rows_of_16_bytes=True)
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

    def emit(self, ctx: EmitContext) -> None:
        layout, nbits = ctx.layout(self.src), self.dst.dtype.nbits
        rows = _RowAddresses(ctx, self.dst, layout, self.offsets, self.dims, self.rows)
        owner, words = ctx.guard(ctx.first_replica(layout)), ctx.words(self.src)
        done = 0
        for count in self.groups:
            source = Vector(tuple(words[done : done + count]))
            ctx.b.emit_to(f"stmatrix.{_suffix(count, self.trans)}", rows.address(done, count), source, guard=owner)
            done += count
        ctx.note(self, f"stmatrix {self.dst.name}: {_summary(self.groups, self.trans)}")
        ctx.note_shared(self, self.dst, layout, self.offsets, self.dims, 32 // nbits, rows_of_16_bytes=True)


def load_as_matrices(
    out: RegisterTensor, src: SharedTensor, offsets: tuple[Expr, ...], dims: tuple[int, ...]
) -> LdMatrix | None:
    """The ldmatrix that loads the tile, if there is one."""
    if out.layout is None or src.layout is None:
        return None
    form = matrix_form(src, out.layout, offsets, dims)
    if form is None:
        return None
    return LdMatrix(out, src, offsets, dims, form.rows, form.trans, matrix_groups(out.layout, src.dtype.nbits))


def store_as_matrices(
    dst: SharedTensor, src: RegisterTensor, offsets: tuple[Expr, ...], dims: tuple[int, ...], target: Target
) -> StMatrix | None:
    """The stmatrix that stores the tile, if there is one."""
    if src.layout is None or dst.layout is None or target.sm < 90:
        return None
    form = matrix_form(dst, src.layout, offsets, dims)
    if form is None:
        return None
    return StMatrix(dst, src, offsets, dims, form.rows, form.trans, matrix_groups(src.layout, dst.dtype.nbits))


@dataclass(frozen=True)
class _RowAddresses:
    """Addresses of matrix rows: lane 8 j + r gives row r of matrix j of an instruction."""

    ctx: EmitContext
    tensor: SharedTensor
    layout: RegisterLayout
    offsets: Sequence[Expr]
    dims: Sequence[int]
    rows: int

    def address(self, first: int, count: int) -> Address:
        """Of an instruction for `count` matrices from the one in a lane's word `first` on."""
        ctx = self.ctx
        index = [ctx.scalars.linear(e) for e in self.offsets]
        starts = _starts(self.layout, self.tensor.dtype.nbits)[first : first + count]
        for axis, (by_warp, by_matrix) in enumerate(zip(self._warp_index(), self._matrix_index(starts), strict=True)):
            index[self.dims[axis]] = index[self.dims[axis]] + by_warp + by_matrix
        row_dim = self.dims[self.rows]
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
