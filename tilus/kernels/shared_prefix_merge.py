"""What `shared_prefix_kernel` found of each sequence, added up: of its own tokens and of the prefix that it shares.

A block has the rows of a rank (see `shared_prefix_groups`) and kv head. Where their partial results are takes prefix sums and
divisions: a warp of the kernel in front finds that out, which has little else to do.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.kernels.paged_decode_columns import Columns
from tilus.kernels.paged_decode_split import Split, find_units, owners
from tilus.kernels.shared_prefix_groups import LENGTH, MEMBER, ORDER, prefix_results
from tilus.kernels.vectors import power_of_two

WARPS = 4
OWN_REGISTERS, PREFIX_REGISTERS = 8, 32  # of a thread, for partial results that are loaded together
# Of each pair of a rank and a kv head, rows of a tensor:
OWN = 0  # the place of the first partial result of its own tokens; behind it how many there are
PREFIX = 2  # the same for its prefix
NOTES = 4


def note_places(notes: Any, shared: Any, kv_heads: Any, unit: int, split: Split, blocks: Any) -> None:
    """By a warp: where partial results are, of the ranks that are this block's turn."""
    rank = tilus.block_id(0)
    while rank < shared.shape[1]:
        units, first, count = find_units(shared[LENGTH], kv_heads, split, 1, rank)
        # Each kind by itself: both together take more registers than warps that copy have.
        for head in tilus.range(kv_heads):
            begin = first + head * count
            block, of_own = owners(units, blocks, begin, begin + count)
            note(notes, OWN, rank * kv_heads + head, block + rank * kv_heads + head, of_own)
        for head in tilus.range(kv_heads):
            of_prefix, place = prefix_results(shared, rank, head, kv_heads, unit, blocks)
            note(notes, PREFIX, rank * kv_heads + head, place, of_prefix)
        rank += blocks


def note(notes: Any, kind: int, pair: Any, place: Any, count: Any) -> None:
    """Of a pair: where the first partial result of a kind is, and how many there are."""
    tilus.store(notes, [kind, pair], tilus.full([1, 1], place, int32))
    tilus.store(notes, [kind + 1, pair], tilus.full([1, 1], count, int32))


@tilus.kernel(varying=("sequences", "pairs", "prefix_places", "places"))
def shared_prefix_merge_kernel(
    shared: Tensor[int32, 7, "sequences"],
    notes: Tensor[int32, 4, "pairs"],
    prefix_out: Tensor[f32, "prefix_places", "row_tokens", "heads", "head_dim"],
    prefix_lse: Tensor[f32, "prefix_places", "row_tokens", "heads"],
    own_out: Tensor[f32, "places", "q_len", "group", "head_dim"],
    own_lse: Tensor[f32, "places", "q_len", "group"],
    out: Tensor["dtype", "sequences", "q_len", "kv_heads", "group", "head_dim"],
    lse: Tensor[f32, "sequences", "q_len", "kv_heads", "group"] = None,
    *,
    q_len: Const,
    kv_heads: Const,
    group: Const,
    head_dim: Const,
    heads: Const,
    row_tokens: Const,
):
    """heads: `row_heads` of the group. row_tokens: 128 / heads. notes: of `note_places`.

    The kernel in front lets this one start when all in front of itself have ended, so that `shared` is constant.
    """
    tilus.grid(out.shape[0] * kv_heads, warps=WARPS)
    tilus.launch_dependents()
    pair = tilus.block_id(0)
    rank, head = pair // kv_heads, pair % kv_heads
    sequence, first_query = shared[ORDER, rank], shared[MEMBER, rank] * power_of_two(q_len)
    tilus.wait_dependencies(constant=[shared])
    of_own, of_prefix = notes[OWN + 1, pair], notes[PREFIX + 1, pair]
    own = [tilus.narrow(t, 0, notes[OWN, pair], of_own) for t in (own_out, own_lse)]
    prefix = [tilus.narrow(t, 1, first_query, q_len) for t in (prefix_out, prefix_lse)]
    prefix = [tilus.narrow(t, 0, notes[PREFIX, pair], of_prefix) for t in prefix]
    columns = Columns(q_len, group, head_dim, WARPS, 1)
    partials = [(*own, of_own, OWN_REGISTERS), (*prefix, of_prefix, PREFIX_REGISTERS)]
    columns.merge(partials, out, lse, sequence, head)
