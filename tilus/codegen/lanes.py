"""From packed fields to pairs of f16 or bf16: the two steps of a cast plan (see cast_plan) in the lanes of a register."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tilus.dtypes import DataType, float8_e4m3, float8_e5m2
from tilus.ptx.builder import Builder
from tilus.ptx.module import Imm, Operand, Reg, RegClass, Vector
from tilus.target import Target

_T = TypeVar("_T")

# lop3 truth tables of inputs a = 0xF0, b = 0xCC, c = 0xAA (PTX ISA, lop3).
AND_XOR = 0xF0 & 0xCC ^ 0xAA  # (a & b) ^ c
AND_OR = 0xF0 & 0xCC | 0xAA  # (a & b) | c
SELECT = 0xF0 & ~0xAA | 0xCC & 0xAA  # c ? b : a, bit by bit


def two_by_two(items: Sequence[_T]) -> list[tuple[_T, _T]]:
    """Neighbours in pairs; the last item stands in for its missing partner."""
    return [(items[i], items[min(i + 1, len(items) - 1)]) for i in range(0, len(items), 2)]


def twice(half: int) -> int:
    return half << 16 | half


def code_of(dtype: DataType, value: float) -> int:
    return int(dtype.encode(value))


def cvt_name(dtype: DataType) -> str:
    return f"e{dtype.exponent_nbits}m{dtype.mantissa_nbits}"


def lane_chunk(src: DataType) -> int:
    """The number C of slots, a whole number of words, in which slots r and r + C/2 have equal offsets in half-words."""
    if src.nbits > 8 or src in (float8_e4m3, float8_e5m2):  # neighbours: cvt takes adjacent bytes
        return 2
    return 32 // math.gcd(src.nbits, 16)


@dataclass(eq=False)
class LaneCast:
    """One cast in progress. `memo` holds every operation emitted for it, so that equal ones are shared."""

    b: Builder
    target: Target
    src: DataType
    words: tuple[Reg, ...]
    memo: dict[tuple[str, tuple[Operand, ...]], Reg] = field(default_factory=dict[tuple[str, tuple[Operand, ...]], Reg])
    split: dict[Reg, tuple[Reg, Reg]] = field(default_factory=dict[Reg, tuple[Reg, Reg]])

    def op(self, opcode: str, *srcs: Operand | int) -> Reg:
        """The result of a pure operation, emitted here once; ints are immediates."""
        key = (opcode, tuple(Imm(src) if isinstance(src, int) else src for src in srcs))
        if key not in self.memo:
            self.memo[key] = self.b.emit(opcode, *key[1])
        return self.memo[key]

    def shift(self, reg: Reg, left: int) -> Reg:
        if left == 0:
            return reg
        return self.op("shl.b32", reg, left) if left > 0 else self.op("shr.u32", reg, -left)

    def unpack(self, reg: Reg) -> tuple[Reg, Reg]:
        """The low and high half of a word as 16-bit registers."""
        if reg not in self.split:
            low, high = self.b.reg(RegClass.B16), self.b.reg(RegClass.B16)
            self.b.emit_to("mov.b32", Vector((low, high)), reg)
            self.split[reg] = low, high
        return self.split[reg]

    def join(self, low: tuple[Reg, int], high: tuple[Reg, int]) -> Reg:
        """A word of two half-words, each given by a register and 0 (its low half) or 1."""
        if low == (high[0], 0) and high[1] == 1:
            return low[0]
        return self.op("prmt.b32", low[0], high[0], (0x7600 if high[1] else 0x5400) | (0x32 if low[1] else 0x10))

    # Which pairs to convert.

    def in_order(self, dst: DataType, slots: Sequence[int]) -> list[Reg]:
        """Words of two f16 or bf16: each word's pair is brought to lanes and converted."""
        pairs = two_by_two(slots)
        found = self.convert(dst, pairs)
        return [found[pair] for pair in pairs]

    def regrouped(self, dst: DataType, slots: Sequence[int]) -> list[Reg]:
        """The same, but pairs that need no moving are converted, and `prmt` makes the requested ones of the results."""
        return [self.join(low, high) for low, high in two_by_two(self.scattered(dst, slots))]

    def scattered(self, dst: DataType, slots: Sequence[int]) -> list[tuple[Reg, int]]:
        """Where each converted slot is found: a register and the lane in it."""
        pairs = {slot: self.partners(slot) for slot in slots}
        found = self.convert(dst, pairs.values())
        return [(found[pairs[slot]], pairs[slot].index(slot)) for slot in slots]

    def partners(self, slot: int) -> tuple[int, int]:
        chunk = lane_chunk(self.src)
        low = slot // chunk * chunk + slot % chunk % (chunk // 2)
        high = low + chunk // 2
        return (low, high) if (high + 1) * self.src.nbits <= 32 * len(self.words) else (slot, slot)

    def convert(self, dst: DataType, pairs: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Reg]:
        pair = self.float_pair if self.src.is_float else self.integer_pair
        # Ascending positions: a shift made for one field then serves as many later ones as possible.
        return {slots: pair(dst, *slots) for slots in sorted(set(pairs))}

    # Step 1: fields to 16-bit lanes.

    def half_words(self, low: int, high: int) -> Reg:
        """A word of two half-words of the source, given by their indices."""
        return self.join((self.words[low // 2], low % 2), (self.words[high // 2], high % 2))

    def field_to(self, slot: int, bit: int) -> tuple[str, tuple[Operand, ...]] | None:
        """The operation that moves a field to start at `bit`; None when it is already there."""
        word, offset = divmod(slot * self.src.nbits, 32)
        reg = self.words[word]
        if offset + self.src.nbits > 32:
            return "shf.r.wrap.b32", (reg, self.words[word + 1], Imm(offset - bit))
        if offset == bit:
            return None
        return ("shl.b32", (reg, Imm(bit - offset))) if bit > offset else ("shr.u32", (reg, Imm(offset - bit)))

    def lanes(self, first: int, second: int, places: Sequence[int]) -> tuple[Reg, int]:
        """A register with slot `first` in the low and `second` in the high 16-bit lane, and their offset in the lane.

        The other bits are arbitrary. places: offsets to choose from when the fields have to be moved.
        """
        nbits = self.src.nbits
        (half, offset), (other, other_offset) = divmod(first * nbits, 16), divmod(second * nbits, 16)
        if offset == other_offset and offset + nbits <= 16:
            return self.half_words(half, other), offset
        if nbits == 8:
            low, high = first % 4, second % 4 + 4
            sources = self.words[first // 4], self.words[second // 4]
            return self.op("prmt.b32", *sources, high << 12 | high << 8 | low << 4 | low), places[0]

        def missing(place: int) -> int:
            moves = self.field_to(first, place), self.field_to(second, 16 + place)
            return sum(move is not None and move not in self.memo for move in moves)

        place = min(places, key=missing)
        low, high = (self.placed(slot, bit) for slot, bit in ((first, place), (second, 16 + place)))
        return self.op("lop3.b32", low, high, 0xFFFF0000, SELECT), place

    def placed(self, slot: int, bit: int) -> Reg:
        move = self.field_to(slot, bit)
        return self.words[slot * self.src.nbits // 32] if move is None else self.op(move[0], *move[1])

    # Step 2: lanes to f16x2 or bf16x2.

    def has_cvt(self, dtype: DataType) -> bool:
        return dtype in (float8_e4m3, float8_e5m2) and self.target.sm >= 89

    def scale_add(self, dst: DataType, x: Reg, scale: float, addend: float | Reg = -0.0) -> Reg:
        """x * scale + addend in both lanes. bf16x2 has no mul and add before sm_90, and fma costs the same."""
        factor = self.b.const(twice(code_of(dst, scale)))
        last = addend if isinstance(addend, Reg) else self.b.const(twice(code_of(dst, addend)))
        return self.op(f"fma.rn.{dst.name}x2", x, factor, last)

    def integer_pair(self, dst: DataType, first: int, second: int) -> Reg:
        nbits, room = self.src.nbits, dst.mantissa_nbits
        split_top = nbits > room
        reg, offset = self.lanes(first, second, range(max(room - nbits, 0) + 1))
        if offset + nbits > room:
            low = offset if split_top else offset + nbits - room
            made = (k for k in range(low, offset) if ("shr.u32", (reg, Imm(k))) in self.memo)
            by = next(made, offset)
            reg, offset = self.shift(reg, -by), offset - by
        magic = code_of(dst, 2.0**room)
        if split_top:
            return self.split_integer_pair(dst, reg, magic)
        bias = 1 << (nbits - 1) if self.src.is_signed else 0
        mask = ((1 << nbits) - 1) << offset
        x = self.op("lop3.b32", reg, twice(mask), twice(magic ^ bias << offset), AND_XOR)
        return self.scale_add(dst, x, 2.0**-offset, -(2.0 ** (room - offset) + bias))

    def split_integer_pair(self, dst: DataType, reg: Reg, magic: int) -> Reg:
        """Integers with one bit more than the mantissa has (8 bits to bf16); the fields are at offset 0.

        With m = 2^(n-1): `rest` is m + (v mod m), and the top bit is the last exponent bit of `top`, m or 2m.
        """
        m = 1 << (self.src.nbits - 1)
        rest = self.op("lop3.b32", reg, twice(m - 1), twice(magic), AND_XOR)
        top = self.op("lop3.b32", reg, twice(m), twice(magic), AND_XOR)
        if self.src.is_signed:
            return self.scale_add(dst, top, -1.0, rest)
        return self.scale_add(dst, top, 1.0, self.scale_add(dst, rest, 1.0, -2.0 * m))

    def float_pair(self, dst: DataType, first: int, second: int) -> Reg:
        src = self.src
        if self.has_cvt(src):
            return self.op(f"cvt.rn.f16x2.{cvt_name(src)}x2", self.adjacent_bytes(first, second))
        low = dst.mantissa_nbits - src.mantissa_nbits  # where the magnitude has to start
        reg, offset = self.lanes(first, second, (16 - src.nbits, low))
        magnitude = self.shift(reg, low - offset)
        mask = ((1 << (src.nbits - 1)) - 1) << low
        if src.exponent_nbits == dst.exponent_nbits:
            return self.op("and.b32", magnitude, twice(0x8000 | mask))
        sign = self.shift(reg, 16 - src.nbits - offset)
        x = self.op("lop3.b32", sign, twice(0x8000), self.op("and.b32", magnitude, twice(mask)), AND_OR)
        x = self.scale_add(dst, x, 2.0 ** (dst.bias - src.bias))
        return self.with_nan(dst, x) if src.specials == "nan" else x

    def with_nan(self, dst: DataType, x: Reg) -> Reg:
        """NaN for the value next above the source's largest finite one: it alone overflows, and inf * 0 is NaN."""
        beyond = self.src.max_value + 2.0 ** (math.frexp(self.src.max_value)[1] - 1 - self.src.mantissa_nbits)
        factor = float(dst.decode(dst.encode(dst.max_value / beyond) + dst.storage.type(1)))
        return self.scale_add(dst, self.scale_add(dst, x, factor), 0.0, x)

    def adjacent_bytes(self, first: int, second: int) -> Reg:
        """A 16-bit register with two bytes of the source."""
        if first % 2 == 0 and second == first + 1:
            return self.unpack(self.words[first // 4])[first // 2 % 2]
        sources = self.words[first // 4], self.words[second // 4]
        return self.unpack(self.op("prmt.b32", *sources, (second % 4 + 4) << 4 | first % 4))[0]
