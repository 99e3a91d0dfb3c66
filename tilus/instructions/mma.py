"""Matrix products on tensor cores: `dot`, and the `mma_sync` that it becomes (the table of these is in `mma_atoms`).

A block's product is spread over warps and repeats of one warp-wide instruction (see `mma_blocks`). Which instruction and which
partition follows from the dtypes, the extents and the layouts that are known: tiles that an atom's fragments divide stay as
they are. A batch dim in front lets warps work on different products, for example on different parts of k.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tilus.codegen.c.context import CContext
from tilus.codegen.c.product import Product
from tilus.codegen.c.tile import Leaf, Tile
from tilus.codegen.context import EmitContext
from tilus.dtypes import DataType, f16, f32, int32
from tilus.errors import TilusError
from tilus.instructions.cast import cast_tile
from tilus.instructions.fill import zeros
from tilus.instructions.mma_atoms import MMA_ATOMS, M, MmaAtom, N, atoms_of
from tilus.instructions.mma_blocks import Candidate, Extents, blocks_of_operand, candidate, slots_by_index, warp_grids
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Array, Evaluation
from tilus.ir.instruction import Instruction
from tilus.ir.layout_rules import LayoutPriority, LayoutRule, OneOf, Way, same_owners
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout, slot_map
from tilus.ptx.module import Reg, RegClass, Vector
from tilus.target import Target

Known = tuple[RegisterLayout | None, RegisterLayout | None, RegisterLayout | None, RegisterLayout | None]
"""What is known of the layouts of a, b, acc and out, as rank 3."""


@functools.lru_cache(maxsize=1024)
def choose(atoms: tuple[MmaAtom, ...], extents: Extents, num_warps: int, known: Known) -> tuple[Candidate, ...]:
    """The ways to compute a product, best first: least conversions (that of the result last of all), then the largest atom, the
    least repeated work, and the fewest fragments to load."""
    found: dict[Candidate, None] = {}
    for atom in (atom for atom in atoms if extents.k % atom.k == 0):
        operands = zip((0, 1, 2, 2), known, strict=True)
        derived = [b for which, l in operands if l for b in blocks_of_operand(atom, which, l, extents)]
        found |= {candidate(atom, blocks, extents.k): None for blocks in (*warp_grids(extents, num_warps), *derived)}

    def rank(way: Candidate) -> tuple[int, ...]:
        wanted = zip((*way.layouts, way.layouts[2]), known, strict=True)
        a, b, acc, out = (own is not None and not same_owners(layout, own) for layout, own in wanted)
        return int(out), a + b + acc + out, -way.atom.num_macs, way.blocks.num_replicas, way.num_loads

    return tuple(sorted(found, key=rank))


@dataclass(frozen=True, eq=False)
class Dot(Instruction):
    """`out = a @ b + acc`: a [m, k] and b [k, n] of types that an instruction of tensor cores multiplies, acc and out [m, n] of
    one that it adds up in; or all with one batch dim in front. It becomes an `mma_sync` when the target is known."""

    mnemonic = "dot"
    layout_priority = LayoutPriority.MATRIX
    accumulates = True

    out: RegisterTensor
    a: RegisterTensor
    b: RegisterTensor
    acc: RegisterTensor

    def verify(self) -> None:
        _check_dtypes(self.a.dtype, self.b.dtype, self.acc.dtype)
        if self.out.dtype != self.acc.dtype:
            raise TilusError(f"dot adds up in {self.acc.dtype.name}, its result is {self.out.dtype.name}")
        if self.a.rank not in (2, 3) or self.b.rank != self.a.rank:
            raise TilusError(f"dot of tiles of rank {self.a.rank} and {self.b.rank}, expected 2 and 2, or 3 and 3")
        if self.a.shape[-1] != self.b.shape[-2] or self.a.shape[:-2] != self.b.shape[:-2]:
            raise TilusError(
                f"dot of shapes {list(self.a.shape)} and {list(self.b.shape)}: the inner dims differ",
                hint="the left tile is [m, k], the right one [k, n]: tilus.transpose swaps dims",
            )
        expected = (*self.a.shape[:-1], self.b.shape[-1])
        if self.acc.shape != expected or self.out.shape != expected:
            raise TilusError(f"dot: the accumulator has shape {list(self.acc.shape)}, the product {list(expected)}")

    @property
    def extents(self) -> Extents:
        batch = self.a.shape[0] if self.a.rank == 3 else 1
        return Extents(batch, self.a.shape[-2], self.b.shape[-1], self.a.shape[-1])

    @property
    def atoms(self) -> tuple[MmaAtom, ...]:
        return atoms_of(self.a.dtype, self.b.dtype, self.acc.dtype)

    def ways(self, known: Mapping[RegisterTensor, RegisterLayout | None], num_threads: int) -> tuple[Candidate, ...]:
        """How the block can compute it, best first."""
        e, atoms = self.extents, self.atoms
        steps = [atom.k for atom in atoms]
        if e.m % M or e.n % N or all(e.k % step for step in steps):
            raise TilusError(
                f"dot of shape m={e.m}, n={e.n}, k={e.k}" + (f", batch={e.batch}" if self.a.rank == 3 else "")
                + f": expected multiples of {M}, {N} and {min(steps)}",
                hint="pad the tiles: loads give zeros outside of a tensor",
            )  # fmt: skip
        a, b, acc, out = (self._rank3(known.get(t)) for t in (self.a, self.b, self.acc, self.out))
        return choose(atoms, e, num_threads // 32, (a, b, acc, out))

    def _rank3(self, layout: RegisterLayout | None) -> RegisterLayout | None:
        return layout if layout is None or layout.rank == 3 else layout.unsqueeze(0)

    def layouts(self, chosen: Candidate) -> tuple[RegisterLayout, RegisterLayout, RegisterLayout]:
        """What a way to compute it asks of a, b and acc."""
        return chosen.layouts if self.a.rank == 3 else chosen.layouts_of_one

    def way(self, chosen: Candidate) -> Way:
        """The layouts of its tiles in one way to compute it."""
        a, b, c = self.layouts(chosen)
        return {self.a: a, self.b: b, self.acc: c, self.out: c}

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return OneOf(
            lambda known: [(self.way(c), c.num_products * c.atom.cycles) for c in self.ways(known, num_threads)]
        )

    def specialized(self, target: Target) -> Instruction | None:
        """The largest atom that the target has and k is a multiple of."""
        fitting = [atom for atom in self.atoms if self.extents.k % atom.k == 0]
        own = next((atom for atom in fitting if atom.runs_on(target)), None)
        if own is None:
            raise TilusError(
                f"dot of {self.a.dtype.name} and {self.b.dtype.name} with k = {self.extents.k} needs {fitting[0].targets}, "
                f"the target is {target}",
                hint="cast the operands to a type that it multiplies, for example f16 or int8",
            )
        return Mma(self.out, self.a, self.b, self.acc, own.name)

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, product(env.tile(self.a), env.tile(self.b), env.tile(self.acc), self.out.dtype))

    def emit_c(self, ctx: CContext) -> None:
        a, b, acc = (_batched(ctx.read(t)) for t in (self.a, self.b, self.acc))
        target = None
        if self.out.mutable and self.out.dtype != f16:
            storage = ctx.storage(self.out)
            if storage.layout.is_injective():
                target = Leaf(storage.source, storage.layout if self.a.rank == 3 else storage.layout.unsqueeze(0))
            ctx.settle(self.out)
        total = Product(ctx, a, b, acc, target).result()
        if self.a.rank == 2:
            total = total.renamed(self.out.shape, lambda layout: layout.squeeze(0))
        if self.out.dtype == f16:
            total = cast_tile(ctx, total, f16)
        if self.out.mutable and total.array == ctx.storage(self.out):
            ctx.note_layout(self.out, total.leaves[0].layout)
        else:
            ctx.define(self.out, total)


@dataclass(frozen=True, eq=False)
class Mma(Dot):
    """A `dot` by mma.sync: `atom` names the instruction (m16n8k16.f16.f16.f32: shape, dtypes of a, b and the accumulator)."""

    mnemonic = "mma_sync"

    atom: str

    def verify(self) -> None:
        super().verify()
        names = [atom.name for atom in atoms_of(self.a.dtype, self.b.dtype, self.acc.dtype)]
        if self.atom not in names:
            raise TilusError(f"mma_sync has no atom {self.atom} for its operands, expected {' or '.join(names)}")

    @property
    def atoms(self) -> tuple[MmaAtom, ...]:
        return tuple(atom for atom in super().atoms if atom.name == self.atom)

    def specialized(self, target: Target) -> Instruction | None:
        return None

    def emit(self, ctx: EmitContext) -> None:
        layouts = {t: ctx.layout(t) for t in (self.out, self.a, self.b, self.acc)}
        way = self.ways(layouts, ctx.num_threads)[0]
        tiles = zip((self.a, self.b, self.acc), self.layouts(way), strict=True)
        a, b, acc = (ctx.aligned_words(tile, layout) for tile, layout in tiles)
        in_place = self.out is self.acc
        result = acc if in_place else [ctx.b.reg(RegClass.B32) for _ in acc]
        a_slots, b_slots = slots_by_index(way.a_blocks), slots_by_index(way.b_blocks)
        depth = way.a_blocks.shape[2]
        for slot, (batch, row, column) in enumerate(way.blocks.table()[0].tolist()):
            d = _fragment(result, slot, way.blocks)
            for step in range(depth):
                left = _fragment(a, a_slots[batch, row, step], way.a_blocks)
                right = _fragment(b, b_slots[batch, step, column], way.b_blocks)
                ctx.b.emit_to(way.atom.opcode, d, left, right, d if step else _fragment(acc, slot, way.blocks))
        count = way.blocks.num_locals * depth
        ctx.note(self, f"dot: {count} x mma.m{M}n{N}k{way.atom.k} per warp")
        if not in_place:
            order = slot_map(layouts[self.out], self.layouts(way)[2])
            ctx.define(self.out, ctx.pick(self.out.dtype, result, order))


def _batched(tile: Tile) -> Tile:
    """A matrix as a batch of one."""
    return tile if len(tile.shape) == 3 else tile.renamed((1, *tile.shape), lambda layout: layout.unsqueeze(0))


def _fragment(words: Sequence[Reg], slot: int, blocks: RegisterLayout) -> Vector:
    """The registers of the fragment in one slot of `blocks`."""
    count = len(words) // blocks.num_locals
    return Vector(tuple(words[slot * count : (slot + 1) * count]))


def product(a: Array, b: Array, acc: Array, dtype: DataType) -> Array:
    """`a @ b + acc` in the type of the accumulator: integers wrap; floats are multiplied exactly and added up in f32, in no
    promised order, and rounded once more where the accumulator is f16."""
    if dtype.is_integer:  # sums of products of at most 8 bits are exact in float64
        total = np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64) + acc
        return total.astype(dtype.compute)
    total = np.matmul(a, b) + acc
    return total if dtype == f32 else dtype.round(total)


def _check_dtypes(a: DataType, b: DataType, acc: DataType) -> None:
    if atoms_of(a, b, acc):
        return
    accumulators = dict.fromkeys(atom.c.name for atom in MMA_ATOMS if (atom.a, atom.b) == (a, b))
    if accumulators:
        raise TilusError(f"dot of {a.name} and {b.name} adds up in {' or '.join(accumulators)}, not in {acc.name}")
    partners = dict.fromkeys(atom.b.name for atom in MMA_ATOMS if atom.a == a)
    pairs = {atom.a.name: None for atom in MMA_ATOMS}
    expected = f"{a.name} with {' or '.join(partners)}" if partners else f"operands of {', '.join(pairs)}"
    closest = "tf32" if a == f32 else "f16"
    raise TilusError(
        f"dot of {a.name} and {b.name}, expected {expected}", hint=f"cast the operands: tilus.cast(x, tilus.{closest})"
    )


@builtin
def dot(b: IRBuilder, x: RegisterTensor, y: RegisterTensor, acc: RegisterTensor | None = None) -> RegisterTensor:
    """`x @ y + acc` on tensor cores: x [m, k], y [k, n], acc [m, n] (zeros of f32 or int32 when not given).

    Operands: f16, bf16 or tf32 with the same, float8_e4m3 and float8_e5m2 in any mix, int8 and uint8, int4 and uint4 likewise.
    Accumulators: f32, for integers int32 (sums wrap), with f16 also f16. docs/language.md lists instructions and targets.
    With a batch dim in front of both, the products are independent. m and n must be multiples of 16 and 8, k of 16 bytes (8-bit
    floats: 32).
    Products are exact and added up in the accumulator's type, in no promised order; hardware may keep a few bits less.
    """
    from tilus.instructions.convert import Convert

    shape = (*x.shape[:-1], y.shape[-1])
    total = zeros.build(b, shape, int32 if x.dtype.is_integer else f32) if acc is None else acc
    right = b.emit(Convert(b.tile(y.dtype, y.shape), y)).out if x is y else y  # each side has a layout of its own
    return b.emit(Dot(b.tile(total.dtype, shape, name="acc"), x, right, total)).out
