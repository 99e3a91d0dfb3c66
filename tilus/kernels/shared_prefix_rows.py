"""Attention of all sequences of a group over the pages that they share: products of warpgroups, as in prefill.

128 rows, query heads of one kv head and queries of neighbouring sequences, see all tokens of their part of the prefix. Results
are partial: softmax-weighted sums and logarithms, which the kernel that decodes the rest adds up.

Budget: as that of `paged_prefill`, 2048 cycles for 128 rows by 128 tokens; those are 64 KB, which take a multiprocessor of an
H100 4600 cycles to read. So a group of two sequences already costs less here than two reads, and 64 queries of a group of 4
heads are two row tiles a kv head, of which the second reads the L2 cache.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.kernels.attention_variant import NO_VARIANT
from tilus.kernels.paged_prefill_softmax import Kind, Rows, Turns
from tilus.kernels.paged_prefill_stages import Memory
from tilus.kernels.shared_prefix_groups import each_shared_tile

CONSUMERS, PRODUCERS = 8, 4  # warps


class SharedRows(Rows):
    """64 rows of a row tile, whose results are partial ones."""

    def store(self, tile: Any) -> None:
        """Of a `SharedTile`: the weighted mean of the values, and log2 of the sum of weights: there always is a key."""
        where, rows = [self.first_token, self.first_head(tile)], [self.per_half, self.tokens]
        result = (self.acc * tilus.rcp(self.total)).reshape([*rows, self.acc.shape[1]])
        tilus.store(tilus.narrow(self.out[tile.place], 0, 0, tile.queries), [*where, 0], result, dims=[1, 0, 2])
        log2 = (tilus.log2(self.total) + self.highest * self.unit).reshape(rows)
        tilus.store(tilus.narrow(self.lse[tile.place], 0, 0, tile.queries), where, log2, dims=[1, 0])


@tilus.kernel
def shared_prefix_kernel(
    q: Tensor["dtype", "tokens", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["dtype", "pages", 2, "page_size", "kv_heads", "head_dim"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    shared: Tensor[int32, 6, "sequences"],
    partial_out: Tensor[f32, "places", "row_tokens", "heads", "head_dim"],
    partial_lse: Tensor[f32, "places", "row_tokens", "heads"],
    scale_log2: float,
    *,
    q_len: Const,
    group: Const,
    head_dim: Const,
    page_size: Const,
    split: Const,
    plan: Const,
):
    """q: q_len tokens of each sequence. shared: what `shared_prefix_groups` found. places: as `places` says.

    The next kernel may start once all earlier ones have ended: it relies on that.
    """
    tilus.grid(split.blocks, warps=CONSUMERS + PRODUCERS)
    kv_heads = q.shape[1]
    memory = Memory(q.dtype, head_dim, plan)
    tilus.wait_dependencies()
    tilus.launch_dependents()

    with tilus.warps(CONSUMERS, PRODUCERS, registers=plan.registers_to_copy):
        filling = memory.stages()

        def fill(index, tile):
            filling.fill_queries(q, tile, index, plan.heads)
            pages = tilus.narrow(
                block_tables[tile.sequence], 0, tile.token // page_size, tilus.cdiv(tile.length, page_size)
            )
            filling.fill(kv_cache, pages, tile)

        each_shared_tile(shared, kv_heads, q_len, split, plan.kv_tile, PRODUCERS, fill)

    for half in range(2):
        with tilus.warps(4 * half, 4, registers=plan.registers):
            kind = Kind(plan.heads, False, NO_VARIANT)
            rows = SharedRows(
                memory.stages(), Turns(memory.turns, half), (partial_out, partial_lse), scale_log2, kind, None, None
            )
            each_shared_tile(shared, kv_heads, q_len, split, plan.kv_tile, 4, rows.compute)
