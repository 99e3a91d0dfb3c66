"""The division of a batch among blocks: nothing is lost, nothing is done twice, and nobody has more to do than others."""

from __future__ import annotations

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
    Part,
    Split,
    each_part,
    find_share,
    owner,
    parts_of,
    places,
    share,
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


def parts_by_block(lengths: Sequence[int], kv_heads: int, blocks: int, split: Split) -> list[list[Part]]:
    firsts = first_units(lengths, kv_heads, split.unit)
    units, result = firsts[-1], list[list[Part]]()
    for block in range(blocks):
        begin, end = share(units, blocks, block), share(units, blocks, block + 1)
        sequence = next((s for s in range(len(lengths)) if firsts[s + 1] > begin), 0)
        found = list[Part]()
        each_part(lengths, kv_heads, (sequence, firsts[sequence]), begin, end, split, found.append)
        result.append(found)
    return result


def check_batch(lengths: list[int], kv_heads: int, unit: int, blocks: int, fixed: bool) -> None:
    split = Split(unit, fixed)
    by_block = parts_by_block(lengths, kv_heads, blocks, split)
    tokens_of: dict[tuple[int, int], list[range]] = {}
    seen_parts: dict[int, list[tuple[int, int, int]]] = {}
    units = first_units(lengths, kv_heads, unit)[-1]
    for number, block in enumerate(by_block):
        for part in block:
            assert (part.pair, part.length) == (part.sequence * kv_heads + part.head, lengths[part.sequence])
            assert part.token == (part.begin - part.first) * unit
            tokens_of.setdefault((part.sequence, part.head), []).append(range(part.token, part.end_token))
            seen_parts.setdefault(part.pair, []).append(parts_of(part, units, blocks, split))
            assert owner(units, blocks, part.begin) == owner(units, blocks, part.end - 1) == number
            assert part.first <= part.begin < part.end <= part.last
    # Every token of every head is in one part.
    assert sorted(tokens_of) == [(s, h) for s in range(len(lengths)) for h in range(kv_heads)]
    for (sequence, _), ranges in tokens_of.items():
        assert [t for r in ranges for t in (r.start, r.stop)][1:-1:2] == [r.start for r in ranges][1:]
        assert (ranges[0].start, ranges[-1].stop) == (0, lengths[sequence])
    # No block has more than one unit beyond the mean.
    work = [sum(part.end - part.begin for part in block) for block in by_block]
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


@given(st.integers(1, 400), st.integers(1, 50))
def test_owner_is_the_inverse_of_share(units: int, blocks: int) -> None:
    runs = [range(share(units, blocks, block), share(units, blocks, block + 1)) for block in range(blocks)]
    assert [owner(units, blocks, unit) for unit in range(units)] == [b for b, run in enumerate(runs) for _ in run]


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
