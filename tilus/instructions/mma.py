"""Matrix products on tensor cores: `dot` on mma.sync m16n8k16 (f16 and bf16, f32 accumulation; sm_80 and later).

A block's product is a grid of warps times repeats times the instruction's fragments (PTX ISA, "Matrix fragments for
mma.m16n8k16"). A batch dim in front lets warps work on different products, for example on different parts of k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tilus.codegen.context import EmitContext
from tilus.dtypes import bf16, f16, f32
from tilus.errors import TilusError
from tilus.instructions.fill import zeros
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.instruction import Instruction
from tilus.ir.layout_rules import LayoutPriority, LayoutRule, OneOf, Way, moved_nbits
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout, local, replicated, slot_map, spatial
from tilus.layout.atoms import mma_a, mma_b, mma_c
from tilus.ptx.module import Reg, RegClass, Vector

M, N, K = 16, 8, 16


@dataclass(frozen=True)
class WarpGrid:
    """How warps share a product: `batch * m * n` of them work on different parts, `replicas` of each do the same."""

    batch: int
    m: int
    n: int
    replicas: int


@dataclass(frozen=True)
class Fragments:
    """The layouts of one block-level product, and repeats of the instruction per warp along batch, m, n and k."""

    a: RegisterLayout
    b: RegisterLayout
    c: RegisterLayout
    repeats: tuple[int, int, int, int]


@functools.lru_cache(maxsize=1024)
def fragments(batch: int, m: int, n: int, k: int, grid: WarpGrid) -> Fragments:
    """Layouts [batch, m, k], [batch, k, n] and [batch, m, n]; the extents must be divisible by the grid and the fragments."""
    rb, rm, rn, rk = batch // grid.batch, m // (M * grid.m), n // (N * grid.n), k // K
    spare, warp_b = replicated(grid.replicas, 3), spatial(grid.batch, 1, 1)
    warp_m, warp_n = spatial(1, grid.m, 1), spatial(1, 1, grid.n)
    same_m, same_n = replicated(grid.m, 3), replicated(grid.n, 3)
    return Fragments(
        spare * warp_b * warp_m * same_n * local(rb, rm, rk) * mma_a().unsqueeze(0),
        spare * warp_b * same_m * warp_n * local(rb, rk, rn) * mma_b().unsqueeze(0),
        spare * warp_b * warp_m * warp_n * local(rb, rm, rn) * mma_c().unsqueeze(0),
        (rb, rm, rn, rk),
    )


def _factorizations(num_warps: int) -> Iterator[tuple[int, int, int, int]]:
    divisors = [d for d in range(1, num_warps + 1) if num_warps % d == 0]
    for batch in divisors:
        for m in divisors:
            for n in divisors:
                if num_warps % (batch * m * n) == 0:
                    yield batch, m, n, num_warps // (batch * m * n)


def warp_grids(batch: int, m: int, n: int, k: int, num_warps: int) -> list[WarpGrid]:
    """All ways to share the product among the warps, best first: least repeated work, then fewest fragments to load."""
    if k % K:
        return []
    found = [
        WarpGrid(b, wm, wn, r)
        for b, wm, wn, r in _factorizations(num_warps)
        if batch % b == 0 and m % (M * wm) == 0 and n % (N * wn) == 0
    ]

    def cost(grid: WarpGrid) -> tuple[int, int, int]:
        rb, rm, rn = batch // grid.batch, m // (M * grid.m), n // (N * grid.n)
        return grid.replicas, rb * (2 * rm + rn), -grid.m

    return sorted(found, key=cost)


@dataclass(frozen=True, eq=False)
class Dot(Instruction):
    """`out = a @ b + acc`: a [m, k], b [k, n] of f16 or bf16, acc and out [m, n] of f32; or all with one batch dim in front."""

    mnemonic = "dot"
    layout_priority = LayoutPriority.MATRIX
    accumulates = True

    out: RegisterTensor
    a: RegisterTensor
    b: RegisterTensor
    acc: RegisterTensor

    def verify(self) -> None:
        if self.a.dtype not in (f16, bf16) or self.b.dtype != self.a.dtype:
            raise TilusError(
                f"dot of {self.a.dtype.name} and {self.b.dtype.name}, expected f16 with f16 or bf16 with bf16",
                hint="cast the operands: tilus.cast(x, tilus.f16)",
            )
        if self.acc.dtype != f32 or self.out.dtype != f32:
            raise TilusError(f"dot accumulates in f32, the accumulator is {self.acc.dtype.name}")
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
    def extents(self) -> tuple[int, int, int, int]:
        """batch, m, n, k"""
        batch = self.a.shape[0] if self.a.rank == 3 else 1
        return batch, self.a.shape[-2], self.b.shape[-1], self.a.shape[-1]

    def _candidates(self, num_threads: int) -> list[Fragments]:
        batch, m, n, k = self.extents
        grids = warp_grids(batch, m, n, k, num_threads // 32)
        if not grids:
            raise TilusError(
                f"dot of shape m={m}, n={n}, k={k}" + (f", batch={batch}" if self.a.rank == 3 else "")
                + f": expected multiples of {M}, {N} and {K}",
                hint="pad the tiles: loads give zeros outside of a tensor",
            )  # fmt: skip
        return [fragments(batch, m, n, k, grid) for grid in grids]

    def _own_rank(self, layout: RegisterLayout) -> RegisterLayout:
        return layout if self.a.rank == 3 else layout.squeeze(0)

    def _way(self, layouts: Fragments) -> Way:
        return {
            tile: self._own_rank(layout)
            for tile, layout in zip(
                (self.a, self.b, self.acc, self.out), (layouts.a, layouts.b, layouts.c, layouts.c), strict=True
            )
        }

    def layout_rule(self, num_threads: int) -> LayoutRule:
        @functools.cache
        def choices() -> list[tuple[Way, int]]:
            return [(self._way(c), math.prod(c.repeats)) for c in self._candidates(num_threads)]

        return OneOf(lambda known: choices())

    def evaluate(self, env: Evaluation) -> None:
        product = np.matmul(env.tile(self.a), env.tile(self.b))
        env.set_tile(self.out, product + env.tile(self.acc))

    def emit(self, ctx: EmitContext) -> None:
        layouts = {t: ctx.layout(t) for t in (self.out, self.a, self.b, self.acc)}
        chosen = min(self._candidates(ctx.num_threads), key=lambda c: moved_nbits(self._way(c), layouts))
        a = ctx.aligned_words(self.a, self._own_rank(chosen.a))
        b = ctx.aligned_words(self.b, self._own_rank(chosen.b))
        acc = ctx.aligned_words(self.acc, self._own_rank(chosen.c))
        in_place = self.out is self.acc
        result = acc if in_place else [ctx.b.reg(RegClass.B32) for _ in acc]
        kind = self.a.dtype.name
        rb, rm, rn, rk = chosen.repeats
        for ib, im, jn, kk in np.ndindex(rb, rm, rn, rk):
            first_a = ((ib * rm + im) * rk + kk) * 4
            first_b = ((ib * rk + kk) * rn + jn) * 2
            first_c = ((ib * rm + im) * rn + jn) * 4
            d = _vector(result, first_c, 4)
            c = d if kk else _vector(acc, first_c, 4)
            ctx.b.emit_to(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
                d,
                _vector(a, first_a, 4),
                _vector(b, first_b, 2),
                c,
            )
        ctx.note(self, f"dot: {rb * rm * rn * rk} x mma.m16n8k16 per warp")
        if not in_place:
            order = slot_map(layouts[self.out], self._own_rank(chosen.c))
            ctx.define(self.out, [result[slot] for slot in order])


def _vector(words: list[Reg], first: int, count: int) -> Vector:
    return Vector(tuple(words[first : first + count]))


@builtin
def dot(b: IRBuilder, x: RegisterTensor, y: RegisterTensor, acc: RegisterTensor | None = None) -> RegisterTensor:
    """`x @ y + acc` on tensor cores: x [m, k] and y [k, n] of f16 or bf16, acc [m, n] of f32 (zeros when not given).

    With a batch dim in front of both, the products are independent. m, n, k must be multiples of 16, 8 and 16.
    """
    from tilus.instructions.view import Convert

    shape = (*x.shape[:-1], y.shape[-1])
    total = zeros.build(b, shape, f32) if acc is None else acc
    right = b.emit(Convert(b.tile(y.dtype, y.shape), y)).out if x is y else y  # each side has a layout of its own
    return b.emit(Dot(b.tile(f32, shape, name="acc"), x, right, total)).out
