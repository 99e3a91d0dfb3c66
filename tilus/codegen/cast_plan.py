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
the order of slots; `preferred_slots` gives the order in which step 1 is free. For other orders the cheaper of two plans is
taken: move the fields of each pair, or convert the pairs that are in place and permute the results. The steps are in
`lanes`; here is the choice, and all casts that go value by value through f32 or int32.

Step 2 for 4-bit integers is the method of Kim et al., "Who Says Elephants Can't Run" (2022), which Marlin uses; for
6-bit floats that of Xia et al., "FP6-LLM" (2024). Instructions: PTX ISA, sections of lop3, prmt, shf, bfe, fma and cvt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilus.codegen.lanes import AND_OR, LaneCast, code_of, cvt_name, lane_chunk, two_by_two
from tilus.dtypes import DataType, bf16, f16, f32, int32, tf32, uint32
from tilus.errors import TilusError
from tilus.ptx.builder import Builder
from tilus.ptx.module import FloatImm, Instr, Reg, RegClass, Vector
from tilus.target import Target


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
    if dst == tf32:
        return [cast.op("cvt.rna.tf32.f32", value) for value in cast.singles(slots, exact_sticky=True)]
    if dst.is_float:
        return cast.small_floats(dst, slots)
    return cast.pack(cast.integers(dst, slots), dst)


def preferred_chunk(src: DataType, count: int) -> int:
    """The chunk size C of `preferred_slots`; C = 2 is the identity order.

    Source slots r and r + C/2 of a chunk are so far apart that their fields have equal offsets in their half-words; a
    chunk is a whole number of words.
    """
    chunk = lane_chunk(src)
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


def _single(value: float) -> FloatImm:
    return FloatImm(code_of(f32, value))


class _Cast(LaneCast):
    """The casts that go value by value, through f32 or int32, and the choice between plans for pairs."""

    def reorder(self, slots: Sequence[int]) -> list[Reg]:
        """The same codes in another order."""
        if self.src.nbits == 32:
            return [self.words[slot] for slot in slots]
        if self.src.nbits == 16:
            return [self.join(low, high) for low, high in two_by_two(self.half_places(slots))]
        return self.pack([self.integer(slot, "u32") for slot in slots], self.src)

    def halves(self, dst: DataType, slots: Sequence[int]) -> list[Reg]:
        """Words of two f16 or bf16 each, by the cheapest plan."""
        through_f16 = dst == bf16 and (self.src.exponent_nbits == 5 or self.has_cvt(self.src))
        if not self.src.is_small or through_f16:
            values = self.singles(slots, exact_sticky=dst == bf16)
            return [self.op(f"cvt.rn.{dst.name}x2.f32", high, low) for low, high in two_by_two(values)]
        if all(pair == self.partners(pair[0]) for pair in two_by_two(slots)):
            return self.in_order(dst, slots)
        plans = (LaneCast.in_order, LaneCast.regrouped)
        return min(plans, key=lambda plan: self.trial_cost(plan, dst, slots))(self, dst, slots)

    def trial_cost(
        self, plan: Callable[[LaneCast, DataType, Sequence[int]], list[Reg]], dst: DataType, slots: Sequence[int]
    ) -> int:
        """How many operations a plan takes, found by emitting it into a builder that is thrown away."""
        b = Builder()
        trial = LaneCast(b, self.target, self.src, tuple(b.reg(RegClass.B32) for _ in self.words))
        plan(trial, dst, slots)
        return len(trial.memo)

    def singles(self, slots: Sequence[int], *, exact_sticky: bool = False) -> list[Reg]:
        """The values as f32. exact_sticky: 32-bit integers are rounded to odd, so that a later rounding is the only one
        that counts (Boldo and Melquiond, 2005)."""
        if self.src == f32:
            return self.reorder(slots)
        if self.src == tf32:
            return [self.op("and.b32", self.words[slot], 0xFFFFE000) for slot in slots]
        if self.src == bf16:
            moves = (("shl.b32", 16), ("and.b32", 0xFFFF0000))
            return [self.op(moves[slot % 2][0], self.words[slot // 2], moves[slot % 2][1]) for slot in slots]
        if self.src.is_small or self.src == f16:
            found = self.scattered(f16, slots) if self.src.is_small else self.half_places(slots)
            return [self.op("cvt.f32.f16", self.unpack(reg)[lane]) for reg, lane in found]
        suffix = _suffix(self.src)
        integers = [self.integer(slot, suffix) for slot in slots]
        if exact_sticky and self.src.nbits == 32:
            return [self.odd(value, suffix) for value in integers]
        return [self.op(f"cvt.rn.f32.{suffix}", value) for value in integers]

    def half_places(self, slots: Sequence[int]) -> list[tuple[Reg, int]]:
        return [(self.words[slot // 2], slot % 2) for slot in slots]

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
        opcode = f"cvt.rn.satfinite.{cvt_name(dst)}x2.f32"
        halves = [self.op(opcode, high, low) for low, high in two_by_two(values)]
        return [self.op("mov.b32", Vector(pair)) for pair in two_by_two(halves)]

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
