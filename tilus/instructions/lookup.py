"""Codes of 4 bits as entries of a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tilus.codegen.c.codes import Codes, table_of_32
from tilus.codegen.c.context import CContext
from tilus.codegen.c.tile import joined, plain
from tilus.codegen.context import EmitContext
from tilus.dtypes import bf16, f16, uint4
from tilus.errors import TilusError
from tilus.instructions.elementwise import Pointwise
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.layout_rules import Elementwise, LayoutRule, Way
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout, local, replicated
from tilus.ptx.builder import Builder
from tilus.ptx.module import Imm, Reg

ENTRIES = 16
# prmt selectors (PTX ISA, prmt): the low, or the high bytes of two words of halves; low and high bytes back to halves.
LOW_BYTES, HIGH_BYTES = 0x6420, 0x7531
FIRST_HALVES, LAST_HALVES = 0x5140, 0x7362
AND_OR = 0xF0 & 0xCC | 0xAA  # lop3: (a & b) | c


@dataclass(frozen=True, eq=False)
class WithTable(Elementwise):
    """Elementwise in the codes; every thread holds the whole table."""

    table: RegisterTensor

    def _way(self, layout: RegisterLayout) -> Way:
        return {**super()._way(layout), self.table: _everywhere(self.num_threads)}


@dataclass(frozen=True, eq=False)
class Lookup(Pointwise):
    """`out = table[codes]` for codes of uint4 and a table [16] of f16 or bf16 that every thread holds.

    The table's low and high bytes are 16 bytes each. `prmt` picks four of eight bytes by the low three bits of four codes; the
    fourth bits then pick, by `prmt` again, from what the two halves of the table gave.
    """

    mnemonic = "lookup"

    out: RegisterTensor
    codes: RegisterTensor
    table: RegisterTensor

    def verify(self) -> None:
        if self.codes.dtype != uint4:
            raise TilusError(f"lookup of codes of {self.codes.dtype.name}, expected uint4")
        if self.table.shape != (ENTRIES,) or self.table.dtype not in (f16, bf16):
            raise TilusError(
                f"lookup in a table of {self.table.dtype.name}{list(self.table.shape)}, expected f16 or bf16 [{ENTRIES}]",
                hint="cast the table first: tilus.cast(table, tilus.f16)",
            )
        if self.out.shape != self.codes.shape or self.out.dtype != self.table.dtype:
            raise TilusError(
                f"lookup: the result is {self.out.dtype.name}{list(self.out.shape)}, expected "
                f"{self.table.dtype.name}{list(self.codes.shape)}"
            )

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return WithTable(self.out, (self.codes,), num_threads, self.table)

    def evaluate(self, env: Evaluation) -> None:
        table, codes = env.tile(self.table), env.tile(self.codes)
        lead = np.broadcast_shapes(table.shape[:3], codes.shape[:3])
        flat = np.broadcast_to(codes, (*lead, *self.codes.shape)).reshape(*lead, -1)
        found = np.take_along_axis(np.broadcast_to(table, (*lead, ENTRIES)), flat.astype(np.intp), -1)
        env.set_tile(self.out, found.reshape(*lead, *self.out.shape))

    def emit(self, ctx: EmitContext) -> None:
        layout = ctx.layout(self.out)
        words = ctx.aligned_words(self.codes, layout)
        planes = _Planes(ctx.b, ctx.aligned_words(self.table, _everywhere(ctx.num_threads)))
        halves = -(-layout.num_locals // 2)
        found = [half for word in words for half in planes.lookup(word)]
        ctx.define(self.out, found[:halves])

    def emit_c(self, ctx: CContext) -> None:
        """Packed codes stay packed: the product that reads them looks them up."""
        table = table_of_32(ctx, ctx.read_array(self.table))
        codes = ctx.read(self.codes)
        if codes.is_plain and isinstance(codes.leaves[0].source, Codes):
            source = replace(codes.leaves[0].source, dtype=self.out.dtype, table=table)
            ctx.define(self.out, plain(self.out.dtype, self.out.shape, source, codes.leaves[0].layout))
        else:
            ctx.define(self.out, joined(self.out.dtype, self.out.shape, [codes], lambda e: f"{table}[{e[0]}]"))


def _everywhere(num_threads: int) -> RegisterLayout:
    return replicated(num_threads, 1) * local(ENTRIES)


class _Planes:
    """A table of 16-bit entries as low and high bytes, four registers each; made once, outside of loops."""

    def __init__(self, b: Builder, table: list[Reg]) -> None:
        self.b = b
        pairs = list(zip(table[::2], table[1::2], strict=True))
        self.planes = [[b.pure("prmt.b32", x, y, Imm(how)) for x, y in pairs] for how in (LOW_BYTES, HIGH_BYTES)]

    def lookup(self, word: Reg) -> list[Reg]:
        """The entries of a word's eight codes, two in each register."""
        b = self.b
        within = b.emit("and.b32", word, Imm(0x77777777))
        # Nibble i is i where code i is in the first half of the table, and i + 4 where it is in the second.
        half = b.emit("lop3.b32", b.emit("shr.u32", word, Imm(1)), Imm(0x44444444), Imm(0x32103210), Imm(AND_OR))
        result: list[Reg] = []
        for low in (True, False):
            index = within if low else b.emit("shr.u32", within, Imm(16))
            choice = half if low else b.emit("shr.u32", half, Imm(16))
            bytes_ = [self._bytes(plane, index, choice) for plane in self.planes]
            result += [b.emit("prmt.b32", *bytes_, Imm(how)) for how in (FIRST_HALVES, LAST_HALVES)]
        return result

    def _bytes(self, plane: list[Reg], index: Reg, choice: Reg) -> Reg:
        first = self.b.emit("prmt.b32", plane[0], plane[1], index)
        return self.b.emit("prmt.b32", first, self.b.emit("prmt.b32", plane[2], plane[3], index), choice)


@builtin
def lookup(b: IRBuilder, table: RegisterTensor, codes: RegisterTensor) -> RegisterTensor:
    """`table[codes]`: codes are a tile of uint4, the table one of f16 or bf16 with 16 entries. About 2.6 instructions a code."""
    return b.emit(Lookup(b.tile(table.dtype, codes.shape), codes, table)).out
