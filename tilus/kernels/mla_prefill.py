"""Multi-head latent attention of ragged queries over a paged cache of latents, on Hopper: prefill and chunks of it.

The products are those of `mla_decode`, on 128 rows of a sequence a cluster of two blocks, which bring halves of each tile of
latents for each other: with 128 heads one query token. Clusters take tiles of rows in turns, those that see the most first.
Each tile of rows reads all latents that it sees, so that at 64 rows a block the products remain the limit: 2 x 64 x 1088
operations for each 1152 bytes, half of which come from the L2 cache to this block.
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.allocate import empty, is_cuda
from tilus.kernels.attention import find_queries
from tilus.kernels.mla_attention import mla_attention
from tilus.kernels.mla_decode import MlaPlan, check_shapes, on_hopper
from tilus.kernels.mla_output import HALF, each_result
from tilus.kernels.mla_softmax import Scores
from tilus.kernels.mla_stages import (
    COPY_WARPS,
    LATENT,
    OUTPUT_WARPS,
    ROWS,
    SCORE_WARPS,
    WARPS,
    WIDTH,
    BlockMemory,
)
from tilus.kernels.online_softmax import natural
from tilus.kernels.paged_prefill_tiles import number, slots
from tilus.kernels.plan_choice import num_sms_of
from tilus.runtime.execute import place

PLAN = MlaPlan(cluster=2)


@tilus.kernel
def mla_prefill_kernel(
    q: Tensor["dtype", "rows", "width"],
    cache: Tensor["dtype", "pages", "page_size", "width"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    q_start: Tensor[int32, "sequences_plus_1"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["dtype", "rows", "latent"],
    scale_log2: float,
    teams: int32,
    lse: Tensor[f32, "rows"] = None,
    *,
    width: Const,
    latent: Const,
    heads: Const,
    page_size: Const,
    plan: Const,
):
    cluster = plan.cluster
    tilus.grid(teams * cluster, warps=WARPS, cluster=cluster)
    tilus.launch_dependents()
    memory = BlockMemory(q.dtype, width, plan)
    tilus.wait_dependencies()
    rank = tilus.cluster_rank() if cluster > 1 else 0
    if cluster > 1:
        tilus.cluster_sync()
    visits = Visits(q_start, kv_lens, heads, q.shape[0] // heads, cluster, rank, teams)

    with tilus.warps(OUTPUT_WARPS + SCORE_WARPS, COPY_WARPS, registers=plan.copy_registers):
        filling, bringing = memory.queries(), memory.ring(rank)

        def fill(sequence, row, first_row, limit, end_token, last_row):
            filling.fill(q, row)
            bringing.fill(cache, block_tables[sequence], 0, end_token, None)

        visits.each(fill)

    with tilus.warps(OUTPUT_WARPS, SCORE_WARPS, registers=plan.score_registers):
        giving = memory.exchange()
        queries, reading = memory.queries(), memory.ring(rank)
        scores = Scores(queries, reading, giving, scale_log2, heads)

        def weigh(sequence, row, first_row, limit, end_token, last_row):
            scores.attend(0, end_token, limit, first_row)
            scores.finish((row, max(min(last_row - row, ROWS), 0)))

        visits.each(weigh)
        giving.end()

    with tilus.warps(0, OUTPUT_WARPS, registers=plan.output_registers):

        def store(halves, log2, row, count):
            for index, half in enumerate(halves):
                tilus.store(tilus.narrow(out, 0, row, count), [0, index * HALF], half.to(out.dtype))
            if lse is not None:
                tilus.store(tilus.narrow(lse, 0, row, count), [0], natural(log2).reshape([ROWS]))

        each_result(memory.ring(rank), memory.exchange(), 2, store)


class Visits:
    """The tiles of rows of a cluster, and what of the cache they see. queries: of the batch."""

    def __init__(
        self, q_start: Any, kv_lens: Any, heads: int, queries: Any, cluster: int, rank: Any, teams: Any
    ) -> None:
        self.q_start, self.kv_lens, self.heads, self.queries = q_start, kv_lens, heads, queries
        self.cluster, self.rank, self.teams = cluster, rank, teams
        self.tokens = tokens_of(heads, cluster)

    def each(self, work: Any) -> None:
        """`work(sequence, row, first_row, limit, end_token, last_row)` for each.

        row, last_row: of q, the block's first one and the one behind the sequence's last. first_row: of the sequence's rows.
        limit: tokens that the sequence's first query sees. end_token: behind those that any row of the cluster sees."""
        sequences = self.kv_lens.shape[0]
        count = slots(self.queries, sequences, self.tokens)
        team = tilus.block_id(0) // self.cluster
        # Variables: computed once, not at each use.
        at, sequence, first, begin, behind, length, limit, end_token, first_row = 0, 0, 0, 0, 0, 0, 0, 0, 0
        for turn in tilus.range(tilus.cdiv(count, self.teams)):
            at = number(turn, team, self.teams)
            if at < count:
                sequence, first = find_queries(self.q_start, sequences, self.tokens, count - 1 - at)
                begin, behind = self.q_start[sequence], self.q_start[sequence + 1]
                if begin + first < behind:
                    length = self.kv_lens[sequence]
                    limit = length - (behind - begin) + 1
                    end_token = max(min(length, limit + (first + self.tokens - 1)), 0)
                    first_row = first * self.heads + self.rank * ROWS
                    work(sequence, begin * self.heads + first_row, first_row, limit, end_token, behind * self.heads)


def tokens_of(heads: int, cluster: int) -> int:
    """Query tokens of a cluster's rows."""
    return ROWS * cluster // heads


def mla_prefill(
    q: Any, cache: Any, block_tables: Any, q_start: Any, kv_lens: Any, *, scale: float, return_lse: bool = False,
    device: str | None = None,
) -> Any:  # fmt: skip
    """Multi-head latent attention of ragged queries over paged caches of latents, causal and aligned at the end.

    q: float16 or bfloat16 [M, H, 576], contiguous, the queries of all sequences one after another, with the key projection
    absorbed. q_start: int32 [S + 1], where each sequence's queries start in q. The other arguments, what is looked at, and where
    it runs are as in `mla_decode`. Any number of queries, chunks of prompts on top of what is cached among them.

    Returns: [M, H, 512]; with return_lse also float32 [M, H].
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    if q.ndim != 3 or kv_lens.ndim != 1 or tuple(q_start.shape) != (kv_lens.shape[0] + 1,):
        raise TilusError(
            f"mla_prefill: shapes q {list(q.shape)}, q_start {list(q_start.shape)} and kv_lens {list(kv_lens.shape)}, expected "
            f"[tokens, heads, {WIDTH}], [sequences + 1] and [sequences]",
            hint="the last entry of q_start is the number of query tokens",
        )
    check_shapes("mla_prefill", q, cache, scale)
    where = place(device, is_cuda(q))
    if not on_hopper(q, where):
        out, lse = mla_attention(q, cache, block_tables, q_start, kv_lens, scale, return_lse, device)
        return (out, lse) if return_lse else out
    tokens, heads, _ = q.shape
    out = empty(q, (tokens, heads, LATENT))
    lse = empty(q, (tokens, heads), "float32") if return_lse else None
    if tokens:
        most = slots(tokens, kv_lens.shape[0], tokens_of(heads, PLAN.cluster))
        teams = max(1, min(num_sms_of(q, where) // PLAN.cluster, most))
        mla_prefill_kernel.on(device)(
            q.flatten(0, 1), cache, block_tables, q_start, kv_lens, out.flatten(0, 1), scale * math.log2(math.e), teams,
            None if lse is None else lse.flatten(), width=WIDTH, latent=LATENT, heads=heads, page_size=cache.shape[1],
            plan=PLAN,
        )  # fmt: skip
    return (out, lse) if return_lse else out
