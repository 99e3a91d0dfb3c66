"""Casts between the element types of register tiles, as plans: data that prints, has a cost and is emitted any number of times.

A tile holds a thread's elements ("slots") as one bit string in consecutive 32-bit registers ("words"), little-endian or in packed
order (`CodeOrder`). A plan casts one chunk of words; it is found by search:

1. `images` finds the ways in which a code in a 16-bit lane can become a number by one or two fma.
2. `fields` chooses, for every pair of results, an image and the shifts and masks that bring both codes' bits there, sharing what
   can be shared.
3. `packed_order` chooses the order of bits for which the result of 1 and 2 costs least.

Casts to f32 and 8-bit floats convert the 16-bit results further; integers and wide types go value by value (`cast_values`).
What 1 and 2 find for 4-bit integers is the method of Kim et al., "Who Says Elephants Can't Run" (2022), which Marlin uses; for
small floats the exponent is left to the scale as in Xia et al., "FP6-LLM" (2024).
Instructions: PTX ISA, sections of lop3, prmt, shf, bfe, fma and cvt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tilus.codegen.cast_values import ValueCast
from tilus.codegen.code_order import CodeOrder, natural_order
from tilus.codegen.images import images
from tilus.codegen.lanes import emit_permutation
from tilus.dtypes import DataType, bf16, f16, f32
from tilus.errors import TilusError
from tilus.ptx.builder import Builder
from tilus.ptx.module import FloatImm, Imm, Instr, Operand, Reg, RegClass, Vector
from tilus.target import Target


@dataclass(frozen=True)
class CastPlan:
    """How the words of `count` codes in `order` become words of `dst`; result slot i is the cast of code i.

    words: registers that stand for the source. body: instructions on them, in which every register is written once. results:
    ceil(count * dst.nbits / 32) registers. scale_exponent: the results times 2^scale_exponent are the casts; 0 unless `scaled`.
    """

    dst: DataType
    order: CodeOrder
    target: Target
    count: int
    words: tuple[Reg, ...]
    body: tuple[Instr, ...]
    results: tuple[Reg, ...]
    scale_exponent: int = 0

    @property
    def src(self) -> DataType:
        return self.order.dtype

    @property
    def num_instructions(self) -> int:
        """Without `mov`: constants live in registers outside of loops, and halves of registers are free."""
        return sum(not instr.opcode.startswith("mov") for instr in self.body)

    @property
    def cost(self) -> float:
        """PTX instructions per value."""
        return self.num_instructions / self.count

    def summary(self) -> str:
        """One line for the compile report."""
        scale = f", times 2^{self.scale_exponent} left to the caller" if self.scale_exponent else ""
        return f"{self.src} to {self.dst}: {self.cost:.2f} instructions a value, {self.count} at a time{scale}"

    def __str__(self) -> str:
        names = {word: f"w{index}" for index, word in enumerate(self.words)}
        lines = [self.summary(), str(self.order)]
        for instr in self.body:
            dst, *sources = instr.operands
            for reg in dst.elements if isinstance(dst, Vector) else (dst,):
                if isinstance(reg, Reg):
                    names[reg] = f"r{len(names) - len(self.words)}"
            lines.append(
                f"{_text(dst, names)} = {instr.opcode} {', '.join(_text(source, names) for source in sources)}"
            )
        return "\n".join([*lines, "results " + " ".join(names[reg] for reg in self.results)])

    def emit(self, b: Builder, words: Sequence[Reg]) -> list[Reg]:
        """Emit the plan for each chunk of `words`."""
        result: list[Reg] = []
        for start in range(0, len(words), len(self.words)):
            known: dict[Reg, Reg] = dict(zip(self.words, words[start : start + len(self.words)], strict=True))
            for instr in self.body:
                _emit_again(b, instr, known)
            result += [known[reg] for reg in self.results]
        return result


def _emit_again(b: Builder, instr: Instr, known: dict[Reg, Reg]) -> None:
    dst, *sources = instr.operands
    if isinstance(dst, Reg) and instr.opcode.startswith("mov") and isinstance(sources[0], Imm):
        known[dst] = b.const(sources[0].value)
        return
    for reg in dst.elements if isinstance(dst, Vector) else (dst,):
        if isinstance(reg, Reg):
            known[reg] = b.reg(reg.cls)
    b.emit_to(instr.opcode, *(_renamed(operand, known) for operand in instr.operands), guard=instr.guard)


def _renamed(operand: Operand, names: Mapping[Reg, Reg]) -> Operand:
    if isinstance(operand, Vector):
        return Vector(tuple(names[e] if isinstance(e, Reg) else e for e in operand.elements))
    return names[operand] if isinstance(operand, Reg) else operand


def _text(operand: Operand, names: Mapping[Reg, str]) -> str:
    match operand:
        case Reg():
            return names[operand]
        case Vector(elements):
            return "{" + ", ".join(_text(element, names) for element in elements) + "}"
        case Imm(value):
            return str(value) if value < 64 else f"0x{value:x}"
        case FloatImm(bits):
            return f"0f{bits:08x}"
        case _:
            return str(operand)


@lru_cache(maxsize=1024)
def plan_cast(
    src: DataType, dst: DataType, target: Target, *, order: CodeOrder | None = None, scaled: bool = False
) -> CastPlan:
    """The plan of a cast of whole chunks of codes, as many as fill words of results.

    order: where the codes' bits are; by default little-endian. scaled: a power of two may be left to the caller of casts to f16
    and bf16, see `CastPlan.scale_exponent`.
    Raises: TilusError for types without a register cast (booleans, 64-bit types).
    """
    order = order or natural_order(src)
    count = order.chunk
    while count * dst.nbits % 32:
        count += order.chunk
    return _plan(dst, target, order, count * src.nbits // 32, tuple(range(count)), scaled)


def plan_slots(src: DataType, dst: DataType, target: Target, num_words: int, slots: Sequence[int]) -> CastPlan:
    """The plan of a cast of a little-endian string of words; result slot i is `dst.encode(src.decode(code))` of slot `slots[i]`.

    Bits past the last result are unspecified. Raises: TilusError for types without a register cast.
    """
    if slots and (max(slots) + 1) * src.nbits > 32 * num_words:
        raise ValueError(f"slot {max(slots)} of {src} lies outside of {num_words} words")
    if list(slots) == list(range(32 * num_words // src.nbits)):
        plan = plan_cast(src, dst, target)
        if len(slots) % plan.count == 0:
            return plan
    return _plan(dst, target, natural_order(src), num_words, tuple(slots), False)


def plan_unpack(order: CodeOrder, dst: DataType, target: Target, num_words: int, *, scaled: bool = False) -> CastPlan:
    """The plan of a cast of words of codes in `order`, whole chunks; to the type of the codes it makes them little-endian."""
    plan = plan_cast(order.dtype, dst, target, order=order, scaled=scaled)
    if num_words % len(plan.words) == 0:
        return plan
    return _plan(dst, target, order, num_words, tuple(range(32 * num_words // order.dtype.nbits)), scaled)


def scale_exponent(src: DataType, dst: DataType) -> int:
    """The `CastPlan.scale_exponent` of scaled casts to f16 and bf16, the same for every target; 0 for other types."""
    return images(src, dst, True)[0].scale_exponent if dst in (f16, bf16) else 0


@lru_cache(maxsize=1024)
def _plan(
    dst: DataType, target: Target, order: CodeOrder, num_words: int, slots: tuple[int, ...], scaled: bool
) -> CastPlan:
    for dtype in (order.dtype, dst):
        if dtype.kind == "bool" or dtype.nbits > 32:
            raise TilusError(
                f"cast from {order.dtype} to {dst}: found {dtype}, expected integers and floats of at most 32 bits",
                hint="booleans are predicates (use where), and 64-bit values are scalars",
            )
    b = Builder()
    words = tuple(b.reg(RegClass.B32) for _ in range(num_words))
    results = _results(ValueCast(b, words, target=target, order=order), dst, slots, scaled)
    body = tuple(item for item in b.finish() if isinstance(item, Instr))
    exponent = scale_exponent(order.dtype, dst) if scaled else 0
    return CastPlan(dst, order, target, len(slots), words, body, tuple(results), exponent)


def _results(cast: ValueCast, dst: DataType, slots: Sequence[int], scaled: bool) -> list[Reg]:
    src = cast.src
    if src == dst and list(slots) == list(range(len(slots))):
        words = emit_permutation(cast.b, cast.words, cast.order.places)
        return words[: -(-len(slots) * src.nbits // 32)]
    if src == dst:
        return cast.reorder(slots)
    if dst in (f16, bf16):
        return cast.halves(dst, slots, scaled)
    if dst == f32:
        return cast.singles(slots)
    if dst.is_float:
        return cast.small_floats(dst, slots)
    return cast.pack(cast.integers(dst, slots), dst)
