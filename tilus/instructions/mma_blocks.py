"""How the warps of a block share a product: which warp computes which 16 x 8 blocks, and which fragments it needs for that.

`blocks` is a register layout of shape [batch, m / 16, n / 8] whose "threads" are warps and whose "slots" are a warp's repeats of
the instruction. Layouts of operands are products of such a layout with an atom's fragment, so quotients by the fragment give
it back: that is how the layout of a tile which is already known decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

from tilus.instructions.mma_atoms import M, MmaAtom, N
from tilus.layout import Digit, RegisterLayout, broadcast_operand, local, replicated, spatial

BATCH, ROWS, COLUMNS = 0, 1, 2


@dataclass(frozen=True)
class Extents:
    """Of a product [batch, m, k] @ [batch, k, n]."""

    batch: int
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Candidate:
    """A way to compute a product. a_blocks, b_blocks, blocks: layouts [batch, m, k], [batch, k, n] and [batch, m, n] of whole
    fragments over warps; `layouts` are those of the elements."""

    atom: MmaAtom
    blocks: RegisterLayout
    a_blocks: RegisterLayout
    b_blocks: RegisterLayout

    @property
    def num_loads(self) -> int:
        """Registers of operands that a warp needs, in fragments of B (one of A has twice as many)."""
        return 2 * self.a_blocks.num_locals + self.b_blocks.num_locals

    @property
    def num_products(self) -> int:
        """Instructions of a warp."""
        return self.blocks.num_locals * self.a_blocks.shape[2]

    @cached_property
    def layouts(self) -> tuple[RegisterLayout, RegisterLayout, RegisterLayout]:
        """Of A, B and C as batches, in elements."""
        a, b, c = (fragment.unsqueeze(0) for fragment in self.atom.layouts)
        return self.a_blocks * a, self.b_blocks * b, self.blocks * c

    @cached_property
    def layouts_of_one(self) -> tuple[RegisterLayout, RegisterLayout, RegisterLayout]:
        """The same without a batch dim, for a batch of 1."""
        a, b, c = self.layouts
        return a.squeeze(0), b.squeeze(0), c.squeeze(0)


def candidate(atom: MmaAtom, blocks: RegisterLayout, k: int) -> Candidate:
    """Warps hold A along the whole of k for the rows of their blocks (warps along n hold the same), and likewise B."""
    depth = k // atom.k
    b_blocks = broadcast_operand(blocks, [ROWS])
    places = _insert_after_batch(b_blocks.local_digits, Digit(depth, 1, 1))
    return Candidate(
        atom,
        blocks,
        broadcast_operand(blocks, [COLUMNS]) * local(1, 1, depth),
        RegisterLayout((b_blocks.shape[0], depth, b_blocks.shape[2]), b_blocks.thread_digits, places),
    )


def warp_grids(extents: Extents, num_warps: int) -> list[RegisterLayout]:
    """The regular partitions of the blocks: a grid of warps [batch, m, n], each with one box of repeats; the rest replicates.

    Best first: least repeated work, then fewest fragments to load.
    """
    batch, m, n = extents.batch, extents.m // M, extents.n // N

    def cost(grid: tuple[int, int, int]) -> tuple[int, int, int]:
        gb, gm, gn = grid
        return num_warps // (gb * gm * gn), batch // gb * (2 * (m // gm) + n // gn), -gm

    return [
        replicated(num_warps // (gb * gm * gn), 3) * spatial(gb, gm, gn) * local(batch // gb, m // gm, n // gn)
        for gb, gm, gn in sorted(_grids((batch, m, n), num_warps), key=cost)
    ]


def _grids(extents: tuple[int, int, int], num_warps: int) -> Iterator[tuple[int, int, int]]:
    divisors = [[d for d in range(1, num_warps + 1) if num_warps % d == 0 and extent % d == 0] for extent in extents]
    for batch in divisors[0]:
        for m in divisors[1]:
            for n in divisors[2]:
                if num_warps % (batch * m * n) == 0:
                    yield batch, m, n


def blocks_of_operand(atom: MmaAtom, which: int, layout: RegisterLayout, extents: Extents) -> Iterator[RegisterLayout]:
    """The partitions that leave operand `which` (0: A, 1: B, 2: C) in `layout`, of rank 3; none when the atom does not divide it.

    Warps that hold the same A compute other columns if there are enough, or repeat each other's work; with B other rows.
    """
    quotient = layout.try_divide(atom.layouts[which].unsqueeze(0))
    if quotient is None:
        return
    if which == 2:
        yield quotient
        return
    depth, free = (2, COLUMNS) if which == 0 else (1, ROWS)
    if any(digit.dim == depth for digit in quotient.thread_digits):
        return  # warps that share k would have to add up their results
    shape = (extents.batch, extents.m // M, extents.n // N)
    own = tuple(digit for digit in quotient.local_digits if digit.dim not in (depth, None))
    for extent in sorted({1, shape[free]}, reverse=True):  # how many parts warps that hold the same may make
        threads, shared = _spread(quotient.thread_digits, free, extent, shape[free])
        rest = Digit(shape[free] // shared, free, 1)
        slots = (*own, rest) if which == 0 else _insert_after_batch(own, rest)
        yield RegisterLayout(shape, threads, slots)


def _spread(digits: Sequence[Digit], dim: int, most: int, extent: int) -> tuple[tuple[Digit, ...], int]:
    """Let replication digits count along `dim`, up to `most` values; the warps so obtained take equal runs of `extent`.

    Returns the digits, and how many values they count to.
    """
    parts: list[tuple[Digit, int]] = []  # innermost first; with the size of the inner part that counts
    count = 1
    for digit in reversed(digits):
        share = gcd(digit.size, most // count) if digit.dim is None else 1
        parts.append((digit, share))
        count *= share
    weight, result = extent // count, list[Digit]()
    for digit, share in parts:
        if digit.dim is None:
            result += [Digit(share, dim, weight), Digit(digit.size // share, None, 0)]
            weight *= share
        else:
            result.append(digit)
    return tuple(reversed(result)), count


def _insert_after_batch(digits: Iterable[Digit], digit: Digit) -> tuple[Digit, ...]:
    """Behind the outermost digits that count along the batch."""
    all_digits = tuple(digits)
    first = next((i for i, d in enumerate(all_digits) if d.dim != BATCH), len(all_digits))
    return (*all_digits[:first], digit, *all_digits[first:])


def slots_by_index(layout: RegisterLayout) -> dict[tuple[int, ...], int]:
    """The slot (of several the first) that adds an index to that of the warp."""
    slots: dict[tuple[int, ...], int] = {}
    for slot, index in enumerate(layout.table()[0].tolist()):
        slots.setdefault(tuple(index), slot)
    return slots
