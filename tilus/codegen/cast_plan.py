"""Casts between the element types of register tiles, planned from (bits, exponent, mantissa) of both types.

A tile holds a thread's elements ("slots") as one little-endian bit string in consecutive 32-bit registers ("words"):
slot i of an n-bit type has bits [i * n, (i + 1) * n). A cast to f16 or bf16 converts two results at a time, one in each
16-bit lane of a register:

1. *Fields to lanes.* Fields whose positions are equal modulo 16 and that cross no 16-bit boundary are in place already:
   a word holds both half-words, or one `prmt` merges them from two words. Any other pair takes one shift (a funnel
   shift across words) for each lane, and a select.
2. *Lanes to numbers.* An integer field becomes the low mantissa bits of a float whose last place is worth 1 (`lop3`),
   and one `fma` takes the offset and the shift off again, exactly. A float field has its sign and magnitude moved into
   place (shifts, `lop3`) and is multiplied by the power of two between the biases: exact, and subnormals become normal.

Every operation is emitted once per cast (a shift or merge that serves several pairs is shared), so the cost depends on
the order of slots; `preferred_slots` gives the order in which step 1 is free. Other casts go through f32 or int32.

Step 2 for 4-bit integers is the method of Kim et al., "Who Says Elephants Can't Run" (2022), which Marlin uses; for
6-bit floats that of Xia et al., "FP6-LLM" (2024). Instructions: PTX ISA, sections of lop3, prmt, shf, bfe, fma and cvt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tilus.dtypes import DataType, bf16, f16, f32, float8_e4m3, float8_e5m2, int32, uint32
from tilus.errors import TilusError
from tilus.ptx.builder import Builder
from tilus.ptx.module import FloatImm, Imm, Instr, Operand, Reg, RegClass, Vector
from tilus.target import Target

_T = TypeVar("_T")

# lop3 truth tables of inputs a = 0xF0, b = 0xCC, c = 0xAA (PTX ISA, lop3).
_AND_XOR = 0xF0 & 0xCC ^ 0xAA  # (a & b) ^ c
_AND_OR = 0xF0 & 0xCC | 0xAA  # (a & b) | c
_SELECT = 0xF0 & ~0xAA | 0xCC & 0xAA  # c ? b : a, bit by bit


def emit_cast(
    b: Builder, target: Target, src: DataType, dst: DataType, words: Sequence[Reg], slots: Sequence[int]
) -> list[Reg]:
    """Emit a cast; result slot i is the cast of source slot `slots[i]`, as `dst.encode(src.decode(code))`.

    words: the source registers, which are never written. Returns: ceil(len(slots) * dst.nbits / 32) registers (the
    source registers themselves when nothing changes); bits past the last slot are unspecified.
    Raises: TilusError for types without a register cast (booleans, 64-bit types).
    """
    for dtype in (src, dst):
        if dtype.kind == "bool" or dtype.nbits > 32:
            raise TilusError(
                f"cast from {src} to {dst}: found {dtype}, expected integers and floats of at most 32 bits",
                hint="booleans are predicates (use where), and 64-bit values are scalars",
            )
    if slots and (max(slots) + 1) * src.nbits > 32 * len(words):
        raise ValueError(f"slot {max(slots)} of {src} lies outside of {len(words)} words")
    if src == dst and list(slots) == list(range(len(slots))):
        return list(words[: -(-len(slots) * src.nbits // 32)])
    cast = _Cast(b, target, src, tuple(words))
    if src == dst:
        return cast.reorder(slots)
    if dst in (f16, bf16):
        return cast.halves(dst, slots)
    if dst == f32:
        return cast.singles(slots)
    if dst.is_float:
        return cast.small_floats(dst, slots)
    return cast.pack(cast.integers(dst, slots), dst)


def preferred_chunk(src: DataType, count: int) -> int:
    """The chunk size C of `preferred_slots`; C = 2 is the identity order.

    Source slots r and r + C/2 of a chunk are the smallest multiple of 16 bits apart that both types of slot allow, so
    their fields have equal offsets in their half-words; a chunk is a whole number of words.
    """
    if src.nbits > 8 or src in (float8_e4m3, float8_e5m2):  # neighbours: cvt takes adjacent bytes
        return 2
    chunk = 32 // math.gcd(src.nbits, 16)
    return chunk if count % chunk == 0 else 2


def preferred_slots(src: DataType, count: int) -> tuple[int, ...]:
    """The order of slots in which casts from `src` to f16 and bf16 are cheapest.

    With C = `preferred_chunk(src, count)`, result slot 2 * r + h of each chunk of C comes from its source slot
    h * (C / 2) + r: as layout digits, (2, C/2) transposed. Identity when C does not divide `count`.
    """
    chunk = preferred_chunk(src, count)
    if count % chunk:
        return tuple(range(count))
    return tuple(
        base + h * (chunk // 2) + r for base in range(0, count, chunk) for r in range(chunk // 2) for h in (0, 1)
    )


def plan_cost(src: DataType, dst: DataType, target: Target, count: int, slots: Sequence[int]) -> float:
    """PTX instructions per value of a cast of `count` source slots, without `mov` (constants, register pairs)."""
    b = Builder()
    words = [b.reg(RegClass.B32) for _ in range(-(-count * src.nbits // 32))]
    emit_cast(b, target, src, dst, words, slots)
    emitted = [item for item in b.finish() if isinstance(item, Instr) and not item.opcode.startswith("mov")]
    return len(emitted) / len(slots)


def _pairs(items: Sequence[_T]) -> list[tuple[_T, _T]]:
    """Neighbours two by two; the last item stands in for its missing partner."""
    return [(items[i], items[min(i + 1, len(items) - 1)]) for i in range(0, len(items), 2)]


def _twice(half: int) -> int:
    return half << 16 | half


def _code(dtype: DataType, value: float) -> int:
    return int(dtype.encode(value))


def _single(value: float) -> FloatImm:
    return FloatImm(_code(f32, value))


@dataclass(eq=False)
class _Cast:
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

    # Step 1: fields to 16-bit lanes.

    def merge(self, low: int, high: int) -> Reg:
        """A word of two half-words of the source, given by their indices."""
        if low % 2 == 0 and high == low + 1:
            return self.words[low // 2]
        selector = (0x7600 if high % 2 else 0x5400) | (0x32 if low % 2 else 0x10)
        return self.op("prmt.b32", self.words[low // 2], self.words[high // 2], selector)

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
            return self.merge(half, other), offset
        if nbits == 8:
            low, high = first % 4, second % 4 + 4
            sources = self.words[first // 4], self.words[second // 4]
            return self.op("prmt.b32", *sources, high << 12 | high << 8 | low << 4 | low), places[0]

        def missing(place: int) -> int:
            moves = self.field_to(first, place), self.field_to(second, 16 + place)
            return sum(move is not None and move not in self.memo for move in moves)

        place = min(places, key=missing)
        low, high = (self.placed(slot, bit) for slot, bit in ((first, place), (second, 16 + place)))
        return self.op("lop3.b32", low, high, 0xFFFF0000, _SELECT), place

    def placed(self, slot: int, bit: int) -> Reg:
        move = self.field_to(slot, bit)
        return self.words[slot * self.src.nbits // 32] if move is None else self.op(move[0], *move[1])

    def reorder(self, slots: Sequence[int]) -> list[Reg]:
        """The same codes in another order."""
        if self.src.nbits == 32:
            return [self.words[slot] for slot in slots]
        if self.src.nbits == 16:
            return [self.merge(*pair) for pair in _pairs(slots)]
        return self.pack([self.integer(slot, "u32") for slot in slots], self.src)

    # Step 2: lanes to f16x2 or bf16x2.

    def halves(self, dst: DataType, slots: Sequence[int]) -> list[Reg]:
        """Words of two f16 or bf16 each."""
        pairs = _pairs(slots)
        through_f16 = dst == bf16 and (self.src.exponent_nbits == 5 or self.has_cvt(self.src))
        if not self.src.is_small or through_f16:
            values = self.singles(slots, exact_sticky=dst == bf16)
            return [self.op(f"cvt.rn.{dst.name}x2.f32", high, low) for low, high in _pairs(values)]
        convert = self.float_pair if self.src.is_float else self.integer_pair
        # Ascending positions: a shift made for one field then serves as many later ones as possible.
        results = {pair: convert(dst, *pair) for pair in sorted(set(pairs))}
        return [results[pair] for pair in pairs]

    def has_cvt(self, dtype: DataType) -> bool:
        return dtype in (float8_e4m3, float8_e5m2) and self.target.sm >= 89

    def scale_add(self, dst: DataType, x: Reg, scale: float, addend: float | Reg = -0.0) -> Reg:
        """x * scale + addend in both lanes. bf16x2 has no mul and add before sm_90, and fma costs the same."""
        factor = self.b.const(_twice(_code(dst, scale)))
        last = addend if isinstance(addend, Reg) else self.b.const(_twice(_code(dst, addend)))
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
        magic = _code(dst, 2.0**room)
        if split_top:
            return self.split_integer_pair(dst, reg, magic)
        bias = 1 << (nbits - 1) if self.src.is_signed else 0
        mask = ((1 << nbits) - 1) << offset
        x = self.op("lop3.b32", reg, _twice(mask), _twice(magic ^ bias << offset), _AND_XOR)
        return self.scale_add(dst, x, 2.0**-offset, -(2.0 ** (room - offset) + bias))

    def split_integer_pair(self, dst: DataType, reg: Reg, magic: int) -> Reg:
        """Integers with one bit more than the mantissa has (8 bits to bf16); the fields are at offset 0.

        With m = 2^(n-1): `rest` is m + (v mod m), and the top bit is the last exponent bit of `top`, m or 2m.
        """
        m = 1 << (self.src.nbits - 1)
        rest = self.op("lop3.b32", reg, _twice(m - 1), _twice(magic), _AND_XOR)
        top = self.op("lop3.b32", reg, _twice(m), _twice(magic), _AND_XOR)
        if self.src.is_signed:
            return self.scale_add(dst, top, -1.0, rest)
        return self.scale_add(dst, top, 1.0, self.scale_add(dst, rest, 1.0, -2.0 * m))

    def float_pair(self, dst: DataType, first: int, second: int) -> Reg:
        src = self.src
        if self.has_cvt(src):
            return self.op(f"cvt.rn.f16x2.{_cvt_name(src)}x2", self.adjacent_bytes(first, second))
        low = dst.mantissa_nbits - src.mantissa_nbits  # where the magnitude has to start
        reg, offset = self.lanes(first, second, (16 - src.nbits, low))
        magnitude = self.shift(reg, low - offset)
        mask = ((1 << (src.nbits - 1)) - 1) << low
        if src.exponent_nbits == dst.exponent_nbits:
            return self.op("and.b32", magnitude, _twice(0x8000 | mask))
        sign = self.shift(reg, 16 - src.nbits - offset)
        x = self.op("lop3.b32", sign, _twice(0x8000), self.op("and.b32", magnitude, _twice(mask)), _AND_OR)
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

    # Through f32 and int32.

    def singles(self, slots: Sequence[int], *, exact_sticky: bool = False) -> list[Reg]:
        """The values as f32. exact_sticky: 32-bit integers are rounded to odd, so that a later rounding is the only one
        that counts (Boldo and Melquiond, 2005)."""
        if self.src == f32:
            return self.reorder(slots)
        if self.src == bf16:
            moves = (("shl.b32", 16), ("and.b32", 0xFFFF0000))
            return [self.op(moves[slot % 2][0], self.words[slot // 2], moves[slot % 2][1]) for slot in slots]
        if self.src.is_small or self.src == f16:
            pairs = self.reorder(slots) if self.src == f16 else self.halves(f16, slots)
            return [self.op("cvt.f32.f16", self.unpack(pairs[i // 2])[i % 2]) for i in range(len(slots))]
        suffix = _suffix(self.src)
        integers = [self.integer(slot, suffix) for slot in slots]
        if exact_sticky and self.src.nbits == 32:
            return [self.odd(value, suffix) for value in integers]
        return [self.op(f"cvt.rn.f32.{suffix}", value) for value in integers]

    def odd(self, value: Reg, suffix: str) -> Reg:
        cut = self.op(f"cvt.rz.f32.{suffix}", value)
        inexact = self.op(f"setp.ne.{suffix}", self.op(f"cvt.rzi.{suffix}.f32", cut), value)
        return self.op("or.b32", cut, self.op("selp.b32", 1, 0, inexact))

    def integer(self, slot: int, suffix: str) -> Reg:
        """One field of the source, sign- or zero-extended to 32 bits."""
        nbits = self.src.nbits
        word, offset = divmod(slot * nbits, 32)
        if nbits == 32:
            return self.words[word]
        if offset + nbits > 32:
            return self.op(f"bfe.{suffix}", self.placed(slot, 0), 0, nbits)
        return self.op(f"bfe.{suffix}", self.words[word], offset, nbits)

    def integers(self, dst: DataType, slots: Sequence[int]) -> list[Reg]:
        """The values as 32-bit integers, rounded to nearest even and clamped to the range of `dst`."""
        if self.src.is_integer:
            source = self.src
            values = [self.integer(slot, _suffix(source)) for slot in slots]
        else:
            source = uint32 if dst == uint32 else int32
            values = [self.op(f"cvt.rni.{_suffix(source)}.f32", x) for x in self.singles(slots)]
        suffix = _suffix(source)
        if source.min_value < dst.min_value:
            values = [self.op(f"max.{suffix}", x, int(dst.min_value)) for x in values]
        if source.max_value > dst.max_value:
            values = [self.op(f"min.{suffix}", x, int(dst.max_value)) for x in values]
        if dst.is_signed and dst.nbits < 16:
            values = [self.op("and.b32", x, (1 << dst.nbits) - 1) for x in values]
        return values

    def small_floats(self, dst: DataType, slots: Sequence[int]) -> list[Reg]:
        values = self.singles(slots)
        if not self.has_cvt(dst):
            return self.pack([self.encode(dst, x) for x in values], dst)
        opcode = f"cvt.rn.satfinite.{_cvt_name(dst)}x2.f32"
        halves = [self.op(opcode, high, low) for low, high in _pairs(values)]
        return [self.op("mov.b32", Vector(pair)) for pair in _pairs(halves)]

    def encode(self, dst: DataType, x: Reg) -> Reg:
        """The code of an f32 in a small float type.

        With E the exponent of |x| (at least that of subnormals), |x| + 2^(E + 23 - m) rounds |x| to a multiple k of
        2^(E - m), and the code is (E - E_min) * 2^m + k: the carry into the next exponent comes by itself. Ties go to
        even k, which is the even code as long as m > 0; otherwise the anchor gets the parity of E - E_min.
        """
        grid = 23 - dst.mantissa_nbits
        clamped = self.op("max.f32", self.op("min.f32", x, _single(dst.max_value)), _single(dst.min_value))
        magnitude = self.op("and.b32", clamped, 0x7FFFFFFF)
        least = 128 - dst.bias  # E_min, biased as in f32
        exponent = self.op("max.u32", self.op("and.b32", magnitude, 0x7F800000), least << 23)
        binade = self.op("sub.u32", self.op("shr.u32", exponent, grid), least << dst.mantissa_nbits)
        anchor = self.op("add.u32", exponent, grid << 23)
        if dst.mantissa_nbits == 0:
            anchor = self.op("lop3.b32", binade, 1, anchor, _AND_OR)
        steps = self.op("sub.u32", self.op("add.rn.f32", magnitude, anchor), anchor)
        sign = self.op("shr.u32", clamped, 32 - dst.nbits)
        code = self.op("lop3.b32", sign, 1 << (dst.nbits - 1), self.op("add.u32", binade, steps), _AND_OR)
        if dst.specials == "none" or dst.mantissa_nbits == 0:
            return code
        return self.op("selp.b32", dst.num_codes // 2 - 1, code, self.op("setp.nan.f32", x, x))

    def pack(self, codes: Sequence[Reg], dst: DataType) -> list[Reg]:
        """Words of codes. Codes below 16 bits have zeros above; of 16-bit codes the upper half is ignored."""
        if dst.nbits == 32:
            return list(codes)
        if dst.nbits == 16:
            return [self.op("prmt.b32", low, high, 0x5410) for low, high in _pairs(codes)]
        words: list[Reg] = []
        for i, code in enumerate(codes):
            word, offset = divmod(i * dst.nbits, 32)
            if offset == 0:
                words.append(code)
                continue
            words[word] = self.op("mad.lo.u32", code, 1 << offset, words[word])
            if offset + dst.nbits > 32:
                words.append(self.op("shr.u32", code, 32 - offset))
        return words


def _suffix(dtype: DataType) -> str:
    return "s32" if dtype.is_signed else "u32"


def _cvt_name(dtype: DataType) -> str:
    return f"e{dtype.exponent_nbits}m{dtype.mantissa_nbits}"
