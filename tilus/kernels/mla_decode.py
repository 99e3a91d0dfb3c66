"""Multi-head latent attention of few queries a sequence over a paged cache of latents, on Hopper: one launch, no plan.

All heads share one key of 576 elements a token, whose first 512 are the value (DeepSeek-V2, arXiv 2405.04434). With the key
projection absorbed into the queries, the heads of a token are rows of one product, 64 rows a block. Cached tokens of the
whole batch are shared evenly among clusters of blocks (`paged_decode_split`). A block has three roles: four warps copy tiles of
64 tokens (`mla_stages`), a warpgroup makes scores and weights (`mla_softmax`), two warpgroups add up the weighted latents
(`mla_output`), so that softmax and products go on at the same time. Latents are read where they are, as keys and, transposed,
as values.

Budget of 64 rows by a tile of 64 tokens, in cycles of a multiprocessor of an H100. 64 x 64 x (576 + 512) multiplications at
2048 a cycle are 2176. Of shared memory the scores read 36 x (2 + 2) KB, the sums 2 x 8 x (2 + 4) KB, and 72 KB arrive: 312 KB
at 128 bytes a cycle are 2500, the limit of 128 heads. A tile of 72 KB takes 5400 cycles to come from memory where every
multiprocessor reads its own, 2700 where two blocks of a cluster, with 64 of 128 heads each, bring halves for each other: so
memory is the limit of up to 64 heads. Shared memory holds 72 KB of queries, 144 KB of two tiles and 8 KB of weights. Registers
of a thread: 128 for sums, 32 for scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.linear import gpu_of
from tilus.kernels.mla_attention import mla_attention
from tilus.kernels.mla_output import EIGHT, Results, each_result
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
from tilus.kernels.paged_decode_split import Split, each_part, find_share, parts_of, places, units_of, with_whole_pairs
from tilus.kernels.plan_choice import num_sms_of
from tilus.runtime.execute import place

HEADS = (16, 32, 64, 128)
MAX_QUERIES = 4
UNIT = 256  # tokens of a part, at least


@dataclass(frozen=True)
class MlaPlan:
    """What a block does. cluster: blocks with rows of the same sequence. tile: cached tokens of a stage. stages: tiles in shared
    memory. Registers of a thread that adds up latents, that makes weights, and that copies."""

    cluster: int = 1
    tile: int = 64
    stages: int = 2
    output_registers: int = 168
    score_registers: int = 136
    copy_registers: int = 40


@tilus.kernel
def mla_decode_kernel(
    q: Tensor["dtype", "rows", "width"],
    cache: Tensor["dtype", "pages", "page_size", "width"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["dtype", "row_blocks", "eights", 1, 8, "latent"],
    partial_out: Tensor[f32, "places", "eights", 8, "latent"],
    partial_lse: Tensor[f32, "places", "eights", 8],
    tickets: Tensor[int32, "count"],
    scale_log2: float,
    lse: Tensor[f32, "row_blocks", "eights", 1, 8] = None,
    *,
    width: Const,
    latent: Const,
    q_len: Const,
    heads: Const,
    groups: Const,
    eights: Const,
    page_size: Const,
    teams: Const,
    split: Const,
    plan: Const,
):
    """A block has 8 * eights rows, which are some of a sequence's q_len * heads; `groups` clusters have all of them. teams: of
    clusters, which share the tokens of the batch. tickets: zeros, one for each block of rows, and left so. places: those of
    `paged_decode_split.places` for each block of a cluster."""
    cluster = plan.cluster
    tilus.grid(teams * cluster, warps=WARPS, cluster=cluster)
    tilus.launch_dependents()
    memory = BlockMemory(q.dtype, width, plan)
    tilus.wait_dependencies()
    rank = tilus.cluster_rank() if cluster > 1 else 0
    team = tilus.block_id(0) // cluster
    units, begin, end, start = find_share(kv_lens, groups, split, WARPS, teams, team)
    if cluster > 1:
        tilus.cluster_sync()

    with tilus.warps(OUTPUT_WARPS + SCORE_WARPS, COPY_WARPS, registers=plan.copy_registers):
        filling, bringing = memory.queries(), memory.ring(rank)
        evict = "first" if groups == 1 else None

        def fill(part):
            filling.fill(q, (part.pair * cluster + rank) * (eights * EIGHT))
            bringing.fill(cache, block_tables[part.sequence], part.token, part.end_token, evict)

        each_part(kv_lens, groups, start, begin, end, split, fill)

    with tilus.warps(OUTPUT_WARPS, SCORE_WARPS, registers=plan.score_registers):
        giving = memory.exchange()
        queries, reading = memory.queries(), memory.ring(rank)
        scores = Scores(queries, reading, giving, scale_log2, heads)

        def weigh(part):
            first_row = (part.head * cluster + rank) * (eights * EIGHT)
            count, index, first_place = parts_of(part, units, teams, split, team)  # while the part's latents come
            scores.attend(part.token, part.end_token, part.length - q_len + 1, first_row)
            scores.finish((part.pair * cluster + rank, count, first_place, index))

        each_part(kv_lens, groups, start, begin, end, split, weigh)
        giving.end()

    with tilus.warps(0, OUTPUT_WARPS, registers=plan.output_registers):
        results = Results(out, lse, partial_out, partial_lse, tickets, eights)

        def store(halves, log2, block, count, first_place, index):
            if count > 1:
                first_place = first_place + rank * (partial_out.shape[0] // cluster)
                results.merge(halves, log2, block, count, first_place, index)
            else:
                results.store(halves, log2, block)

        each_result(memory.ring(rank), memory.exchange(), 4, store)


def mla_decode(
    q: Any, cache: Any, block_tables: Any, kv_lens: Any, *, scale: float, return_lse: bool = False,
    fixed_split: int | None = None, device: str | None = None,
) -> Any:  # fmt: skip
    """Multi-head latent attention of the last few tokens of each sequence over its paged cache of latents, causal.

    q: float16 or bfloat16 [S, q_len, H, 576], contiguous, with the key projection absorbed into its first 512 elements, the
    rotated part behind them; q_len from 1 to 4, H 16, 32, 64 or 128. cache: [pages, page_size, 576] of the same dtype, the latent
    and the rotated key of each token; a strided view with contiguous last dim is fine. page_size 16, 32, 64 or a multiple of 64.
    block_tables: int32 [S, max_pages], the pages of each sequence in order. kv_lens: int32 [S], tokens in the cache, those of the
    queries included. scale: what scores are multiplied with, above 0. Torch tensors. fixed_split: tokens of a part, a multiple
    of 64. Sequences are then cut at its multiples alone, so that the bits of a result do not depend on what else is in the batch;
    each part takes up to 128 KB of memory for 64 rows. By default they are cut so that all multiprocessors have the same to do.
    device: where to run (reference, emulator, cpu, cuda), by default as the arguments say. GPUs that are no Hopper, and CPUs,
    run a simple kernel, in which no sequence is cut.

    Query j of a sequence sees the first kv_len - q_len + j + 1 tokens of the cache; one that sees none gets zeros. Nothing beyond
    kv_len is looked at. One launch. The host reads no tensor, so it can be captured in a CUDA graph, and lengths may change from
    replay to replay.

    Returns: [S, q_len, H, 512], to be multiplied by the value projection; with return_lse also float32 [S, q_len, H], the natural
    logarithm of the sum of exp(scaled score), minus infinity where there is no key (`merge_states` takes both). Scores and
    sums are f32; weights of the softmax are rounded to q's dtype.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    _check(q, cache, block_tables, kv_lens, scale, fixed_split)
    sequences, q_len, heads, _ = q.shape
    where = place(device, is_cuda(q))
    if not on_hopper(q, where):
        starts = arange_like(block_tables, sequences, q_len)
        out, lse = mla_attention(q.flatten(0, 1), cache, block_tables, starts, kv_lens, scale, return_lse, device)
        out, lse = out.view(sequences, q_len, heads, LATENT), None if lse is None else lse.view(sequences, q_len, heads)
    else:
        plan, max_tokens = plan_of(q_len, heads), block_tables.shape[1] * cache.shape[1]
        pairs = sequences * groups_of(q_len, heads, plan)
        if fixed_split is None:
            split, most = Split(UNIT), pairs * parts_of_sequence(max_tokens, min(q_len * heads, ROWS))
        else:
            split, most = Split(fixed_split, fixed=True), pairs * units_of(max_tokens, fixed_split)
        teams = max(1, min(with_whole_pairs(num_sms_of(q, where) // plan.cluster, pairs), most))
        out, lse = launch(q, cache, block_tables, kv_lens, scale, plan, split, teams, return_lse, device)
    return (out, lse) if return_lse else out


def launch(
    q: Any, cache: Any, block_tables: Any, kv_lens: Any, scale: float, plan: MlaPlan, split: Split, teams: int,
    return_lse: bool, device: str | None,
) -> tuple[Any, Any]:  # fmt: skip
    """(output, log-sum-exp or None) by a given plan, on so many clusters."""
    sequences, q_len, heads, _ = q.shape
    page_size, groups = cache.shape[1], groups_of(q_len, heads, plan)
    blocks, eights = sequences * groups * plan.cluster, q_len * heads // (groups * plan.cluster * EIGHT)
    most = plan.cluster * places(sequences * groups, block_tables.shape[1] * page_size, teams, split)
    out = empty(q, (sequences, q_len, heads, LATENT))
    lse = empty(q, (sequences, q_len, heads), "float32") if return_lse else None
    if sequences:
        mla_decode_kernel.on(device)(
            q.flatten(0, 2), cache, block_tables, kv_lens, out.view(blocks, eights, 1, EIGHT, LATENT),
            empty(q, (most, eights, EIGHT, LATENT), "float32"), empty(q, (most, eights, EIGHT), "float32"),
            counters(q, blocks), scale * math.log2(math.e),
            None if lse is None else lse.view(blocks, eights, 1, EIGHT),
            width=WIDTH, latent=LATENT, q_len=q_len, heads=heads, groups=groups, eights=eights, page_size=page_size,
            teams=teams, split=split, plan=plan,
        )  # fmt: skip
    return out, lse


def plan_of(q_len: int, heads: int) -> MlaPlan:
    """Pairs of blocks where there are any: they bring tiles for each other."""
    return MlaPlan(cluster=2 if row_blocks(q_len, heads) % 2 == 0 else 1)


def parts_of_sequence(tokens: int, rows: int) -> int:
    """Parts of some units each that a sequence of so many tokens is cut into, at most. One block merges them in order.

    On an H100 that takes as long for each as 20 tokens of a part take with 16 rows, and as 55 with 64 (measured with one
    sequence of 4096 tokens in 8 to 64 parts). The sum of both is least with the root of the tokens by that many parts.
    """
    units, best = units_of(tokens, UNIT), math.sqrt(max(tokens, 1) / (8 + 3 * rows / 4))
    return -(-units // max(1, round(units / best)))


def row_blocks(q_len: int, heads: int) -> int:
    """Blocks for the rows of a sequence, each with as many."""
    return -(-q_len * heads // ROWS)


def groups_of(q_len: int, heads: int, plan: MlaPlan) -> int:
    """Clusters for the rows of a sequence."""
    return row_blocks(q_len, heads) // plan.cluster


def on_hopper(q: Any, where: str) -> bool:
    """Whether kernels for sm_90a run there."""
    return where in ("reference", "emulator") or (where == "cuda" and gpu_of(q).target.sm == 90)


def arange_like(tables: Any, count: int, step: int) -> Any:
    """int32 [count + 1], multiples of step, on the device of `tables`."""
    import torch

    return torch.arange(0, (count + 1) * step, step, dtype=torch.int32, device=tables.device)


def _check(q: Any, cache: Any, block_tables: Any, kv_lens: Any, scale: float, fixed_split: int | None) -> None:
    if q.ndim != 4 or block_tables.ndim != 2 or kv_lens.ndim != 1:
        raise TilusError(
            f"mla_decode: shapes q {list(q.shape)}, block_tables {list(block_tables.shape)} and kv_lens {list(kv_lens.shape)}, "
            f"expected [sequences, q_len, heads, {WIDTH}], [sequences, max_pages] and [sequences]",
            hint="one query a sequence: q.unsqueeze(1)",
        )
    check_shapes("mla_decode", q, cache, scale)
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        raise TilusError(
            f"mla_decode: {q.shape[1]} queries a sequence, expected 1 to {MAX_QUERIES}",
            hint="tilus.kernels.mla_prefill takes more",
        )
    if fixed_split is not None and (fixed_split < MlaPlan.tile or fixed_split % MlaPlan.tile):
        raise TilusError(f"mla_decode: fixed_split={fixed_split}, expected a multiple of {MlaPlan.tile}")


def check_shapes(what: str, q: Any, cache: Any, scale: float) -> None:
    """Of q [..., heads, 576] and the cache."""
    if q.dtype != cache.dtype:
        raise TilusError(f"{what}: q of {q.dtype} and cache of {cache.dtype}, expected the same dtype")
    if cache.ndim != 3 or q.shape[-1] != WIDTH or cache.shape[2] != WIDTH:
        raise TilusError(
            f"{what}: q {list(q.shape)} and cache {list(cache.shape)}, expected [..., heads, {WIDTH}] and "
            f"[pages, page_size, {WIDTH}]",
            hint=f"{LATENT} elements of the latent, then {WIDTH - LATENT} that are rotated",
        )
    if q.shape[-2] not in HEADS:
        raise TilusError(
            f"{what}: {q.shape[-2]} heads, expected one of {', '.join(map(str, HEADS))}", hint="pad them with zeros"
        )
    page_size = cache.shape[1]
    if page_size not in (16, 32) and (page_size < ROWS or page_size % ROWS):
        raise TilusError(f"{what}: page_size {page_size}, expected 16, 32, or a multiple of {ROWS}")
    if not scale > 0.0:
        raise TilusError(f"{what}: scale {scale}, expected more than 0", hint="negate q for a negative scale")
