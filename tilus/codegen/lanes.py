"""From packed fields to pairs of f16 or bf16 in the lanes of a register: the choices of `fields`, as instructions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tilus.codegen.code_order import CodeOrder
from tilus.codegen.fields import Choice, Source, arrange, choices, choose
from tilus.codegen.images import Image, images
from tilus.dtypes import DataType, float8_e4m3, float8_e5m2
from tilus.ptx.builder import Builder
from tilus.ptx.module import Imm, Operand, Reg, RegClass, Vector
from tilus.target import Target

_T = TypeVar("_T")
Pair = tuple[int, int]

# lop3 truth tables of inputs a = 0xF0, b = 0xCC, c = 0xAA (PTX ISA, lop3).
AND_XOR = 0xF0 & 0xCC ^ 0xAA  # (a & b) ^ c
AND_OR = 0xF0 & 0xCC | 0xAA  # (a & b) | c
SELECT = 0xF0 & ~0xAA | 0xCC & 0xAA  # c ? b : a, bit by bit


def two_by_two(items: Sequence[_T]) -> list[tuple[_T, _T]]:
    """Neighbours in pairs; the last item stands in for its missing partner."""
    return [(items[i], items[min(i + 1, len(items) - 1)]) for i in range(0, len(items), 2)]


def code_of(dtype: DataType, value: float) -> int:
    return int(dtype.encode(value))


def cvt_name(dtype: DataType) -> str:
    return f"e{dtype.exponent_nbits}m{dtype.mantissa_nbits}"


@dataclass(eq=False)
class Words:
    """Operations on a string of words, in progress. `memo` holds every one emitted, so that equal ones are shared."""

    b: Builder
    words: tuple[Reg, ...]
    memo: dict[tuple[str, tuple[Operand, ...]], Reg] = field(default_factory=dict[tuple[str, tuple[Operand, ...]], Reg])
    split: dict[Reg, tuple[Reg, Reg]] = field(default_factory=dict[Reg, tuple[Reg, Reg]])

    def op(self, opcode: str, *srcs: Operand | int) -> Reg:
        """The result of a pure operation, emitted here once; ints are immediates."""
        key = (opcode, tuple(Imm(src) if isinstance(src, int) else src for src in srcs))
        if key not in self.memo:
            self.memo[key] = self.b.emit(opcode, *key[1])
        return self.memo[key]

    def shift(self, reg: Reg, right: int) -> Reg:
        if right == 0:
            return reg
        return self.op("shr.u32", reg, right) if right > 0 else self.op("shl.b32", reg, -right)

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

    def source(self, source: Source, mask: int) -> Reg:
        """A register with the source's bits under a mask; the others are arbitrary."""
        if source.high is not None:
            halves = [(self.words[half // 2], half % 2) for half in (source.low, source.high)]
            return self.shift(self.join(halves[0], halves[1]), source.shift)
        first, last = ((source.low + bit) // 32 for bit in ((mask & -mask).bit_length() - 1, mask.bit_length() - 1))
        if first == last:
            return self.shift(self.words[first], source.low - 32 * first)
        return self.op("shf.r.wrap.b32", self.words[first], self.words[last], source.low - 32 * first)

    def merge(self, pieces: Sequence[tuple[Reg, int]], pattern: int) -> Reg:
        """The masked pieces and the pattern, by one `lop3` a piece."""
        x: Reg | None = None
        for reg, mask in pieces:
            if x is None and pattern == 0:
                x = self.op("and.b32", reg, mask)
            else:
                x = self.op("lop3.b32", reg, mask, pattern if x is None else x, AND_XOR)
        if x is None:
            raise ValueError("a code without bits")
        return x

    def put_together(self, pieces: Sequence[tuple[Reg, int]]) -> Reg:
        """The masked pieces among arbitrary bits."""
        (x, _), *rest = pieces
        for reg, mask in rest:
            x = self.op("lop3.b32", x, reg, mask, SELECT)
        return x


def emit_permutation(b: Builder, words: Sequence[Reg], bits: tuple[int, ...]) -> list[Reg]:
    """Words whose bit i is bit `bits[i]` of the given ones, in every chunk of len(bits) bits."""
    if bits == tuple(range(len(bits))):
        return list(words)
    result: list[Reg] = []
    for first in range(0, len(words), len(bits) // 32):
        chunk = Words(b, tuple(words[first : first + len(bits) // 32]))
        pieces = [dict[Source, int]() for _ in chunk.words]
        for position, bit in enumerate(bits):
            of_word, source = pieces[position // 32], Source(bit - position % 32)
            of_word[source] = of_word.get(source, 0) | 1 << position % 32
        result += [chunk.merge([(chunk.source(s, mask), mask) for s, mask in of_word.items()], 0) for of_word in pieces]
    return result


@dataclass(eq=False)
class LaneCast(Words):
    """A cast of codes to 16-bit floats, in progress. order: where the bits of a slot's code are in the string of words."""

    target: Target = field(kw_only=True)
    order: CodeOrder = field(kw_only=True)

    @property
    def src(self) -> DataType:
        return self.order.dtype

    # Which pairs to convert.

    def in_order(self, dst: DataType, slots: Sequence[int], scaled: bool = False) -> list[Reg]:
        """Words of two f16 or bf16: each word's pair is brought to lanes and converted."""
        pairs = two_by_two(slots)
        found = self.convert(dst, pairs, scaled)
        return [found[pair] for pair in pairs]

    def regrouped(self, dst: DataType, slots: Sequence[int], scaled: bool = False) -> list[Reg]:
        """The same, but pairs that lie alike are converted, and `prmt` makes the requested ones of the results."""
        return [self.join(low, high) for low, high in two_by_two(self.scattered(dst, slots, scaled))]

    def scattered(self, dst: DataType, slots: Sequence[int], scaled: bool = False) -> list[tuple[Reg, int]]:
        """Where each converted slot is found: a register and the lane in it."""
        pairs = {slot: self.partner(slot) for slot in slots}
        found = self.convert(dst, pairs.values(), scaled)
        return [(found[pairs[slot]], pairs[slot].index(slot)) for slot in slots]

    def partner(self, slot: int) -> Pair:
        """Two slots, this one among them, whose bits lie alike, in the order of lanes; twice the slot if it has no other."""
        if self.has_cvt(self.src):
            pair = slot // 2 * 2, slot // 2 * 2 + 1
        else:
            pair = self.order.partner(slot)
        inside = all(self.order.place(pair[1], bit) < 32 * len(self.words) for bit in range(self.src.nbits))
        return pair if inside else (slot, slot)

    def convert(self, dst: DataType, pairs: Iterable[Pair], scaled: bool) -> dict[Pair, Reg]:
        unique = sorted(set(pairs))
        if self.has_cvt(self.src):
            opcode = f"cvt.rn.f16x2.{cvt_name(self.src)}x2"
            return {pair: self.op(opcode, self.adjacent_bytes(*pair)) for pair in unique}
        found = images(self.src, dst, scaled)
        chosen = choose([choices(self.order.place, pair, found) for pair in unique])
        lanes = self.gather(chosen)
        return {pair: self.number(dst, way.image, reg) for pair, way, reg in zip(unique, chosen, lanes, strict=True)}

    # Fields to lanes.

    def gather(self, chosen: Sequence[Choice]) -> list[Reg]:
        """For each choice a register with the codes in the lanes of their image, its pattern applied."""
        together = arrange(chosen)
        uses: dict[Source, int] = {}
        for family in together:
            for source, mask in family.pieces.items():
                uses[source] = uses.get(source, 0) | mask
        result: dict[int, Reg] = {}
        for family in together:
            sources = [(self.source(source, uses[source]), mask) for source, mask in family.pieces.items()]
            pattern = _twice(family.first.image.pattern)
            if len(family.members) == 1:
                result[family.members[0]] = self.merge(sources, pattern)
                continue
            whole = self.put_together(sources)
            for member, offset in zip(family.members, family.offsets, strict=True):
                result[member] = self.merge([(self.shift(whole, offset), family.first.mask)], pattern)
        return [result[index] for index in range(len(chosen))]

    # Lanes to f16x2 or bf16x2.

    def has_cvt(self, dtype: DataType) -> bool:
        return dtype in (float8_e4m3, float8_e5m2) and self.target.sm >= 89

    def number(self, dst: DataType, image: Image, x: Reg) -> Reg:
        for index, factor in enumerate(image.factors):
            last = index == len(image.factors) - 1
            x = self.scale_add(dst, x, factor, image.addend if last and image.addend else -0.0)
        return x if image.keeps_nan else self.with_nan(dst, x)

    def scale_add(self, dst: DataType, x: Reg, scale: float, addend: float | Reg = -0.0) -> Reg:
        """x * scale + addend in both lanes. bf16x2 has no mul and add before sm_90, and fma costs the same."""
        factor = self.b.const(_twice(code_of(dst, scale)))
        last = addend if isinstance(addend, Reg) else self.b.const(_twice(code_of(dst, addend)))
        return self.op(f"fma.rn.{dst.name}x2", x, factor, last)

    def with_nan(self, dst: DataType, x: Reg) -> Reg:
        """NaN for the value next above the source's largest finite one: it alone overflows, and inf * 0 is NaN."""
        beyond = self.src.max_value + 2.0 ** (math.frexp(self.src.max_value)[1] - 1 - self.src.mantissa_nbits)
        factor = float(dst.decode(dst.encode(dst.max_value / beyond) + dst.storage.type(1)))
        return self.scale_add(dst, self.scale_add(dst, x, factor), 0.0, x)

    def adjacent_bytes(self, first: int, second: int) -> Reg:
        """A 16-bit register with two bytes of the source."""
        low, high = self.order.place(first, 0) // 8, self.order.place(second, 0) // 8
        if low % 2 == 0 and high == low + 1:
            return self.unpack(self.words[low // 4])[low // 2 % 2]
        sources = self.words[low // 4], self.words[high // 4]
        return self.unpack(self.op("prmt.b32", *sources, (high % 4 + 4) << 4 | low % 4))[0]


def _twice(half: int) -> int:
    return half << 16 | half
