"""How the blocks of a decode kernel share the cached tokens of a batch: evenly, whatever the lengths, without a plan on the host.

The tokens of each sequence are cut into *units* of a fixed length. Units are numbered through the batch: those of one sequence
and kv head (a *pair*) in order, then those of its next head, then the next sequence's. Each block takes an equal run of them, and
so works on parts of few pairs. Pairs that lie in several blocks are merged from partial results.

With `fixed` every unit is a part of its own, wherever its pair is cut: the bits of a result then depend on nothing but its
sequence. Otherwise a part is all that a block has of a pair.

Each part costs its merge, which takes longer than few tokens do: `Split.fewer` leaves blocks idle where that is faster.

Plain arithmetic on ints: kernels inline these functions, tests call them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import int32
from tilus.layout import replicated, spatial

LENGTHS = 128  # sequences that a warp looks at together
MOST_BLOCKS = 1023
FINE_UNITS = 2**31 // (MOST_BLOCKS + 1)  # times a number of blocks is below 2^31
COARSE = 10  # bits of a unit's number that do not count for the first guess at its owner, where there are more


@dataclass(frozen=True)
class Split:
    """unit: tokens of a unit. fixed: whether every unit is a part of its own. recent: if given, only so many of the last tokens
    of a sequence count, and those in front that share a page of `page_size` tokens with them. fewer: (units, blocks), ...: with
    fewer units than these only so many blocks share them, the last one counts; see `fewer_blocks`."""

    unit: int
    fixed: bool = False
    recent: int | None = None
    page_size: int = 1
    fewer: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Part:
    """What a block does of a pair at a time; of numbers that a kernel knows at run time.

    length: cached tokens of the sequence that count. passed: those in front of them. first, last: units of the pair, counted
    through the batch; last is behind the end. begin, end: those of them that are in this part, which are the tokens from `token`
    to before `end_token` of those that count. pair: sequence * kv heads + head.
    """

    sequence: Any
    head: Any
    pair: Any
    length: Any
    passed: Any
    first: Any
    last: Any
    begin: Any
    end: Any
    token: Any
    end_token: Any


def units_of(length: Any, unit: int) -> Any:
    """Units of a sequence for each kv head; one where there are no tokens, so that somebody writes its result."""
    return max((length + (unit - 1)) // unit, 1)


def passed_of(length: Any, split: Split) -> Any:
    """Tokens of a sequence that do not count: whole pages."""
    return 0 if split.recent is None else max(length - split.recent, 0) // split.page_size * split.page_size


def share(units: Any, blocks: Any, block: Any, fewer: tuple[tuple[int, int], ...] = ()) -> Any:
    """The first unit of a block, units * block / blocks: blocks that are several for each of equal pairs begin with them, also
    where the units do not come out even. Of fewer units than blocks the first blocks have one each.

    Fewer than 2^31 units and up to MOST_BLOCKS blocks. fewer: as `Split.fewer`. Dividing by numbers of blocks
    that a kernel does not know when it is compiled takes long: `paged_decode_kernel` knows all of them.
    """
    first = _even(units, blocks, block)
    for below, few in fewer:
        first = _even(units, few, min(block, few)) if units < below else first
    return first


def _even(units: Any, blocks: Any, block: Any) -> Any:
    even = block * (units // blocks) + block * (units % blocks) // blocks
    return max(even, min(block, units) if units < blocks else 0)  # takes a register less than one or the other


def owner(units: Any, blocks: Any, unit: Any, fewer: tuple[tuple[int, int], ...] = ()) -> Any:
    """The block that has a unit: the inverse of `share`."""
    taking = sharing(units, blocks, fewer)
    block = unit  # a variable: computed once, not at each use
    if units >= taking:
        coarse = 0 if units < FINE_UNITS else COARSE
        numbers = max(units >> coarse, 1)
        block = (((unit >> coarse) + 1) * taking - 1) // numbers  # or, of coarse numbers, the next one
        if share(units, blocks, block, fewer) > unit:
            block = block - 1
    return block


def sharing(units: Any, blocks: Any, fewer: tuple[tuple[int, int], ...]) -> Any:
    """How many of the blocks are to share the units of a batch."""
    for below, few in fewer:
        blocks = few if units < below else blocks
    return blocks


def owners(units: Any, blocks: Any, first: Any, last: Any, fewer: tuple[tuple[int, int], ...] = ()) -> Any:
    """(the block that has unit `first`, how many blocks have units from that to before `last`)"""
    block = owner(units, blocks, first, fewer)
    return block, owner(units, blocks, max(last - 1, 0), fewer) - block + 1


def parts_of(part: Part, units: Any, blocks: Any, split: Split, block: Any) -> Any:
    """(how many parts the pair of a block's part has, which of them it is, the place of the pair's first one among partial
    results).

    Places of different pairs are different: pairs in several blocks begin in different ones, and the number of the pair keeps
    them apart where one ends in the block in which the next begins. All are below `places`.
    """
    if split.fixed:
        return part.last - part.first, part.begin - part.first, part.first
    first, count = owners(units, blocks, part.first, part.last, split.fewer)
    return count, block - first, first + part.pair


def places(pairs: int, max_tokens: int, blocks: int, split: Split) -> int:
    """Places for partial results of a batch: pairs of sequences and kv heads, sequences of up to max_tokens."""
    return pairs * units_of(max_tokens, split.unit) if split.fixed else pairs + blocks


def with_whole_pairs(blocks: int, pairs: int, least: float = 0.95) -> int:
    """A few blocks less where each of them then has whole pairs, or each pair has blocks of its own, if sequences are as long:
    short rests are better not cut. least: the share of the blocks that is to be left."""
    each = -(-pairs // blocks)
    whole = blocks // pairs * pairs if pairs < blocks else pairs // each if pairs % each == 0 else 0
    return whole if whole > least * blocks else blocks


def fewer_blocks(
    pairs: int, blocks: int, unit_us: float, together: int, round_us: float
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """`Split.fewer` of a batch with several blocks for each pair: half as many, half of these and so on, where the rounds of
    merging that are saved take longer than what is read later.

    unit_us: of reading a unit. together: parts that are merged in a round of `round_us`.
    """
    counts = [blocks // pairs]
    while counts[-1] > together:
        counts.append(max(counts[-1] // 2, together))
    rounds = [-(-count // together) for count in counts]

    def below(number: int) -> float:
        """Units of a pair with fewer than which this count is faster than all larger ones."""
        return min(
            round_us * (rounds[i] - rounds[number]) / (1 / counts[number] - 1 / counts[i]) / unit_us for i in range(number)
        )  # fmt: skip

    return tuple((math.ceil(below(number) * pairs), counts[number] * pairs) for number in range(1, len(counts)))


def each_part(
    lengths: Any, kv_heads: Any, start: Any, begin: Any, end: Any, split: Split, work: Callable[[Part], None]
) -> None:
    """`work(part)` for units begin to end of a batch, in order.

    lengths: of all sequences. start: (the sequence that has unit `begin`, the first unit of that sequence).
    """
    sequence, first = start
    unit = begin
    length, count, behind, stop = 0, 0, 0, 0
    head, pair, of_pair, until, token, end_token = 0, 0, 0, 0, 0, 0  # variables: computed once, not at each use
    while unit < end:
        length = max(lengths[sequence], 0)
        passed = passed_of(length, split)
        length -= passed
        count = units_of(length, split.unit)
        behind = first + count * kv_heads
        stop = min(behind, end)
        while unit < stop:
            head = max(unit - first, 0) // count
            pair = sequence * kv_heads + head
            of_pair = first + head * count
            until = unit + 1 if split.fixed else min(of_pair + count, stop)
            token = max(unit - of_pair, 0) * split.unit
            end_token = min((until - of_pair) * split.unit, length)
            work(Part(sequence, head, pair, length, passed, of_pair, of_pair + count, unit, until, token, end_token))
            unit = until
        first = behind
        sequence = sequence + 1


def find_share(lengths: Any, kv_heads: Any, split: Split, warps: int, blocks: int, block: Any) -> Any:
    """(units of the batch, first unit of a block, first unit behind it, (sequence of its first unit, first unit of that)).

    Every warp of the block finds them by itself: prefix sums over LENGTHS sequences at a time, mostly once.
    """
    ends = tilus.cumsum(_units(lengths, 0, split, warps)) * kv_heads
    count = tilus.item(tilus.max(ends))
    behind = count
    for at in tilus.range(LENGTHS, lengths.shape[0], LENGTHS):
        behind = behind + tilus.item(tilus.sum(_units(lengths, at, split, warps))) * kv_heads
    units = max(behind, 1)
    begin, end = share(units, blocks, block, split.fewer), share(units, blocks, block + 1, split.fewer)
    sequence, first = _passed(ends, begin, 0, lengths)
    for at in tilus.range(LENGTHS, lengths.shape[0], LENGTHS):
        ends = count + tilus.cumsum(_units(lengths, at, split, warps)) * kv_heads
        more, last = _passed(ends, begin, at, lengths)
        sequence, first = sequence + more, max(first, last)
        count = tilus.item(tilus.max(ends))
    return units, begin, end, (sequence, first)


def find_units(lengths: Any, kv_heads: Any, split: Split, warps: int, sequence: Any) -> Any:
    """(units of the batch, the first one of a sequence, units of each of its pairs). Every warp finds them by itself."""
    behind, before = 0, 0
    for at in tilus.range(0, lengths.shape[0], LENGTHS):
        units = _units(lengths, at, split, warps)
        behind = behind + tilus.item(tilus.sum(units))
        before = before + tilus.item(tilus.sum(tilus.where(tilus.arange(LENGTHS, start=at) < sequence, units, 0)))
    length = max(lengths[sequence], 0)
    return behind * kv_heads, before * kv_heads, units_of(length - passed_of(length, split), split.unit)


def _passed(ends: Any, begin: Any, at: Any, lengths: Any) -> Any:
    """How many sequences end at or before a unit, and where the last of them ends. ends: behind each of LENGTHS of them."""
    passed = (ends <= begin) & (tilus.arange(LENGTHS, start=at) < lengths.shape[0])
    return tilus.item(tilus.sum(passed.to(int32))), tilus.item(tilus.max(tilus.where(passed, ends, 0)))


def _units(lengths: Any, at: Any, split: Split, warps: int) -> Any:
    """Of LENGTHS sequences; none of those behind the last one."""
    lanes = replicated(warps, 1) * spatial(32).local(LENGTHS // 32)
    cached = tilus.load(lengths, [at], [LENGTHS], layout=lanes)
    if split.recent is not None:
        cached = cached - tilus.maximum(cached - split.recent, 0) // split.page_size * split.page_size
    inside = tilus.arange(LENGTHS, start=at) < lengths.shape[0]
    return tilus.where(inside, tilus.maximum((cached + (split.unit - 1)) // split.unit, 1), 0)
