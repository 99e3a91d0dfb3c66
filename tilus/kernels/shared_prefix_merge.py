"""What `shared_prefix_kernel` found of each sequence, added up: of its own tokens and of the prefix that it shares.

A block has the rows of a sequence and kv head. Where their partial results are takes prefix sums and divisions: a warp of the
kernel in front finds that out, which has nothing else to do.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.kernels.paged_decode_columns import Columns
from tilus.kernels.paged_decode_split import Split, find_pair, parts_of
from tilus.kernels.shared_prefix_groups import LENGTH, MEMBER, prefix_results

WARPS = 4
MERGED_REGISTERS = 32  # of a thread, for partial results that are loaded together
# Of each pair, rows of a tensor:
OWN = 0  # the place of the first partial result of its own tokens
OF_OWN = 1  # how many there are
PREFIX = 2  # the same for its prefix
OF_PREFIX = 3
NOTES = 4


def note_places(notes: Any, shared: Any, kv_heads: Any, unit: int, split: Split, blocks: int) -> None:
    """By a warp: where partial results are, of the pairs that are this block's turn."""
    for pair in tilus.range(tilus.block_id(0), notes.shape[1], blocks):
        sequence, head = pair // kv_heads, pair % kv_heads
        units, whole = find_pair(shared[LENGTH], kv_heads, split, 1, sequence, head)
        of_own, _, own = parts_of(whole, units, blocks, split)
        of_prefix, prefix, _ = prefix_results(shared, sequence, head, kv_heads, unit, blocks)
        for row, value in ((OWN, own), (OF_OWN, of_own), (PREFIX, prefix), (OF_PREFIX, of_prefix)):
            tilus.store(notes, [row, pair], tilus.full([1, 1], value, int32))


@tilus.kernel
def shared_prefix_merge_kernel(
    shared: Tensor[int32, 6, "sequences"],
    notes: Tensor[int32, 4, "pairs"],
    prefix_out: Tensor[f32, "prefix_places", "row_tokens", "heads", "head_dim"],
    prefix_lse: Tensor[f32, "prefix_places", "row_tokens", "heads"],
    own_out: Tensor[f32, "places", "q_len", "group", "head_dim"],
    own_lse: Tensor[f32, "places", "q_len", "group"],
    out: Tensor["dtype", "sequences", "q_len", "kv_heads", "group", "head_dim"],
    lse: Tensor[f32, "sequences", "q_len", "kv_heads", "group"] = None,
    *,
    q_len: Const,
    group: Const,
    head_dim: Const,
):
    """notes: of `note_places`. The kernel in front lets this one start when all in front of itself have ended, so that `shared`
    is constant."""
    kv_heads = out.shape[2]
    tilus.grid(out.shape[0] * kv_heads, warps=WARPS)
    tilus.launch_dependents()
    pair = tilus.block_id(0)
    sequence, head = pair // kv_heads, pair % kv_heads
    first_query = shared[MEMBER, sequence] * q_len
    tilus.wait_dependencies(constant=[shared])
    of_own, of_prefix = notes[OF_OWN, pair], notes[OF_PREFIX, pair]
    own = [tilus.narrow(t, 0, notes[OWN, pair], of_own) for t in (own_out, own_lse)]
    prefix = [tilus.narrow(t, 1, first_query, q_len) for t in (prefix_out, prefix_lse)]
    prefix = [tilus.narrow(t, 0, notes[PREFIX, pair], of_prefix) for t in prefix]
    columns = Columns(q_len, group, head_dim, WARPS, 1)
    columns.merge([(*own, of_own), (*prefix, of_prefix)], out, lse, sequence, head, MERGED_REGISTERS)
