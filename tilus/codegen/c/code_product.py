"""Products whose left operand is packed codes, which become numbers on their way: rows are lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilus.codegen.c.blocks import Block, M, Operand, registers, run_length
from tilus.codegen.c.codes import Codes, split_address, vector_lanes, vector_number
from tilus.codegen.c.tile import Tile
from tilus.layout import LayoutError

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext

LINE_NBYTES = 64  # of a cache
# How far ahead codes are asked for: of 1 to 6 KiB this gave the most bytes a second for codes of 4 and 8 bits, up to 1.7 times
# what the processor's own prefetching gives. What is asked for behind the end of an array is never read.
PREFETCH_NBYTES = 2048


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
        run = run_length(threads, M)
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
        # One vector a column may be more than the registers hold: some then go through memory, for which codes are unpacked once.
        most = max(self.columns, registers(self.ctx))
        vectors = max(v for v in (4, 2, 1) if (m // self.lanes) % v == 0 and v * self.columns <= most)
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
            shared: dict[tuple[int, tuple[int, int]], str] = {}
            for column in range(period):
                numbers: list[str] = []
                for i in range(vectors):
                    name = writer.name("w")
                    value = self.number(words, part, step, first + i * self.lanes, column, i, loaded, shared)
                    writer.line(f"const tl_f32x{self.lanes} {name} = {value};")
                    numbers.append(name)
                for j in range(self.columns):
                    at = f"{part} * {period} + {column}" if part != "0" else str(column)
                    tile.add(j, self.x.at(batch, str(j), at), numbers)
        tile.close()

    def number(
        self, words: str, part: str, step: int, row: int, column: int, vector: int, loaded: dict[tuple[int, int], str],
        shared: dict[tuple[int, tuple[int, int]], str],
    ) -> str:  # fmt: skip
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

        def keep(key: tuple[int, int], text: str) -> str:
            if (vector, key) not in shared:
                name = shared[vector, key] = self.ctx.writer.name("p")
                self.ctx.writer.line(f"const tl_u32x{self.lanes} {name} = {text};")
            return shared[vector, key]

        return vector_number(self.ctx, self.codes, slot, self.lanes, word, keep)
