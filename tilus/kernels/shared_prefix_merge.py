"""What `shared_prefix_kernel` found of each sequence, added up: of its own tokens and of the prefix that it shares.

A block has the rows of a sequence and kv head. What there is to add, and where, it computes while the kernel in front still runs.
"""

from __future__ import annotations

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.kernels.paged_decode_columns import Columns
from tilus.kernels.paged_decode_split import find_pair, parts_of
from tilus.kernels.shared_prefix_groups import LENGTH, prefix_results

WARPS = 4
MERGED_REGISTERS = 32  # of a thread, for partial results that are loaded together


@tilus.kernel
def shared_prefix_merge_kernel(
    shared: Tensor[int32, 6, "sequences"],
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
    blocks: Const,
    unit: Const,
    split: Const,
):
    """blocks, unit, split: of the kernel in front. That lets this one start when all in front of itself have ended, so that
    `shared` is constant."""
    kv_heads = out.shape[2]
    tilus.grid(out.shape[0] * kv_heads, warps=WARPS)
    tilus.launch_dependents()
    sequence, head = tilus.block_id(0) // kv_heads, tilus.block_id(0) % kv_heads
    units, pair = find_pair(shared[LENGTH], kv_heads, split, WARPS, sequence, head)
    of_own, _, place = parts_of(pair, units, blocks, split)
    of_prefix, first, member = prefix_results(shared, sequence, head, kv_heads, unit, blocks)
    tilus.wait_dependencies(constant=[shared])
    own = [tilus.narrow(t, 0, place, of_own) for t in (own_out, own_lse)]
    prefix = [
        tilus.narrow(tilus.narrow(t, 1, member * q_len, q_len), 0, first, of_prefix) for t in (prefix_out, prefix_lse)
    ]
    columns = Columns(q_len, group, head_dim, WARPS, 1)
    columns.merge([(own[0], own[1], of_own), (prefix[0], prefix[1], of_prefix)], out, lse, pair, MERGED_REGISTERS)
