"""Packed codes of 1 to 8 bits: where the bits of each are, and how they become numbers, one by one or a vector at a time.

Codes have virtual addresses: thread * slots + slot. The words of 32 bits of neighbouring threads often lie side by side; then
lanes of vectors are threads, and a code takes a shift and a mask, or a lookup where the table fits into registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilus.codegen.c.numbers import literal, value_of_code
from tilus.codegen.c.threads import address
from tilus.codegen.c.tile import Leaf
from tilus.codegen.code_order import CodeOrder
from tilus.dtypes import DataType, bf16, f32, uint8
from tilus.layout import Digit, LayoutError, SharedLayout, row_major

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext

WORD, BYTE = 32, 8
TABLE_NBITS = 5  # of codes whose values two vector registers hold


@dataclass(frozen=True)
class Piece:
    """Bits `low ..` of a code, `length` of them, at bit `position` of a word."""

    word: int
    position: int
    low: int
    length: int


@dataclass(frozen=True)
class Codes:
    """Codes as numbers. array: of bytes. words: [threads, words] to the byte at which a thread's word is. dtype: of the values.

    factor: what values are multiplied with. table: a C array of 32 floats that codes are looked up in, in place of their values.
    """

    array: str
    words: SharedLayout
    code: DataType
    dtype: DataType
    order: CodeOrder
    slots: int
    factor: float = 1.0
    table: str = ""
    is_array: bool = field(default=False, init=False)

    @staticmethod
    def of(
        array: str, place: SharedLayout, code: DataType, order: CodeOrder, slots: int, dtype: DataType | None = None,
        factor: float = 1.0,
    ) -> Codes:  # fmt: skip
        """The codes in each thread's bytes, whose byte n is at place (thread, n) of an array; words of four are in a run."""
        words = SharedLayout.try_from_table(place.table()[:, ::4])
        if words is None:
            raise LayoutError("the words of threads are in no layout")
        return Codes(array, words, code, dtype or code, order, slots, factor)

    def pieces(self, slot: int) -> list[Piece]:
        """Where the bits of a slot's code are, its lowest first."""
        found: list[Piece] = []
        for bit in range(self.code.nbits):
            word, position = divmod(self.order.place(slot, bit), WORD)
            last = found[-1] if found else None
            if last and last.word == word and last.position + last.length == position:
                found[-1] = Piece(word, last.position, last.low, last.length + 1)
            else:
                found.append(Piece(word, position, bit, 1))
        return found

    def element(self, address: str) -> str:
        raise TypeError("packed codes are unpacked before they are read one by one")

    def unpacked(self, ctx: CContext, leaf: Leaf) -> Leaf:
        """All codes of a leaf as values, threads next to each other."""
        return unpack(ctx, self, leaf)


def split_address(layout: SharedLayout, slots: int) -> tuple[SharedLayout, SharedLayout]:
    """A layout to virtual addresses as one to threads and one to slots."""
    threads: list[tuple[Digit, ...]] = []
    inner: list[tuple[Digit, ...]] = []
    for digits in layout.digits:
        fine = [part for digit in digits for part in _cut(digit, slots)]
        threads.append(tuple(Digit(d.size, 0, d.weight // slots if d.weight >= slots else 0) for d in fine))
        inner.append(tuple(Digit(d.size, 0, d.weight if d.weight < slots else 0) for d in fine))
    origin = divmod(layout.origin, slots)
    return (
        SharedLayout(layout.shape, tuple(threads), None, origin[0]),
        SharedLayout(layout.shape, tuple(inner), None, origin[1]),
    )


def _cut(digit: Digit, slots: int) -> list[Digit]:
    reach = digit.weight * digit.size
    if digit.weight >= slots or reach <= slots:
        return [digit]
    if slots % digit.weight:
        raise LayoutError(
            f"a digit of {digit.size} codes with stride {digit.weight} straddles threads of {slots} codes"
        )
    inner = slots // digit.weight
    return [Digit(digit.size // inner, digit.dim, slots), Digit(inner, digit.dim, digit.weight)]


def unpack(ctx: CContext, codes: Codes, leaf: Leaf, layout: SharedLayout | None = None) -> Leaf:
    """All codes of a leaf as values, one loop over threads for each slot.

    layout: of the array, where neighbouring threads' values can follow each other in it; else threads are innermost.
    """
    threads, slots = (x.table().reshape(-1) for x in split_address(leaf.layout, codes.slots))
    used_threads, rank = np.unique(threads, return_inverse=True)
    used_slots, place = np.unique(slots, return_inverse=True)
    count = len(used_threads)
    words = SharedLayout.try_from_table(codes.words.table()[used_threads])
    plain_order = SharedLayout.try_from_table((place * count + rank).reshape(leaf.layout.shape))
    if plain_order is None or words is None:
        raise LayoutError("packed codes in an order that is no layout")
    if codes.dtype.is_float and vector_lanes(ctx, words, count) == 1:
        codes, words = _gathered(ctx, codes, words)
    target, steps = plain_order, row_major((count,))
    places = np.arange(len(used_slots) * count, dtype=np.int64).reshape(-1, count)
    if layout is not None:
        wanted = np.zeros_like(places)
        wanted[place, rank] = layout.table().reshape(-1)
        found = _thread_steps(wanted, vector_lanes(ctx, words, count))
        if found is not None:
            target, steps, places = layout, found, wanted
    array = ctx.array(codes.dtype, target.size, "numbers")
    for slot, first in zip(used_slots.tolist(), places[:, 0].tolist(), strict=True):
        _unpack_slot(ctx, codes, slot, words, f"{array.name} + {first}", steps)
    return Leaf(array, target)


def _thread_steps(places: npt.NDArray[np.int64], lanes: int) -> SharedLayout | None:
    """Where a slot's values are, from the first thread's on: the same for all slots and in whole vectors, or None."""
    steps = places - places[:, :1]
    runs = steps[0].reshape(-1, lanes)
    if (steps != steps[0]).any() or (runs != runs[:, :1] + np.arange(lanes)).any():
        return None
    return SharedLayout.try_from_table(steps[0])


def _gathered(ctx: CContext, codes: Codes, words: SharedLayout) -> tuple[Codes, SharedLayout]:
    """The same codes with the words of neighbouring threads side by side."""
    threads, count = words.shape
    name = ctx.array(uint8, 4 * threads * count, "words").name
    with ctx.writer.loops([count, threads]) as (word, thread):
        place = f"4 * (({word}) * {threads} + {thread})"
        ctx.writer.line(f"memcpy({name} + {place}, {codes.array} + {address(words, thread, word)}, 4);")
    return replace(codes, array=name), row_major((count, threads, 4)).slice(2, 0, 1).squeeze(2).permute((1, 0))


def _unpack_slot(
    ctx: CContext, codes: Codes, slot: int, words: SharedLayout, target: str, steps: SharedLayout
) -> None:  # fmt: skip
    count = words.shape[0]
    lanes = vector_lanes(ctx, words, count) if codes.dtype.is_float else 1
    ctx.writer.line('_Pragma("GCC unroll 1")')  # there is a loop for each slot: unrolled, they take minutes to compile
    with ctx.writer.block(f"for (int64_t t = 0; t < {count}; t += {lanes})"):

        def word(index: int) -> str:
            place = f"{codes.array} + {word_address(words, 't', index)}"
            return f"tl_load_u32x{lanes}({place})" if lanes > 1 else f"tl_u32({place})"

        to = f"{target} + {address(steps, 't')}"
        if lanes > 1:
            ctx.writer.line(f"tl_store_f32x{lanes}({to}, {vector_number(ctx, codes, slot, lanes, word)});")
        else:
            ctx.writer.line(f"*({to}) = {_number(codes, slot, word)};")


def word_address(words: SharedLayout, thread: str, word: int) -> str:
    """The byte at which a thread's word is, as a C expression."""
    fixed = words.origin + sum(word // t.weight % t.size * t.stride for t in words.terms[1])
    whole = words.shape[0]
    parts = [
        thread if t.stride == 1 else f"{thread} * {t.stride}" if t.weight == 1 and t.size == whole
        else f"({thread}) / {t.weight} % {t.size} * {t.stride}"
        for t in words.terms[0] if t.stride
    ]  # fmt: skip
    return " + ".join([str(fixed), *parts])


def vector_lanes(ctx: CContext, words: SharedLayout, count: int) -> int:
    """How many neighbouring threads' words are a vector, 1 where they are not side by side."""
    run = next((t.size for t in words.terms[0] if t.weight == 1 and t.stride == 4), 1) if count > 1 else 1
    lanes = ctx.target.lanes
    while lanes > 1 and (run % lanes or count % lanes):
        lanes //= 2
    return lanes if lanes >= 4 else 1


def _field(pieces: list[Piece], word: Callable[[int], str], nbits: int) -> str:
    """A code, zero-extended, in C; works on vectors too."""
    if len(pieces) == 1:
        (piece,) = pieces
        shifted = word(piece.word) if piece.position == 0 else f"({word(piece.word)} >> {piece.position})"
        return shifted if piece.position + piece.length == WORD else f"({shifted} & {(1 << nbits) - 1}u)"
    parts: list[str] = []
    for piece in pieces:
        shift = piece.position - piece.low
        moved = word(piece.word) if not shift else f"({word(piece.word)} {'>>' if shift > 0 else '<<'} {abs(shift)})"
        parts.append(f"({moved} & {((1 << piece.length) - 1) << piece.low}u)")
    return f"({' | '.join(parts)})"


def _number(codes: Codes, slot: int, word: Callable[[int], str]) -> str:
    if codes.table:
        return f"{codes.table}[{_field(codes.pieces(slot), word, codes.code.nbits)}]"
    value = value_of_code(codes.code, _field(codes.pieces(slot), word, codes.code.nbits))
    if codes.dtype.is_float and codes.factor != 1.0:
        return f"(float)({value}) * {literal(f32, codes.factor)}"
    return f"(float)({value})" if codes.dtype.is_float else value


Keep = Callable[[tuple[int, int], str], str]
"""Gives a name to what an expression of words is, once for each key."""


def vector_number(
    ctx: CContext, codes: Codes, slot: int, lanes: int, word: Callable[[int], str], keep: Keep | None = None
) -> str:
    """A vector of the floats that a slot's codes stand for. word: gives a vector of words (a name that may be repeated).
    keep: where several slots are asked for, keeps what they have in common."""
    code, pieces = codes.code, codes.pieces(slot)
    if keep is not None and _has_byte_floats(ctx, codes, pieces, lanes):
        return _byte_float(ctx, codes, pieces[0], word, keep)
    if codes.table or (code.nbits <= TABLE_NBITS and lanes == 16 and "__AVX512F__" in ctx.target.features):
        table = codes.table or lookup_table(ctx, codes)
        wide = "" if code.nbits == TABLE_NBITS else "16"
        return f"tl_lookup{wide}_f32x{lanes}({table}, {_index(codes, pieces, word)})"
    if code.kind == "uint":
        number = f"tl_number_f32x{lanes}((tl_i32x{lanes}){_field(pieces, word, code.nbits)})"
    elif code.kind == "int":
        number = f"tl_number_f32x{lanes}({_signed(pieces, word, code.nbits, lanes)})"
    else:
        number = _small_float(codes, pieces, word, lanes)
    return number if codes.factor == 1.0 else f"({number} * {literal(f32, codes.factor)})"


def _has_byte_floats(ctx: CContext, codes: Codes, pieces: list[Piece], lanes: int) -> bool:
    """Whether codes are whole bytes of words, floats, and looked up in tables of 16 bits by the processor."""
    is_byte = codes.code.is_small and codes.code.is_float and codes.code.nbits == BYTE
    whole = len(pieces) == 1 and pieces[0].position % BYTE == 0
    return is_byte and whole and not codes.table and lanes == 16 and "__AVX512BW__" in ctx.target.features


def _byte_float(ctx: CContext, codes: Codes, piece: Piece, word: Callable[[int], str], keep: Keep) -> str:
    """Two of a word's four codes become bf16 at once, in both halves; each half is then the upper half of a float."""
    values = codes.code.decode(np.arange(codes.code.num_codes // 2, dtype=np.uint8)) * np.float32(codes.factor)
    entries = ", ".join(map(str, bf16.encode(values).tolist()))
    name = f"halves_{codes.code.name}_{round(-math.log2(codes.factor))}"
    ctx.table(name, f"static const uint16_t {name}[128] __attribute__((aligned(64))) = {{{entries}}};")
    half, odd = divmod(piece.position // BYTE, 2)
    shifted = f"({word(piece.word)} >> {BYTE})" if odd else word(piece.word)
    pair = keep((piece.word, odd), f"tl_byte_floats_u32x16({name}, {shifted})")
    return f"(tl_f32x16)({pair} & 0xffff0000u)" if half else f"(tl_f32x16)({pair} << 16)"


def _index(codes: Codes, pieces: list[Piece], word: Callable[[int], str]) -> str:
    """A code whose upper bits are anything: `lookup_table` holds its values for all of them."""
    if len(pieces) == 1:
        (piece,) = pieces
        return word(piece.word) if piece.position == 0 else f"({word(piece.word)} >> {piece.position})"
    return _field(pieces, word, codes.code.nbits)


def lookup_table(ctx: CContext, codes: Codes) -> str:
    """The values of all codes, repeated to 32 entries."""
    values = codes.code.decode(np.arange(codes.code.num_codes, dtype=np.uint8)).astype(np.float32) * np.float32(
        codes.factor
    )
    entries = ", ".join(literal(f32, float(v)) for v in np.resize(values, 32))
    name = f"lookup_{codes.code.name}_{round(-math.log2(codes.factor))}"
    return ctx.table(name, f"static const float {name}[32] __attribute__((aligned(64))) = {{{entries}}};")


def _signed(pieces: list[Piece], word: Callable[[int], str], nbits: int, lanes: int) -> str:
    if len(pieces) == 1:
        (piece,) = pieces
        left = WORD - piece.position - nbits
        top = f"({word(piece.word)} << {left})" if left else word(piece.word)
    else:
        top = f"({_field(pieces, word, nbits)} << {WORD - nbits})"
    return f"((tl_i32x{lanes}){top} >> {WORD - nbits})"


def _small_float(codes: Codes, pieces: list[Piece], word: Callable[[int], str], lanes: int) -> str:
    """Sign, exponent and mantissa moved to their places in f16, whose conversion takes care of subnormals."""
    code = codes.code
    field_ = _field(pieces, word, code.nbits)
    shift = 10 - code.mantissa_nbits
    magnitude = f"(({field_} & {code.num_codes // 2 - 1}u) << {shift})"
    sign = f"(({field_} & {code.num_codes // 2}u) << {16 - code.nbits})"
    number = f"tl_halves_f32x{lanes}({magnitude} | {sign})"
    if code.specials == "nan":
        number = (
            f"tl_nan_where_f32x{lanes}({number}, ({field_} & {code.num_codes // 2 - 1}u) == {code.num_codes // 2 - 1}u)"
        )
    factor = 2.0 ** (15 - code.bias)
    return number if factor == 1.0 else f"({number} * {literal(f32, factor)})"


def table_of_32(ctx: CContext, table: Leaf) -> str:
    """A table of 16 values twice, as lookups by five bits want it."""
    twice = ctx.array(f32, 32, "table").name
    with ctx.writer.block("for (int64_t i = 0; i < 32; i++)"):
        ctx.writer.line(f"{twice}[i] = {table.name}[{address(table.layout, 'i % 16')}];")
    return twice
