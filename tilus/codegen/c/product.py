"""Matrix products of tiles: blocks of vector accumulators in registers.

Vectors run along rows or columns of the result, where one operand's elements follow each other; the other operand's are
broadcast. Where both operands follow each other along k only, vectors run along k and are added up at the end. Packed codes
become numbers on their way into the product while it is narrow; a wide one unpacks them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilus.codegen.c.codes import Codes, split_address, unpack, vector_lanes, vector_number
from tilus.codegen.c.nest import compacted, stride
from tilus.codegen.c.tile import Constant, Leaf, Tile, plain
from tilus.dtypes import f32, int32
from tilus.layout import LayoutError, SharedLayout, row_major

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext

BATCH, M, N = 0, 1, 2
LINE_NBYTES = 64  # of a cache
# How far ahead codes are asked for: of 1 to 6 KiB this gave the most bytes a second for codes of 4 and 8 bits, up to 1.7 times
# what the processor's own prefetching gives. What is asked for behind the end of an array is never read.
PREFETCH_NBYTES = 2048
NARROW = 16  # the widest product that unpacks codes as it goes


@dataclass(frozen=True)
class Operand:
    """An operand in memory, linear in each of its dims. steps: along the batch, the result's dim, and k."""

    name: str
    origin: int
    steps: tuple[int, int, int]

    def at(self, batch: str, index: str, k: str) -> str:
        parts = [f"({x}) * {s}" for x, s in zip((batch, index, k), self.steps, strict=True) if s and x != "0"]
        return " + ".join([f"{self.name}[{self.origin}", *parts]) + "]"


@dataclass(frozen=True)
class Shape:
    """Extents of a product. rows: along the vectors. columns: of broadcast elements."""

    batch: int
    vectors: int
    columns: int
    k: int


def product(ctx: CContext, a: Tile, b: Tile, acc: Tile) -> Tile:
    """a [batch, m, k] times b [batch, k, n] plus acc [batch, m, n], whose types add up in f32 or int32; a new array."""
    return Product(ctx, a, b, acc).result()


class Product:
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
        run_m, run_n = _run(a.layout, M), _run(b.layout, N)
        lanes = self.ctx.target.lanes
        if min(run_m, run_n) < lanes and max(run_m, run_n) < lanes:
            if _run(a.layout, 2) >= lanes and _run(b.layout, 1) >= lanes and min(self.a.shape[1], self.b.shape[2]) <= 8:
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

    def _operand(self, leaf: Leaf, dims: Sequence[int]) -> Operand:
        steps = tuple(stride(leaf.layout, d, 1) if leaf.layout.shape[d] > 1 else 0 for d in dims)
        return Operand(leaf.name, leaf.layout.origin, (steps[0], steps[1], steps[2]))

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
        self._blocks(
            shape, self._operand(a, (0, 1, 2)), self._operand(b, (0, 2, 1)), self._operand(target, (0, M, N)), reads
        )
        return self._done(target)

    def _along_columns(self, a: Leaf, b: Leaf) -> Tile:
        batch, m, n = self.acc.shape
        target, reads = self._sums(row_major((batch, m, n)))
        shape = Shape(batch, n, m, self.a.shape[2])
        self._blocks(
            shape, self._operand(b, (0, 2, 1)), self._operand(a, (0, 1, 2)), self._operand(target, (0, N, M)), reads
        )
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
        left, right, out = self._operand(a, (0, 1, 2)), self._operand(b, (0, 2, 1)), self._operand(target, (0, M, N))
        lanes, writer = _divided(self.ctx.target.lanes, k), self.ctx.writer
        rows, columns = _divisor(m, 4), _divisor(n, 4)
        with writer.loops([batch, m // rows, n // columns]) as (at, row, column):
            pairs = [(i, j) for i in range(rows) for j in range(columns)]
            for i, j in pairs:
                writer.line(f"tl_f32x{lanes} p{i}_{j} = {{0}};" if lanes > 1 else f"float p{i}_{j} = 0;")
            step = writer.name("k")
            with writer.block(f"for (int64_t {step} = 0; {step} < {k}; {step} += {lanes})"):
                for name, operand, first, count in (
                    ("x", left, f"{row} * {rows}", rows),
                    ("y", right, f"{column} * {columns}", columns),
                ):
                    for i in range(count):
                        place = operand.at(at, f"{first} + {i}", step)
                        writer.line(f"const tl_f32x{lanes} {name}{i} = tl_load_f32x{lanes}(&{place});")
                for i, j in pairs:
                    writer.line(f"p{i}_{j} += x{i} * y{j};")
            for i, j in pairs:
                place = out.at(at, f"{row} * {rows} + {i}", f"{column} * {columns} + {j}")
                writer.line(f"{place} {'+=' if reads else '='} tl_total_f32x{lanes}(p{i}_{j});")
        return self._done(target)

    # ---- packed codes

    def _by_codes(self, codes: Codes) -> Tile:
        batch, m, n = self.acc.shape
        x = self._operand(self._linear(self.b), (0, 2, 1))
        target, reads = self._sums(row_major((batch, n, m)).permute((0, 2, 1)))
        CodeBlocks(self.ctx, codes, self.a, x, self._operand(target, (0, M, N)), n, reads).emit()
        return self._done(target)

    # ---- integers

    def _integers(self) -> Tile:
        a, b = self._linear(self.a), self._linear(self.b)
        batch, m, n = self.acc.shape
        target, reads = self._sums(row_major((batch, m, n)))
        left, right, out = self._operand(a, (0, 1, 2)), self._operand(b, (0, 1, 2)), self._operand(target, (0, 1, 2))
        writer = self.ctx.writer
        if not reads:
            self.ctx.copy(target, self.acc)
        with writer.loops([batch, m, self.a.shape[2], n]) as (at, i, k, j):
            product_ = f"(int32_t){left.at(at, i, k)} * (int32_t){right.at(at, k, j)}"
            place = out.at(at, i, j)
            writer.line(f"{place} = (int32_t)((uint32_t){place} + (uint32_t)({product_}));")
        return self._done(target)


class Block:
    """Accumulators of `columns` times `vectors` vectors of `lanes`, at some place of the result."""

    def __init__(
        self,
        ctx: CContext,
        lanes: int,
        vectors: int,
        columns: int,
        batch: str,
        first: str,
        column: str,
        target: Operand,
    ) -> None:
        self.writer = ctx.writer
        self.lanes = lanes
        self.places = {
            (i, j): target.at(batch, f"{first} + {i * lanes}", f"{column} + {j}")
            for i in range(vectors) for j in range(columns)
        }  # fmt: skip

    def open(self, reads: bool) -> None:
        kind = f"tl_f32x{self.lanes}"
        zero = "{0}" if self.lanes > 1 else "0"
        for (i, j), place in self.places.items():
            self.writer.line(f"{kind} c{i}_{j} = {f'tl_load_f32x{self.lanes}(&{place})' if reads else zero};")

    def add(self, column: int, element: str, vectors: Sequence[str]) -> None:
        x = self.writer.name("x")
        self.writer.line(f"const float {x} = {element};")
        for i, vector in enumerate(vectors):
            self.writer.line(f"c{i}_{column} += {vector} * {x};")

    def close(self) -> None:
        for (i, j), place in self.places.items():
            self.writer.line(f"tl_store_f32x{self.lanes}(&{place}, c{i}_{j});")


class CodeBlocks:
    """A product whose left operand is unpacked on its way: rows are lanes."""

    def __init__(
        self, ctx: CContext, codes: Codes, a: Tile, x: Operand, target: Operand, columns: int, reads: bool
    ) -> None:
        self.ctx, self.codes, self.a, self.x, self.target = ctx, codes, a, x, target
        self.columns, self.reads = columns, reads
        self.layout = a.leaves[0].layout
        self.lanes = self.lanes_of(ctx, codes, a)

    @staticmethod
    def lanes_of(ctx: CContext, codes: Codes, a: Tile) -> int:
        """Lanes of vectors along the rows; 1 where neighbouring rows' words are not side by side."""
        try:
            threads, slots = split_address(a.leaves[0].layout, codes.slots)
        except LayoutError:
            return 1
        run = _run(threads, M)
        whole_slots = next((t.weight for t in slots.terms[M] if t.stride), a.shape[1])
        lanes = vector_lanes(ctx, codes.words, codes.words.shape[0])
        while lanes > 1 and (run % lanes or whole_slots % lanes or a.shape[1] % lanes):
            lanes //= 2
        return lanes if lanes >= 4 else 1

    def place(self, batch: int, row: int, k: int) -> tuple[int, int]:
        """Thread and slot of an element of a."""
        return divmod(self.layout.offset((batch, row, k)), self.codes.slots)

    def emit(self) -> None:
        batch, m, _ = self.a.shape
        vectors = max(v for v in (4, 2, 1) if (m // self.lanes) % v == 0 and v * self.columns <= _registers(self.ctx))
        writer = self.ctx.writer
        step = 0
        if batch > 1:
            step = self.address(1, 0, 0) - self.address(0, 0, 0)
            if any(self.address(b, 0, 0) != self.address(0, 0, 0) + b * step for b in range(batch)):
                raise LayoutError("the tiles of a batch of packed codes are in no regular order")
        with writer.loops([batch]) as (at,):
            words = writer.name("words")
            writer.line(f"const uint8_t *const {words} = {self.codes.array} + {at} * {step};")
            for first in range(0, m, vectors * self.lanes):
                with writer.block():
                    self.block(words, at, first, vectors)

    def address(self, batch: int, row: int, k: int, word: int | None = None) -> int:
        thread, slot = self.place(batch, row, k)
        return self.codes.words.offset((thread, self.codes.pieces(slot)[0].word if word is None else word))

    def period(self) -> tuple[int, int]:
        """After how many columns the words move on by how many bytes; all columns where they do so irregularly."""
        k = self.a.shape[2]
        period = self.codes.order.chunk
        if k % period or period >= k:
            return k, 0
        step = self.address(0, 0, period) - self.address(0, 0, 0)
        first = self.place(0, 0, 0)[1]
        for at in range(0, k, period):
            moved = self.address(0, 0, at) - self.address(0, 0, 0)
            if self.place(0, 0, at)[1] != first + at or moved * period != at * step or first % period:
                return k, 0
        return period, step

    def block(self, words: str, batch: str, first: int, vectors: int) -> None:
        writer, k = self.ctx.writer, self.a.shape[2]
        tile = Block(self.ctx, self.lanes, vectors, self.columns, batch, str(first), "0", self.target)
        tile.open(self.reads)
        period, step = self.period()
        with writer.loops([k // period]) as (part,):
            loaded: dict[tuple[int, int], str] = {}
            for column in range(period):
                numbers: list[str] = []
                for i in range(vectors):
                    name = writer.name("w")
                    value = self.number(words, part, step, first + i * self.lanes, column, i, loaded)
                    writer.line(f"const tl_f32x{self.lanes} {name} = {value};")
                    numbers.append(name)
                for j in range(self.columns):
                    at = f"{part} * {period} + {column}" if part != "0" else str(column)
                    tile.add(j, self.x.at(batch, str(j), at), numbers)
        tile.close()

    def number(
        self, words: str, part: str, step: int, row: int, column: int, vector: int, loaded: dict[tuple[int, int], str]
    ) -> str:
        """A vector of numbers; words that are not loaded yet are."""
        slot = self.place(0, row, column)[1]

        def word(index: int) -> str:
            if (vector, index) not in loaded:
                name = loaded[vector, index] = self.ctx.writer.name("q")
                first = self.address(0, row, column, index)
                place = f"{words} + {first} + {part} * {step}"
                if self.codes.array in self.ctx.borrowed and first % LINE_NBYTES == 0:
                    self.ctx.writer.line(f"__builtin_prefetch({place} + {PREFETCH_NBYTES});")
                self.ctx.writer.line(f"const tl_u32x{self.lanes} {name} = tl_load_u32x{self.lanes}({place});")
            return loaded[vector, index]

        return vector_number(self.ctx, self.codes, slot, self.lanes, word)


def _run(layout: SharedLayout, dim: int) -> int:
    """How many elements follow each other along a dim."""
    return next((t.size for t in layout.terms[dim] if t.weight == 1 and t.stride == 1), 1)


def _is_same(tile: Tile, dim: int) -> bool:
    return tile.shape[dim] > 1 and all(all(t.stride == 0 for t in leaf.layout.terms[dim]) for leaf in tile.leaves)


def _is_zero(tile: Tile) -> bool:
    text = tile.leaves[0].source.element("0")
    return text in ("0x0.0p+0f", "(int32_t)0ll")


def _registers(ctx: CContext) -> int:
    """Accumulators that registers hold beside operands."""
    return 12 if ctx.target.arch == "x86_64" and ctx.target.lanes < 16 else 24


def _divisor(extent: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if extent % d == 0)


def _divided(lanes: int, extent: int) -> int:
    """The widest vector that the extent is a multiple of; vectors have 4, 8 or 16 lanes."""
    while lanes > 1 and extent % lanes:
        lanes //= 2
    return lanes if lanes >= 4 else 1


def _block_of(ctx: CContext, vectors: int, columns: int) -> tuple[int, int]:
    """Vectors and columns of accumulators that load the fewest operands for each product."""
    most = _registers(ctx)
    ways = [(v, c) for v in range(1, 5) for c in range(1, min(columns, most) + 1) if vectors % v == 0 and v * c <= most]

    def loads(way: tuple[int, int]) -> tuple[float, int]:
        v, c = way
        rest = columns % c
        trips = columns // c + bool(rest)
        return (trips * v + columns) / (v * columns) + (0.05 if rest else 0.0), -v * c

    return min(ways, key=loads)
