"""Word programs (tilus.layout.word_program) as PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import assert_never

from tilus.layout.links import WARP_SIZE
from tilus.layout.word_program import Merge, Operation, Permute, Program, ProgramBuilder, Rotate, Select, Shuffle
from tilus.ptx.builder import Builder
from tilus.ptx.module import Imm, Reg, RegClass, Vector

FULL_MASK = 0xFFFFFFFF
LAST_LANE = Imm(WARP_SIZE - 1)
# lop3 truth table of c ? b : a, bit by bit, with inputs a = 0xF0, b = 0xCC, c = 0xAA (PTX ISA, lop3).
PICK_BY_MASK = 0xF0 & ~0xAA | 0xCC & 0xAA


def emit_program(b: Builder, program: Program, words: Sequence[Reg]) -> list[Reg]:
    """The words that a program makes of others, all of 32 bits or (without permutes, rotations and merges) of 64."""
    return list(emit_in_order(b, program, words.__getitem__))


def emit_in_order(b: Builder, program: Program, given: Callable[[int], Reg]) -> Iterator[Reg]:
    """The same word by word: what a word needs is asked of `given`, and emitted, only when its turn comes.

    Whoever uses up the words one by one keeps few registers busy.
    """
    values: dict[int, Reg] = {}

    def value(number: int) -> Reg:
        if number not in values:
            inside = number - program.num_inputs
            values[number] = given(number) if inside < 0 else _emit(b, program.operations[inside], value)
        return values[number]

    for output in program.outputs:
        yield value(output)


def _emit(b: Builder, operation: Operation, value: Callable[[int], Reg]) -> Reg:
    match operation:
        case Permute(low, high, selector):
            return b.emit("prmt.b32", value(low), value(high), Imm(selector))
        case Rotate(number, nbits):
            return b.emit("shf.r.wrap.b32", value(number), value(number), Imm(nbits))
        case Merge(mask, first, second):
            return b.emit("lop3.b32", value(second), value(first), Imm(mask), Imm(PICK_BY_MASK))
        case Select(bit, one, zero):
            return b.emit(f"selp.{value(one).cls.value}", value(one), value(zero), thread_bit(b, bit))
        case Shuffle(number, lanes):
            return _shuffle(b, value(number), lanes)
        case _:
            assert_never(operation)


def thread_bit(b: Builder, bit: int) -> Reg:
    """A predicate: whether the thread number has this bit set."""
    return b.pure("setp.ne.u32", b.pure("and.b32", b.thread_id(), Imm(1 << bit)), Imm(0))


def _shuffle(b: Builder, value: Reg, lanes: tuple[int, ...]) -> Reg:
    if value.cls == RegClass.B64:
        low, high = b.reg(RegClass.B32), b.reg(RegClass.B32)
        b.emit_to("mov.b64", Vector((low, high)), value)
        return b.emit("mov.b64", Vector((_shuffle(b, low, lanes), _shuffle(b, high, lanes))))
    weights = linear_weights(lanes)
    if weights is not None and all(w == (1 << k if 1 << k < WARP_SIZE else 0) for k, w in enumerate(weights)):
        return b.emit("shfl.sync.bfly.b32", value, Imm(lanes[0]), LAST_LANE, Imm(FULL_MASK))
    source = _table(b, lanes) if weights is None else _linear(b, lanes[0], weights)
    return b.emit("shfl.sync.idx.b32", value, source, LAST_LANE, Imm(FULL_MASK))


@lru_cache(maxsize=4096)
def linear_weights(lanes: tuple[int, ...]) -> tuple[int, ...] | None:
    """What each thread bit flips in the lane number, if `lanes[t]` is lanes[0] XOR the weights of the bits of t; else None."""
    weights = tuple(lanes[1 << k] ^ lanes[0] for k in range((len(lanes) - 1).bit_length()))
    expected = [lanes[0]]
    for weight in weights:
        expected += [lane ^ weight for lane in expected]
    return weights if tuple(expected[: len(lanes)]) == lanes else None


def _linear(b: Builder, first: int, weights: Sequence[int]) -> Reg | Imm:
    """The XOR of the thread number's bits, those that move by the same distance together."""
    moves: dict[int, int] = {}
    for bit, weight in enumerate(weights):
        for to in range(weight.bit_length()):
            if weight >> to & 1:
                moves[to - bit] = moves.get(to - bit, 0) | 1 << bit
    result: Reg | None = None
    for distance, mask in sorted(moves.items()):
        part = b.pure("and.b32", b.thread_id(), Imm(mask))
        if distance:
            part = b.pure("shl.b32" if distance > 0 else "shr.u32", part, Imm(abs(distance)))
        result = part if result is None else b.pure("xor.b32", result, part)
    if result is None:
        return Imm(first)
    return b.pure("xor.b32", result, Imm(first)) if first else result


def _table(b: Builder, lanes: tuple[int, ...]) -> Reg | Imm:
    """Any function of the thread number, by selects among constants."""
    tree = ProgramBuilder(WARP_SIZE)
    result = tree.by_thread(lanes)
    values: list[Reg | Imm] = [Imm(lane) for lane in range(WARP_SIZE)]
    for operation in tree.operations:
        if isinstance(operation, Select):
            one, zero = values[operation.one], values[operation.zero]
            values.append(b.pure("selp.b32", one, zero, thread_bit(b, operation.bit)))
    return values[result]
