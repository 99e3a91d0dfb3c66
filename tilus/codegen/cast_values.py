"""Casts that go value by value, through f32 or int32, and the choice between ways for pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilus.codegen.fields import Source
from tilus.codegen.lanes import AND_OR, LaneCast, code_of, cvt_name, two_by_two
from tilus.dtypes import DataType, bf16, f16, f32, float8_e8m0, int32, uint32
from tilus.ptx.builder import Builder
from tilus.ptx.module import FloatImm, Reg, RegClass, Vector


def _single(value: float) -> FloatImm:
    return FloatImm(code_of(f32, value))


class ValueCast(LaneCast):
    """The casts that go value by value, through f32 or int32, and the choice between ways for pairs."""

    def reorder(self, slots: Sequence[int]) -> list[Reg]:
        """The same codes in another order."""
        if self.src.nbits == 32:
            return [self.words[slot] for slot in slots]
        if self.src.nbits == 16:
            return [self.join(low, high) for low, high in two_by_two(self.half_places(slots))]
        return self.pack([self.integer(slot, "u32") for slot in slots], self.src)

    def halves(self, dst: DataType, slots: Sequence[int], scaled: bool = False) -> list[Reg]:
        """Words of two f16 or bf16 each, in the cheapest way."""
        through_f16 = dst == bf16 and (self.src.exponent_nbits == 5 or self.has_cvt(self.src))
        if not self.src.is_small or through_f16:
            values = self.singles(slots, exact_sticky=dst == bf16)
            return [self.op(f"cvt.rn.{dst.name}x2.f32", high, low) for low, high in two_by_two(values)]
        if all(pair == self.partner(pair[0]) for pair in two_by_two(slots)):
            return self.in_order(dst, slots, scaled)
        ways = (LaneCast.in_order, LaneCast.regrouped)
        return min(ways, key=lambda way: self.trial_cost(way, dst, slots))(self, dst, slots, scaled)

    def trial_cost(
        self, way: Callable[[LaneCast, DataType, Sequence[int]], list[Reg]], dst: DataType, slots: Sequence[int]
    ) -> int:
        """How many operations a way takes, found by emitting it into a builder that is thrown away."""
        b = Builder()
        words = tuple(b.reg(RegClass.B32) for _ in self.words)
        trial = LaneCast(b, words, target=self.target, order=self.order)
        way(trial, dst, slots)
        return len(trial.memo)

    def singles(self, slots: Sequence[int], *, exact_sticky: bool = False) -> list[Reg]:
        """The values as f32. exact_sticky: 32-bit integers are rounded to odd, so that a later rounding is the only one
        that counts (Boldo and Melquiond, 2005)."""
        if self.src == f32:
            return self.reorder(slots)
        if self.src == bf16:
            moves = (("shl.b32", 16), ("and.b32", 0xFFFF0000))
            return [self.op(moves[slot % 2][0], self.words[slot // 2], moves[slot % 2][1]) for slot in slots]
        if self.src.is_small or self.src == f16:
            found = self.scattered(f16, slots) if self.src.is_small else self.half_places(slots)
            return [self.op("cvt.f32.f16", self.unpack(reg)[lane]) for reg, lane in found]
        if self.src == float8_e8m0:
            return [self.power_of_two(self.integer(slot, "u32")) for slot in slots]
        suffix = _suffix(self.src)
        integers = [self.integer(slot, suffix) for slot in slots]
        if exact_sticky and self.src.nbits == 32:
            return [self.odd(value, suffix) for value in integers]
        return [self.op(f"cvt.rn.f32.{suffix}", value) for value in integers]

    def half_places(self, slots: Sequence[int]) -> list[tuple[Reg, int]]:
        return [(self.words[slot // 2], slot % 2) for slot in slots]

    def power_of_two(self, code: Reg) -> Reg:
        """The f32 of a float8_e8m0 code, the exponent itself; code 0 is a subnormal, 255 NaN."""
        finite = self.op("max.u32", self.op("shl.b32", code, 23), 0x00400000)
        return self.op("selp.b32", finite, 0x7FC00000, self.op("setp.ne.u32", code, 255))

    def odd(self, value: Reg, suffix: str) -> Reg:
        cut = self.op(f"cvt.rz.f32.{suffix}", value)
        inexact = self.op(f"setp.ne.{suffix}", self.op(f"cvt.rzi.{suffix}.f32", cut), value)
        return self.op("or.b32", cut, self.op("selp.b32", 1, 0, inexact))

    def integer(self, slot: int, suffix: str) -> Reg:
        """One field of the source, sign- or zero-extended to 32 bits."""
        nbits = self.src.nbits
        if nbits == 32:
            return self.words[slot]
        pieces: dict[Source, int] = {}
        for bit in range(nbits):
            source = Source(self.order.place(slot, bit) - bit)
            pieces[source] = pieces.get(source, 0) | 1 << bit
        (first, mask), *rest = pieces.items()
        if not rest:
            word, offset = divmod(first.low, 32)
            if offset + nbits <= 32:
                return self.op(f"bfe.{suffix}", self.words[word], offset, nbits)
            return self.op(f"bfe.{suffix}", self.source(first, mask), 0, nbits)
        code = self.merge([(self.source(source, mask), mask) for source, mask in pieces.items()], 0)
        return code if suffix == "u32" else self.op("bfe.s32", code, 0, nbits)

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
        values = self.singles(slots, exact_sticky=dst == float8_e8m0)
        if dst == float8_e8m0:
            return self.pack([self.exponent(x) for x in values], dst)
        if not self.has_cvt(dst):
            return self.pack([self.encode(dst, x) for x in values], dst)
        opcode = f"cvt.rn.satfinite.{cvt_name(dst)}x2.f32"
        halves = [self.op(opcode, high, low) for low, high in two_by_two(values)]
        return [self.op("mov.b32", Vector(pair)) for pair in two_by_two(halves)]

    def exponent(self, x: Reg) -> Reg:
        """The float8_e8m0 code of an f32: half of the last place is added, which subnormals have elsewhere."""
        scale = float8_e8m0
        clamped = self.op("min.f32", self.op("max.f32", x, _single(scale.min_value)), _single(scale.max_value))
        half = self.op("selp.b32", 0x200000, 0x400000, self.op("setp.lt.u32", clamped, 0x800000))
        code = self.op("shr.u32", self.op("add.u32", clamped, half), 23)
        return self.op("selp.b32", 255, code, self.op("setp.nan.f32", x, x))

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
            anchor = self.op("lop3.b32", binade, 1, anchor, AND_OR)
        steps = self.op("sub.u32", self.op("add.rn.f32", magnitude, anchor), anchor)
        sign = self.op("shr.u32", clamped, 32 - dst.nbits)
        code = self.op("lop3.b32", sign, 1 << (dst.nbits - 1), self.op("add.u32", binade, steps), AND_OR)
        if dst.specials == "none" or dst.mantissa_nbits == 0:
            return code
        return self.op("selp.b32", dst.num_codes // 2 - 1, code, self.op("setp.nan.f32", x, x))

    def pack(self, codes: Sequence[Reg], dst: DataType) -> list[Reg]:
        """Words of codes. Codes below 16 bits have zeros above; of 16-bit codes the upper half is ignored."""
        if dst.nbits == 32:
            return list(codes)
        if dst.nbits == 16:
            return [self.op("prmt.b32", low, high, 0x5410) for low, high in two_by_two(codes)]
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
