"""The division of a batch among blocks: nothing is lost, nothing is done twice, and nobody has more to do than others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilus
from tilus import Const, Tensor, int32
from tilus.kernels.paged_decode_split import (
    FINE_UNITS,
    MOST_BLOCKS,
    Part,
    Split,
    each_part,
    fewer_blocks,
    find_share,
    owner,
    parts_of,
    places,
    share,
    sharing,
    with_whole_pairs,
)

Array = npt.NDArray[Any]
BATCHES = 1000


def random_batch(rng: np.random.Generator) -> tuple[list[int], int, int, int]:
    """Lengths, kv heads, tokens of a unit, blocks. Every third batch has few very long sequences and many short ones."""
    count = int(rng.integers(1, 40))
    lengths = rng.integers(0, 3000, count)
    if rng.integers(3) == 0:
        lengths = np.minimum(65536, (200 / rng.random(count) ** 1.5).astype(int))
    return lengths.tolist(), int(rng.choice([1, 2, 3, 8])), int(rng.choice([16, 64, 128])), int(rng.integers(1, 265))


def first_units(lengths: Sequence[int], kv_heads: int, unit: int) -> list[int]:
    """Of every sequence, and behind the last one."""
    return [0, *np.cumsum([max(1, -(-n // unit)) * kv_heads for n in lengths]).tolist()]


def parts_by_block(
    lengths: Sequence[int], kv_heads: int, blocks: int, split: Split, counted: Sequence[int] | None = None
) -> list[list[Part]]:
    """counted: of each sequence the tokens that count; all by default."""
    firsts = first_units(counted or lengths, kv_heads, split.unit)
    units, result = firsts[-1], list[list[Part]]()
    for block in range(blocks):
        begin, end = share(units, blocks, block, split.fewer), share(units, blocks, block + 1, split.fewer)
        sequence = next((s for s in range(len(lengths)) if firsts[s + 1] > begin), 0)
        found = list[Part]()
        each_part(lengths, kv_heads, (sequence, firsts[sequence]), begin, end, split, found.append)
        result.append(found)
    return result


def read_pages(part: Part, page_size: int) -> range:
    """Places in the sequence's block table whose pages a part reads from."""
    return range((part.passed + part.token) // page_size, -(-(part.passed + part.end_token) // page_size))


def check_pages(
    by_block: list[list[Part]], lengths: list[int], kv_heads: int, page_size: int, recent: int | None
) -> None:
    """Each page of each head is read once, those wholly in front of the last `recent` tokens not at all."""
    read = Counter(
        (part.sequence, part.head, page) for block in by_block for part in block for page in read_pages(part, page_size)
        if part.end_token > part.token
    )  # fmt: skip
    first = [0 if recent is None else max(0, length - recent) // page_size for length in lengths]
    assert read == Counter(
        (sequence, head, page)
        for sequence, length in enumerate(lengths)
        for head in range(kv_heads)
        for page in range(first[sequence], -(-length // page_size))
    )


def check_balance(by_block: list[list[Part]], blocks: int, unit: int) -> None:
    """No block has more units than the mean by more than 5 % and one, which may be a sequence's last and not full."""
    work = [sum((part.end - part.begin) * unit for part in block) for block in by_block]
    assert max(work) <= 1.05 * sum(work) / blocks + unit


def check_batch(
    lengths: list[int], kv_heads: int, unit: int, blocks: int, fixed: bool, fewer: tuple[tuple[int, int], ...] = ()
) -> None:
    split = Split(unit, fixed, fewer=fewer)
    by_block = parts_by_block(lengths, kv_heads, blocks, split)
    tokens_of: dict[tuple[int, int], list[range]] = {}
    seen_parts: dict[int, list[tuple[int, int, int]]] = {}
    units = first_units(lengths, kv_heads, unit)[-1]
    taking = sharing(units, blocks, split.fewer)
    for number, block in enumerate(by_block):
        for part in block:
            assert (part.pair, part.length) == (part.sequence * kv_heads + part.head, lengths[part.sequence])
            assert part.token == (part.begin - part.first) * unit
            tokens_of.setdefault((part.sequence, part.head), []).append(range(part.token, part.end_token))
            seen_parts.setdefault(part.pair, []).append(parts_of(part, units, blocks, split, number))
            assert {owner(units, blocks, unit, split.fewer) for unit in (part.begin, part.end - 1)} == {number}
            assert part.first <= part.begin < part.end <= part.last
    # Every token of every head is in one part.
    assert sorted(tokens_of) == [(s, h) for s in range(len(lengths)) for h in range(kv_heads)]
    for (sequence, _), ranges in tokens_of.items():
        assert [t for r in ranges for t in (r.start, r.stop)][1:-1:2] == [r.start for r in ranges][1:]
        assert (ranges[0].start, ranges[-1].stop) == (0, lengths[sequence])
    # No block has more than one unit beyond the mean of those that have some.
    work = [sum(part.end - part.begin for part in block) for block in by_block[: min(taking, units)]]
    assert sum(work) == units and max(work) - min(work) <= 1
    # Parts know how many there are and in which order, and all have places of their own.
    taken: list[int] = []
    for parts in seen_parts.values():
        assert {(count, first) for count, _, first in parts} == {(len(parts), parts[0][2])}
        assert [index for _, index, _ in parts] == list(range(len(parts)))
        if len(parts) > 1:
            taken += [first + index for _, index, first in parts]
    assert len(set(taken)) == len(taken)
    bound = places(len(lengths) * kv_heads, max(lengths), blocks, split)
    assert all(0 <= place < bound for place in taken)


@pytest.mark.parametrize("fixed", [False, True])
def test_random_batches(fixed: bool) -> None:
    """Nothing is lost and nobody has more than one unit more than others, which is 5 % once a block has 20 units."""
    rng = np.random.default_rng(int(fixed))
    for _ in range(BATCHES // 20 if fixed else BATCHES):
        check_batch(*random_batch(rng), fixed)


@pytest.mark.parametrize(
    "batch", [([0], 1, 64, 1), ([0, 0, 0], 2, 64, 132), ([1], 1, 64, 7), ([65536], 1, 64, 132), ([64] * 9, 8, 64, 5)]
)
def test_edges(batch: tuple[list[int], int, int, int]) -> None:
    check_batch(*batch, fixed=False)
    check_batch(*batch, fixed=True)


def test_pages_of_random_batches() -> None:
    """Units within a page or of whole pages, as the kernel has them; with a window and without."""
    rng = np.random.default_rng(7)
    for number in range(BATCHES):
        lengths, kv_heads, _, blocks = random_batch(rng)
        page_size, recent = int(rng.choice([16, 32, 64, 128, 256])), None if number % 2 else int(rng.integers(1, 2000))
        split = Split(min(int(rng.choice([64, 128])), page_size), False, recent, 1 if recent is None else page_size)
        counted = [n if recent is None else n - max(0, n - recent) // page_size * page_size for n in lengths]
        by_block = parts_by_block(lengths, kv_heads, blocks, split, counted)
        if split.unit == page_size:
            check_pages(by_block, lengths, kv_heads, page_size, recent)
        check_balance(by_block, blocks, split.unit)
        tokens = sum(part.end_token - part.token for block in by_block for part in block)
        assert tokens == sum(counted) * kv_heads


@given(st.integers(0, 400), st.integers(1, 50))
def test_owner_is_the_inverse_of_share(units: int, blocks: int) -> None:
    runs = [range(share(units, blocks, block), share(units, blocks, block + 1)) for block in range(blocks)]
    assert [owner(units, blocks, unit) for unit in range(units)] == [b for b, run in enumerate(runs) for _ in run]


@given(st.data(), st.integers(1, MOST_BLOCKS))
def test_no_number_overflows(data: st.DataObject, blocks: int) -> None:
    """numpy warns, which is an error here, where a product of 32 bits does not fit."""
    units = data.draw(st.integers(1, 2**31 - 1) | st.integers(-2, 2).map(lambda off: FINE_UNITS + off))
    edges = [
        share(units, blocks, block)
        for block in (data.draw(st.integers(0, min(units, blocks) - 1)), min(units, blocks) - 1)
    ]
    for unit in (data.draw(st.integers(0, units - 1)), *edges, *(edge - 1 for edge in edges if edge > 0)):
        block = owner(np.int32(units), np.int32(blocks), np.int32(unit))
        first, behind = (share(np.int32(units), np.int32(blocks), block + np.int32(more)) for more in (0, 1))
        assert first <= unit < behind


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 12), st.booleans())
def test_blocks_begin_with_equal_pairs(pairs: int, length: int, times: int, several: bool) -> None:
    """Several blocks for each pair, or pairs for each block: none has the end of one and the beginning of another."""
    blocks = pairs * times if several else pairs
    for block in parts_by_block([length] * (1 if several else times), pairs, blocks, Split(16)):
        assert len({part.pair for part in block}) <= (1 if several else times)
        assert several or all((part.begin, part.end) == (part.first, part.last) for part in block)


@given(st.integers(1, 12), st.integers(2, 66), st.integers(1, 16), st.floats(0.05, 1), st.floats(0.2, 2))
def test_fewer_blocks_are_faster(pairs: int, parts: int, together: int, unit_us: float, round_us: float) -> None:
    """By the model that they follow never slower than all blocks, and halves of them, or few enough for one round."""
    fewer = fewer_blocks(pairs, pairs * parts, unit_us, together, round_us)

    def us(units: int, count: int) -> float:
        return unit_us * units / count + round_us * -(-count // pairs // together)

    for units in (pairs * parts, 1000 * pairs, 20000 * pairs, *(below - 1 for below, _ in fewer)):
        count = sharing(units, pairs * parts, fewer)
        assert count == pairs * parts or us(units, count) <= us(units, pairs * parts) * (1 + 1e-9)
        assert count % pairs == 0
    assert all(few >= min(parts, together) * pairs for _, few in fewer)


def test_random_batches_with_fewer_blocks() -> None:
    rng = np.random.default_rng(3)
    for _ in range(BATCHES // 10):
        lengths, kv_heads, unit, _ = random_batch(rng)
        pairs = len(lengths) * kv_heads
        blocks = pairs * int(rng.integers(2, 40))
        fewer = fewer_blocks(pairs, blocks, 0.1, int(rng.integers(1, 9)), 1.0)
        check_batch(lengths, kv_heads, unit, min(blocks, MOST_BLOCKS), False, fewer if blocks <= MOST_BLOCKS else ())


def test_parts_of_a_sequence_depend_on_nothing_else_when_fixed() -> None:
    """Alone or in any batch, on any number of blocks: the same ranges of tokens."""
    rng = np.random.default_rng(0)

    def cuts(lengths: list[int], sequence: int, blocks: int) -> set[tuple[int, int, int]]:
        parts = [p for block in parts_by_block(lengths, 2, blocks, Split(64, fixed=True)) for p in block]
        return {(p.head, p.begin - p.first, p.end - p.first) for p in parts if p.sequence == sequence}

    for _ in range(50):
        lengths, _, _, blocks = random_batch(rng)
        chosen = int(rng.integers(len(lengths)))
        assert cuts(lengths, chosen, blocks) == cuts([lengths[chosen]], 0, int(rng.integers(1, 99)))


@pytest.mark.parametrize("device", ["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_count_what_a_window_leaves(device: str) -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 900, 150).astype(np.int32)
    found = np.zeros((6, 5), np.int32)
    starts.on(device)(lengths, found, 3, split=Split(16, False, 100, 32), blocks=6)
    counted = [n - max(0, n - 100) // 32 * 32 for n in lengths.tolist()]
    firsts = first_units(counted, 3, 16)
    assert found[0, 2] == firsts[-1] and found[:, 0].tolist() == [
        next(s for s in range(150) if firsts[s + 1] > share(firsts[-1], 6, block)) for block in range(6)
    ]


@tilus.kernel
def starts(lengths: Tensor[int32, "n"], found: Tensor[int32, "m", 5], kv_heads: int, *, split: Const, blocks: Const):
    """(sequence, its first unit, units of the batch, own first unit, behind the last) of every block, of three warps each."""
    tilus.grid(blocks, warps=3)
    block = tilus.block_id(0)
    units, begin, end, (sequence, first) = find_share(lengths, kv_heads, split, 3, blocks, block)
    for column, value in enumerate([sequence, first, units, begin, end]):
        tilus.store(found, [block, column], tilus.full([1, 1], value, int32))


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_find_where_they_begin(device: str) -> None:
    """More sequences than a warp looks at together, and lengths of all kinds."""
    rng = np.random.default_rng(1)
    for count, blocks in [(1, 3), (128, 5), (300, 7)]:
        lengths = rng.integers(0, 500, count).astype(np.int32)
        lengths[rng.integers(0, count, count // 4)] = 0
        found = np.zeros((blocks, 5), np.int32)
        starts.on(device)(lengths, found, 3, split=Split(64), blocks=blocks)
        firsts = first_units(lengths.tolist(), 3, 64)
        for block in range(blocks):
            begin = share(firsts[-1], blocks, block)
            sequence = next(s for s in range(count) if firsts[s + 1] > begin)
            behind = share(firsts[-1], blocks, block + 1)
            assert found[block].tolist() == [sequence, firsts[sequence], firsts[-1], begin, behind]


def test_short_rests_are_not_cut() -> None:
    """512 pairs for 264 blocks: two each for 256 of them, and 64 pairs: four blocks for each; where that leaves less than `least`
    of the blocks they stay."""
    assert with_whole_pairs(264, 512) == 256 and with_whole_pairs(132, 264) == 132
    assert with_whole_pairs(264, 64) == 256 and with_whole_pairs(132, 100) == 132
    assert with_whole_pairs(264, 270) == 264 and with_whole_pairs(7, 3) == 7
    assert with_whole_pairs(264, 56) == 264 and with_whole_pairs(264, 56, 0.8) == 224
