"""Matrix products of tiles: blocks of vector accumulators in registers.

Vectors run along rows or columns of the result, where one operand's elements follow each other; the other operand's are
broadcast. Where both operands follow each other along k only, vectors run along k and are added up at the end. Packed codes
become numbers on their way into the product while it is narrow; a wide one unpacks them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilus.codegen.c.blocks import Block, M, N, Operand, operand, registers, run_length
from tilus.codegen.c.code_product import CodeBlocks
from tilus.codegen.c.codes import Codes, unpack
from tilus.codegen.c.integer_product import Factor, integer_product
from tilus.codegen.c.nest import compacted, stride
from tilus.codegen.c.tile import Constant, Leaf, Tile, plain
from tilus.dtypes import f32, int32
from tilus.layout import SharedLayout, row_major

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext

NARROW = 16  # the widest product that unpacks codes as it goes


@dataclass(frozen=True)
class Shape:
    """Extents of a product. rows: along the vectors. columns: of broadcast elements."""

    batch: int
    vectors: int
    columns: int
    k: int


class Product:
    """a [batch, m, k] times b [batch, k, n] plus acc [batch, m, n], whose types add up in f32 or int32."""

    def __init__(self, ctx: CContext, a: Tile, b: Tile, acc: Tile, target: Leaf | None = None) -> None:
        """target: where the result may be, if it stands there in the right order; that may be where acc is."""
        self.ctx = ctx
        self.rows = a.shape[1]
        self.same_rows = _is_same(a, M) and _is_same(acc, M)
        if self.same_rows:
            a = a.renamed((a.shape[0], 1, a.shape[2]), lambda layout: layout.slice(M, 0, 1))
            acc = acc.renamed((acc.shape[0], 1, acc.shape[2]), lambda layout: layout.slice(M, 0, 1))
        self.a, self.b, self.acc, self.target = a, b, acc, None if self.same_rows else target
        self.dtype = f32 if a.dtype.is_float else int32

    def result(self) -> Tile:
        found = self._integers() if self.dtype == int32 else self._floats()
        if self.same_rows:
            shape = (found.shape[0], self.rows, found.shape[2])
            return found.renamed(shape, lambda layout: layout.expand(M, self.rows))
        return found

    # ---- ways

    def _floats(self) -> Tile:
        codes = self._codes()
        if codes is not None and self.b.shape[2] <= NARROW:
            return self._by_codes(codes)
        if codes is not None:
            batch, m, k = self.a.shape
            order = row_major((batch, k, m)).permute((0, 2, 1))
            leaf = unpack(self.ctx, codes, self.a.leaves[0], order)
            self.a = plain(self.a.dtype, self.a.shape, leaf.source, leaf.layout)
        a, b = self._linear(self.a), self._linear(self.b)
        run_m, run_n = run_length(a.layout, M), run_length(b.layout, N)
        lanes = self.ctx.target.lanes
        if min(run_m, run_n) < lanes and max(run_m, run_n) < lanes:
            if (
                run_length(a.layout, 2) >= lanes
                and run_length(b.layout, 1) >= lanes
                and min(self.a.shape[1], self.b.shape[2]) <= 8
            ):
                return self._along_k(a, b)
            if self.b.shape[2] >= self.a.shape[1] or self.b.shape[2] >= lanes:
                batch, k, n = self.b.shape
                order = compacted([row_major((batch, k, n))])
                b = self.ctx.computed(plain(self.b.dtype, self.b.shape, b.source, b.layout), "b", order).leaves[0]
                run_n = n
            else:
                batch, m, k = self.a.shape
                order = row_major((batch, k, m)).permute((0, 2, 1))
                a = self.ctx.computed(plain(self.a.dtype, self.a.shape, a.source, a.layout), "a", order).leaves[0]
                run_m = m
        return self._along_columns(a, b) if run_n >= lanes or run_n >= run_m else self._along_rows(a, b)

    def _codes(self) -> Codes | None:
        """The codes of a, if rows of the result can be lanes."""
        if not self.a.is_plain or not isinstance(self.a.leaves[0].source, Codes):
            return None
        codes = self.a.leaves[0].source
        return codes if CodeBlocks.lanes_of(self.ctx, codes, self.a) > 1 else None

    def _linear(self, tile: Tile) -> Leaf:
        """An operand as an array whose every dim has one stride."""
        leaf = self.ctx.as_array(tile)
        if any(len(terms) > 1 or (terms and terms[0].weight != 1) for terms in leaf.layout.terms):
            dims = sorted(range(3), key=lambda d: -stride(leaf.layout, d, 1))
            order = row_major([tile.shape[d] for d in dims]).permute([dims.index(d) for d in range(3)])
            return self.ctx.computed(plain(tile.dtype, tile.shape, leaf.source, leaf.layout), "x", order).leaves[0]
        return leaf

    def _integers(self) -> Tile:
        a, b = self._linear(self.a), self._linear(self.b)
        target, reads = self._sums(row_major(self.acc.shape))
        if not reads:
            self.ctx.copy(target, self.acc)
        integer_product(self.ctx, Factor(a, self.a.dtype), Factor(b, self.b.dtype), target)
        return self._done(target)

    # ---- the result

    def _sums(self, layout: SharedLayout) -> tuple[Leaf, bool]:
        """Where the result is written, and whether the sums so far have to be read there."""
        is_zero = isinstance(self.acc.leaves[0].source, Constant) and self.acc.is_plain and _is_zero(self.acc)
        if self.target is not None and self.target.layout == layout:
            target = self.target
            if not is_zero and self.acc.leaves != (target,):
                self.ctx.copy(target, self.acc)
        else:
            target = Leaf(self.ctx.array(self.dtype, layout.size, "acc"), layout)
            if not is_zero:
                self.ctx.copy(target, self.acc)
        return target, not is_zero

    def _done(self, target: Leaf) -> Tile:
        return plain(self.dtype, self.acc.shape, target.source, target.layout)

    # ---- vectors along a dim of the result

    def _along_rows(self, a: Leaf, b: Leaf) -> Tile:
        batch, m, n = self.acc.shape
        target, reads = self._sums(row_major((batch, n, m)).permute((0, 2, 1)))
        shape = Shape(batch, m, n, self.a.shape[2])
        self._blocks(shape, operand(a, (0, 1, 2)), operand(b, (0, 2, 1)), operand(target, (0, M, N)), reads)
        return self._done(target)

    def _along_columns(self, a: Leaf, b: Leaf) -> Tile:
        batch, m, n = self.acc.shape
        target, reads = self._sums(row_major((batch, m, n)))
        shape = Shape(batch, n, m, self.a.shape[2])
        self._blocks(shape, operand(b, (0, 2, 1)), operand(a, (0, 1, 2)), operand(target, (0, N, M)), reads)
        return self._done(target)

    def _blocks(self, shape: Shape, wide: Operand, narrow: Operand, target: Operand, reads: bool) -> None:
        lanes = _divided(self.ctx.target.lanes, shape.vectors) if wide.steps[1] == 1 or shape.vectors == 1 else 1
        vectors, columns = _block_of(self.ctx, shape.vectors // lanes, shape.columns)
        writer = self.ctx.writer
        with writer.loops([shape.batch, shape.vectors // (lanes * vectors)]) as (batch, block):
            first = f"{block} * {lanes * vectors}" if block != "0" else "0"
            whole, rest = divmod(shape.columns, columns)
            parts = [(whole, columns, 0), (1, rest, whole * columns)] if rest else [(whole, columns, 0)]
            for count, width, start in parts:
                with writer.block(), writer.loops([count]) as (part,):
                    column = f"({part} * {width} + {start})" if part != "0" else str(start)
                    tile = Block(self.ctx, lanes, vectors, width, batch, first, column, target)
                    tile.open(reads)
                    k = writer.name("k")
                    with writer.block(f"for (int64_t {k} = 0; {k} < {shape.k}; {k}++)"):
                        for i in range(vectors):
                            place = wide.at(batch, f"{first} + {i * lanes}", k)
                            writer.line(f"tl_f32x{lanes} w{i} = tl_load_f32x{lanes}(&{place});")
                            if width > 1 and lanes > 1:
                                writer.line(f"TL_KEEP(w{i});")
                        for j in range(width):
                            tile.add(j, narrow.at(batch, f"{column} + {j}", k), [f"w{i}" for i in range(vectors)])
                    tile.close()

    # ---- vectors along k

    def _along_k(self, a: Leaf, b: Leaf) -> Tile:
        batch, m, n = self.acc.shape
        k = self.a.shape[2]
        target, reads = self._sums(row_major((batch, m, n)))
        left, right, out = operand(a, (0, 1, 2)), operand(b, (0, 2, 1)), operand(target, (0, M, N))
        lanes, writer = _divided(self.ctx.target.lanes, k), self.ctx.writer
        rows, columns = _divisor(m, 4), _divisor(n, 4)
        with writer.loops([batch, m // rows, n // columns]) as (at, row, column):
            pairs = [(i, j) for i in range(rows) for j in range(columns)]
            for i, j in pairs:
                writer.line(f"tl_f32x{lanes} p{i}_{j} = {{0}};" if lanes > 1 else f"float p{i}_{j} = 0;")
            step = writer.name("k")
            with writer.block(f"for (int64_t {step} = 0; {step} < {k}; {step} += {lanes})"):
                for name, side, first, count in (
                    ("x", left, f"{row} * {rows}", rows),
                    ("y", right, f"{column} * {columns}", columns),
                ):
                    for i in range(count):
                        place = side.at(at, f"{first} + {i}", step)
                        writer.line(f"const tl_f32x{lanes} {name}{i} = tl_load_f32x{lanes}(&{place});")
                for i, j in pairs:
                    writer.line(f"p{i}_{j} = tl_mad_f32x{lanes}(x{i}, y{j}, p{i}_{j});")
            for i, j in pairs:
                place = out.at(at, f"{row} * {rows} + {i}", f"{column} * {columns} + {j}")
                writer.line(f"{place} {'+=' if reads else '='} tl_total_f32x{lanes}(p{i}_{j});")
        return self._done(target)

    # ---- packed codes

    def _by_codes(self, codes: Codes) -> Tile:
        batch, m, n = self.acc.shape
        x = operand(self._linear(self.b), (0, 2, 1))
        target, reads = self._sums(row_major((batch, n, m)).permute((0, 2, 1)))
        CodeBlocks(self.ctx, codes, self.a, x, operand(target, (0, M, N)), n, reads).emit()
        return self._done(target)


def _is_same(tile: Tile, dim: int) -> bool:
    return tile.shape[dim] > 1 and all(all(t.stride == 0 for t in leaf.layout.terms[dim]) for leaf in tile.leaves)


def _is_zero(tile: Tile) -> bool:
    text = tile.leaves[0].source.element("0")
    return text in ("0x0.0p+0f", "(int32_t)0ll")


def _divisor(extent: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if extent % d == 0)


def _divided(lanes: int, extent: int) -> int:
    """The widest vector that the extent is a multiple of; vectors have 4, 8 or 16 lanes."""
    while lanes > 1 and extent % lanes:
        lanes //= 2
    return lanes if lanes >= 4 else 1


def _block_of(ctx: CContext, vectors: int, columns: int) -> tuple[int, int]:
    """Vectors and columns of accumulators that load the fewest operands for each product."""
    most = registers(ctx)
    ways = [(v, c) for v in range(1, 5) for c in range(1, min(columns, most) + 1) if vectors % v == 0 and v * c <= most]

    def loads(way: tuple[int, int]) -> tuple[float, int]:
        v, c = way
        rest = columns % c
        trips = columns // c + bool(rest)
        return (trips * v + columns) / (v * columns) + (0.05 if rest else 0.0), -v * c

    return min(ways, key=loads)
