"""The division of a ragged batch: every row is computed once, and visits exactly the tiles of the cache that it needs."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilus
from tilus import Const, Tensor, int32
from tilus.kernels.attention import find_queries
from tilus.kernels.paged_prefill import likely_tiles
from tilus.kernels.paged_prefill_split import MOST_SPLITS, PART_STEPS, splits_of
from tilus.kernels.paged_prefill_tiles import Visits, number, slack_of, slots, steps_of, tokens_of, visited

KV_TILE = 128


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(-20, 400)), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4, 8, 16]), st.booleans(), st.integers(1, 7), st.integers(1, 500), st.booleans(),
)  # fmt: skip
def test_pairs_of_rows_and_cached_tiles(
    lengths: list[tuple[int, int]], heads: int, causal: bool, blocks: int, window: int, tight: bool
) -> None:
    """Of one head: the numbers of all blocks are all slots; slots are all queries; tiles of the cache are those that some query
    of a slot sees, unmasked ones those that each of them sees whole."""
    tokens = tokens_of(heads)
    cached = [max(0, queries + past) for queries, past in lengths]
    starts = [0, *accumulate(queries for queries, _ in lengths)]
    slack = max(-queries % tokens for queries, _ in lengths) if tight else tokens - 1
    count = slots(starts[-1], len(lengths), tokens, slack)
    assert count <= slots(starts[-1], len(lengths), tokens)
    turns = -(-count // blocks)
    numbers = Counter(number(turn, block, blocks) for turn in range(turns) for block in range(blocks))
    assert set(numbers.values()) <= {1} and set(range(count)) <= set(numbers)
    computed: Counter[int] = Counter()
    for slot in range(count):
        sequence, first = find_queries(starts, len(lengths), tokens, slot, slack)
        queries = range(first, min(first + tokens, lengths[sequence][0]))
        computed.update(starts[sequence] + query for query in queries)
        length = cached[sequence]
        limit = length - lengths[sequence][0] + first + 1
        unmasked, end, steps = visited(limit, length, Visits(heads, KV_TILE, causal))
        assert steps == end
        sees = [max(0, length - lengths[sequence][0] + query + 1) if causal else length for query in queries]
        if sees:
            if causal:
                check_window(sees, visited(limit, length, Visits(heads, KV_TILE, True, True, window)), window, end)
            assert 0 <= unmasked <= steps
            assert unmasked == min(sees) // KV_TILE
            assert -(-max(sees) // KV_TILE) <= steps <= -(-length // KV_TILE)
            if len(queries) == tokens:
                assert steps == -(-max(sees) // KV_TILE)
    assert computed == Counter(range(starts[-1]))


def check_window(sees: list[int], found: tuple[int, int, int], window: int, end: int) -> None:
    """Of queries that see so many keys without a window: what they see is in the visited tiles, and so is the first of them."""
    unmasked, same_end, steps = found
    assert unmasked == 0 and same_end == end and 0 <= steps <= end
    first = max(min(sees) - window, 0)
    assert end - steps == first // KV_TILE


def test_the_first_tile_of_a_window() -> None:
    """Is that of the first key that the first query sees, for all windows and numbers of keys."""
    for limit in range(1, 3 * KV_TILE):
        for window in range(1, 2 * KV_TILE + 2):
            _, end, steps = visited(limit, 4 * KV_TILE, Visits(16, KV_TILE, True, True, window))
            first_key = next(key for key in (0, limit - window) if key > limit - 1 - window)
            assert end - steps == first_key // KV_TILE


@given(st.integers(0, 5000), st.integers(1, MOST_SPLITS))
def test_parts_of_a_tile_are_all_of_its_steps(steps: int, parts: int) -> None:
    """Each step once, in order, and as many in each part as in any other, but for one."""
    found = [range(*steps_of(part, parts, steps)) for part in range(parts)]
    assert [step for part in found for step in part] == list(range(steps))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@given(st.integers(1, 400), st.integers(1, 150), st.integers(1, 300))
def test_more_parts_only_where_they_gain(tiles: int, num_sms: int, steps: int) -> None:
    """The steps of the busiest block, which takes parts in turns: parts save a tenth of it or there are none, and other numbers
    of parts are not a tenth better. None in batches of many tiles."""

    def busiest(splits: int) -> float:
        each = Counter(part % num_sms for part in range(tiles * splits))
        return max(each.values()) * (steps / splits + (PART_STEPS if splits > 1 else 0))

    splits = splits_of(tiles, num_sms, steps)
    assert splits == 1 or (tiles <= 2 * num_sms and busiest(splits) <= 0.9 * tiles_in_turns(tiles, num_sms) * steps)
    if tiles <= 2 * num_sms:
        assert all(busiest(other) >= 0.9 * busiest(splits) * (1 - 1e-9) for other in range(1, MOST_SPLITS + 1))


def tiles_in_turns(tiles: int, num_sms: int) -> int:
    """What the busiest block has."""
    return len(range(0, tiles, num_sms))


@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, 4, 16]), st.integers(1, 8), st.integers(1, 16))
def test_likely_tiles_are_those_of_equal_sequences(
    sequences: int, queries: int, heads: int, kv_heads: int, group: int
) -> None:
    tiles = [(s, first, head, h)
             for s in range(sequences) for first in range(0, queries, tokens_of(heads))
             for head in range(kv_heads) for h in range(0, group, heads)]  # fmt: skip
    assert likely_tiles(sequences * queries, sequences, kv_heads, group, heads) == len(tiles)


@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from([8, 32, 128]))
def test_no_slot_stays_empty_where_lengths_are_equal(queries: int, sequences: int, tokens: int) -> None:
    assert slots(queries * sequences, sequences, tokens, -queries % tokens) == sequences * -(-queries // tokens)


@tilus.kernel
def slack_kernel(q_start: Tensor[int32, "sequences_plus_1"], found: Tensor[int32, 1], *, tokens: Const):
    tilus.grid(1, warps=8)
    tilus.store(found, [0], tilus.full([1], slack_of(q_start, tokens, 8), int32))


@pytest.mark.parametrize(
    "lengths", [[], [0], [5, 0, 64], [8] * 300, [64] * 128 + [63], [8, *[16] * 200, 1], [3, *[8] * 200]], ids=len
)
def test_what_the_last_tiles_lack(lengths: list[int]) -> None:
    """Of any number of sequences, which a warp looks at some at a time."""
    starts, found = np.cumsum([0, *lengths], dtype=np.int32), np.zeros(1, np.int32)
    slack_kernel.on("reference")(starts, found, tokens=8)
    assert found[0] == max((-length % 8 for length in lengths), default=0)


@given(st.integers(0, 5000), st.integers(1, 40), st.sampled_from([8, 32, 128]))
def test_slots_are_not_many_more_than_needed(queries: int, sequences: int, tokens: int) -> None:
    assert slots(queries, sequences, tokens) <= queries // tokens + sequences
