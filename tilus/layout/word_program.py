"""Straight-line programs over the registers of a warp: what a conversion that needs no memory is made of.

A program takes the words of one tile and gives those of another. All threads run the same operations; what differs between
threads is which of two values a `Select` takes (one bit of the thread number decides) and which lane a `Shuffle` reads.
`Program` is data: `tilus.codegen.word_program` turns it into PTX.

Costs are cycles in which a warp occupies its quarter of a multiprocessor, from the throughputs in the CUDA C++ Programming
Guide ("Throughput of Native Arithmetic Instructions", compute capability 8.0 and 9.0): 64 results a clock and multiprocessor
for integer and logic operations and 32 for shuffles, each of which a warp needs 32 of. What depends on the thread number only
(predicates, lane numbers) is computed once in front of loops and costs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

WORD_NBITS = 32
ALU_CYCLES = 2
SHUFFLE_CYCLES = 4


@dataclass(frozen=True, slots=True)
class Permute:
    """Byte k of the result is byte `selector >> 4k & 7` of the eight bytes of (low, high): prmt."""

    low: int
    high: int
    selector: int


@dataclass(frozen=True, slots=True)
class Rotate:
    """The value rotated right by `nbits`."""

    value: int
    nbits: int


@dataclass(frozen=True, slots=True)
class Merge:
    """The bits of `first` where `mask` has ones, else those of `second`."""

    mask: int
    first: int
    second: int


@dataclass(frozen=True, slots=True)
class Select:
    """`one` in threads whose number has this bit set, else `zero`."""

    bit: int
    one: int
    zero: int


@dataclass(frozen=True, slots=True)
class Shuffle:
    """The value of another lane. lanes: for each thread, the lane of its own warp that it reads."""

    value: int
    lanes: tuple[int, ...]


Operation = Permute | Rotate | Merge | Select | Shuffle


@dataclass(frozen=True, slots=True)
class Program:
    """Values 0 .. num_inputs - 1 are the given words; operation k makes value num_inputs + k. outputs: values in word order."""

    num_inputs: int
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]

    def count(self, kind: type[Operation]) -> int:
        return sum(isinstance(operation, kind) for operation in self.operations)

    @property
    def rounds(self) -> int:
        """How many values each lane exchanges with others."""
        return self.count(Shuffle)

    def cycles(self, words_per_value: int = 1) -> int:
        """The cost; values of 64 bits are two words, which shuffles and selects move one after the other."""
        shuffles = self.rounds
        others = len(self.operations) - shuffles
        return words_per_value * (ALU_CYCLES * others + SHUFFLE_CYCLES * shuffles)


@dataclass
class ProgramBuilder:
    """Appends operations; equal ones are made once."""

    num_inputs: int
    operations: list[Operation] = field(default_factory=list[Operation])
    numbers: dict[Operation, int] = field(default_factory=dict[Operation, int])

    def value(self, operation: Operation) -> int:
        if operation not in self.numbers:
            self.numbers[operation] = self.num_inputs + len(self.operations)
            self.operations.append(operation)
        return self.numbers[operation]

    def finish(self, outputs: Iterable[int]) -> Program:
        return Program(self.num_inputs, tuple(self.operations), tuple(outputs))

    def by_thread(self, choices: Sequence[int]) -> int:
        """The value `choices[t]` in thread t; -1 where it does not matter.

        Splits by the highest thread bit first, always in the same order: trees that agree in a part share it, so that the
        trees of a transposition over n lanes are together a butterfly of n log2(n) selects.
        """
        size = 1 << (len(choices) - 1).bit_length()
        return self._tree((*choices, *(-1,) * (size - len(choices))), {})

    def _tree(self, choices: tuple[int, ...], seen: dict[tuple[int, ...], int]) -> int:
        if choices in seen:
            return seen[choices]
        half = len(choices) // 2
        if half == 0:
            return choices[0]
        low, high = choices[:half], choices[half:]
        zero = self._tree(low, seen)
        one = zero if low == high else self._tree(high, seen)
        if zero == one or -1 in (zero, one):
            result = max(zero, one)
        else:
            result = self.value(Select(half.bit_length() - 1, one, zero))
        seen[choices] = result
        return result

    def gather(self, words: Sequence[int], bits: Sequence[tuple[int, int, int]]) -> int:
        """A word from bit ranges of a string of words (little-endian). bits: (destination bit, source bit, nbits) without
        overlap, each destination range inside of the word. What no range covers is arbitrary.

        Ranges that move by the same distance from the same word move together: a rotation and a merge. Whole bytes move by
        prmt, which takes any four bytes of two words.
        """
        pieces: dict[tuple[int, int], int] = {}
        for to, start, nbits in bits:
            while nbits:
                index, offset = divmod(start, WORD_NBITS)
                length = min(nbits, WORD_NBITS - offset)
                key = (words[index], (offset - to) % WORD_NBITS)
                pieces[key] = pieces.get(key, 0) | ((1 << length) - 1) << to
                to, start, nbits = to + length, start + length, nbits - length
        if not pieces:
            return words[0]
        sources = {value for value, _ in pieces}
        bytewise = self._byte_sources(pieces)
        moves = sum(rotation > 0 for _, rotation in pieces) + len(pieces) - 1
        if bytewise is not None and max(1, len(sources) - 1) <= moves:
            return self._from_bytes(bytewise)
        result: int | None = None
        for (value, rotation), mask in sorted(pieces.items()):
            moved = self.value(Rotate(value, rotation)) if rotation else value
            result = moved if result is None else self.value(Merge(mask, moved, result))
        return words[0] if result is None else result

    @staticmethod
    def _byte_sources(pieces: dict[tuple[int, int], int]) -> list[tuple[int, int] | None] | None:
        """(value, byte) for each byte of the word, None where it is free; None where a byte has bits of two sources."""
        found: list[tuple[int, int] | None] = [None] * 4
        for (value, rotation), mask in pieces.items():
            for byte in range(4):
                if mask >> 8 * byte & 0xFF:
                    if rotation % 8 or found[byte] is not None:
                        return None
                    found[byte] = (value, (byte + rotation // 8) % 4)
        return found

    def _from_bytes(self, found: Sequence[tuple[int, int] | None]) -> int:
        """Permutes that join the needed values in pairs, the results in pairs again, until a last one is the word."""
        sources = list(found)
        values = list(dict.fromkeys(source[0] for source in found if source is not None))
        while len(values) > 2:
            joined = [self._join(sources, a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
            values = joined + values[2 * len(joined) :]
        low, high = values[0], values[-1]
        if low == high and all(source is None or source[1] == byte for byte, source in enumerate(sources)):
            return low
        selector = 0
        for byte, source in enumerate(sources):
            value, at = (low, byte) if source is None else source
            selector |= (at if value == low else 4 + at) << 4 * byte
        return self.value(Permute(low, high, selector))

    def _join(self, sources: list[tuple[int, int] | None], low: int, high: int) -> int:
        """One value with the bytes that `sources` takes of two; `sources` then takes them from there.

        If it takes two bytes, their neighbours come along, for the word that needs those: the permutes of a transposition are
        shared in this way.
        """
        needed = {
            source: source[1] + 4 * (source[0] == high) for source in sources if source and source[0] in (low, high)
        }
        taken = sorted(set(needed.values()) if len(needed) != 2 else {n ^ k for n in needed.values() for k in (0, 1)})
        joined = self.value(Permute(low, high, sum(at << 4 * byte for byte, at in enumerate(taken))))
        for byte, source in enumerate(sources):
            if source in needed:
                sources[byte] = (joined, taken.index(needed[source]))
        return joined


@lru_cache(maxsize=4096)
def pick_fields(nbits: int, num_words: int, slots: tuple[int, ...]) -> Program:
    """The program from a tile's words to words whose slot i is slot `slots[i]`.

    Fields of up to 32 bits are packed; wider ones are a value each.
    """
    builder = ProgramBuilder(num_words)
    places = [(i * nbits, slot * nbits, nbits) for i, slot in enumerate(slots)]
    return builder.finish(gather_string(builder, range(num_words), places, nbits))


def words_of(nbits: int, num_slots: int) -> int:
    """Values that a tile of `num_slots` slots takes in a thread."""
    return num_slots if nbits > WORD_NBITS else -(-num_slots * nbits // WORD_NBITS)


def gather_string(
    builder: ProgramBuilder, words: Sequence[int], places: Sequence[tuple[int, int, int]], nbits: int
) -> list[int]:
    """All words of a string from bit ranges of another, as in `ProgramBuilder.gather`; values of more than 32 bits are
    taken whole (ranges are then in their units of `nbits`)."""
    if nbits > WORD_NBITS:
        return [words[start // nbits] for _, start, _ in sorted(places)]
    end = max((to + length for to, _, length in places), default=0)
    by_word: list[list[tuple[int, int, int]]] = [[] for _ in range(-(-end // WORD_NBITS))]
    for to, start, length in places:
        while length:
            index, offset = divmod(to, WORD_NBITS)
            part = min(length, WORD_NBITS - offset)
            by_word[index].append((offset, start, part))
            to, start, length = to + part, start + part, length - part
    return [builder.gather(words, bits) for bits in by_word]
