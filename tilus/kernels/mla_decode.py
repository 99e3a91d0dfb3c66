"""Multi-head latent attention of few queries a sequence over a paged cache, on Hopper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.mla_output import EIGHT, PART, weighted_sum
from tilus.kernels.mla_softmax import Scores
from tilus.kernels.mla_stages import NUMBERS, ROWS, Exchange, Ring, exchange_slots
from tilus.kernels.paged_decode_columns import Columns
from tilus.kernels.paged_decode_split import Part, Split, each_part, find_share, parts_of, places, units_of
from tilus.kernels.plan_choice import num_sms_of
from tilus.runtime.execute import place

LATENT, ROPE = 512, 64
WIDTH = LATENT + ROPE
OUTPUT_WARPS, SCORE_WARPS, COPY_WARPS = 8, 4, 4
WARPS = OUTPUT_WARPS + SCORE_WARPS + COPY_WARPS


@dataclass(frozen=True)
class MlaPlan:
    """What a block does. tile: cached tokens of a stage. stages: tiles in shared memory. cluster: blocks with rows of the same
    sequence, which bring tiles for each other. Registers of a thread that adds up results, makes weights, and copies."""

    tile: int = 64
    stages: int = 2
    cluster: int = 1
    output_registers: int = 168
    score_registers: int = 136
    copy_registers: int = 40


@tilus.kernel
def mla_decode_kernel(
    q: Tensor["dtype", "sequences", "rows", "width"],
    cache: Tensor["dtype", "pages", "page_size", "width"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["dtype", "row_blocks", "eights", 1, 8, "latent"],
    partial_out: Tensor[f32, "places", "eights", 8, "latent"],
    partial_lse: Tensor[f32, "places", "eights", 8],
    tickets: Tensor[int32, "count"],
    scale_log2: float,
    teams: int32,
    lse: Tensor[f32, "row_blocks", "eights", 1, 8] = None,
    *,
    width: Const,
    latent: Const,
    q_len: Const,
    heads: Const,
    groups: Const,
    eights: Const,
    page_size: Const,
    split: Const,
    plan: Const,
):
    cluster = plan.cluster
    tilus.grid(teams * cluster, warps=WARPS, cluster=cluster)
    tilus.launch_dependents()
    queries = tilus.shared(q.dtype, [ROWS, width])
    tiles = tilus.shared(q.dtype, [plan.stages, plan.tile, width])
    slots = exchange_slots(plan.tile)
    weights, factors = tilus.shared(q.dtype, [slots, ROWS, plan.tile]), tilus.shared(f32, [slots, 2, ROWS])
    full, empty = tilus.mbarrier(plan.stages), tilus.mbarrier(plan.stages, arrivals=cluster)
    numbers = tilus.shared(int32, [slots, NUMBERS])
    ready, taken = tilus.mbarrier(slots), tilus.mbarrier(slots)
    queries_full, queries_empty = tilus.mbarrier(), tilus.mbarrier()
    tilus.wait_dependencies()
    rank = tilus.cluster_rank() if cluster > 1 else 0
    units, begin, end, start = find_share(kv_lens, groups, split, WARPS, teams, tilus.block_id(0) // cluster)
    if cluster > 1:
        tilus.cluster_sync()

    with tilus.warps(OUTPUT_WARPS + SCORE_WARPS, COPY_WARPS, registers=plan.copy_registers):
        filling = Filling(Ring(tiles, full, empty, cluster))

        def fill(part):
            filling.fill(part, q, cache, block_tables, queries, queries_full, queries_empty, rank, eights)

        each_part(kv_lens, groups, start, begin, end, split, fill)

    with tilus.warps(OUTPUT_WARPS, SCORE_WARPS, registers=plan.score_registers):
        exchange = Exchange(weights, factors, numbers, ready, taken)
        scores = Scores(Ring(tiles, full, empty, cluster), exchange, queries, scale_log2, q_len, heads)
        seen = Turn()

        def weigh(part):
            tilus.wait_barrier(queries_full[0], seen.turn)
            scores.attend(part, (part.head * cluster + rank) * (eights * EIGHT), latent)
            tilus.arrive(queries_empty[0])
            count, index, first_place = parts_of(part, units, teams, split)
            scores.finish((part.sequence, part.head, count, first_place, index))
            seen.turn = 1 - seen.turn

        each_part(kv_lens, groups, start, begin, end, split, weigh)
        exchange.wait_taken()
        exchange.give(numbers=(-1,))

    with tilus.warps(0, OUTPUT_WARPS, registers=plan.output_registers):
        using = Ring(tiles, full, empty, cluster)
        taking = Exchange(weights, factors, numbers, ready, taken)
        columns = Columns(eights, EIGHT, latent, OUTPUT_WARPS, 1)

        taking.wait_ready()
        tiles_left = taking.number(0)
        while tiles_left >= 0:
            taking.take()
            halves, log2 = weighted_sum(using, taking, tiles_left)
            logs = log2.reshape([EIGHT, EIGHT])
            sequence, head, count, first_place, index = [taking.number(i) for i in range(NUMBERS)]
            taking.take()
            block = (sequence * groups + head) * cluster + rank
            if count > 1:
                first_place = first_place + rank * (partial_out.shape[0] // cluster)
                place = first_place + index
                for at, half in enumerate(halves):
                    tilus.store(partial_out[place], [0, 0, at * PART], half.reshape([EIGHT, EIGHT, PART]))
                tilus.store(partial_lse[place], [0, 0], logs)
                if tilus.atomic_add(tickets, [block], 1) == count - 1:
                    tilus.store(tickets, [block], tilus.zeros([1], int32))
                    columns.merge(partial_out, partial_lse, first_place, count, out, lse, At(block, 0))
            else:
                for at, half in enumerate(halves):
                    rows = half.reshape([EIGHT, EIGHT, PART]).to(out.dtype)
                    tilus.store(out[block], [0, 0, 0, at * PART], rows, dims=[0, 2, 3])
                columns.store_lse(lse, At(block, 0), 0, logs)
            taking.wait_ready()
            tiles_left = taking.number(0)


class At:
    def __init__(self, sequence: Any, head: Any) -> None:
        self.sequence, self.head = sequence, head


class Turn:
    """Whether a barrier with one phase a part is in an even or odd one."""

    def __init__(self) -> None:
        self.turn = 0


class Filling:
    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.turn = 0

    def fill(
        self, part: Part, q: Any, cache: Any, block_tables: Any, queries: Any, full: Any, empty: Any, rank: Any, eights: int
    ) -> None:
        tilus.wait_barrier(empty[0], 1 - self.turn)
        tilus.arrive(full[0], nbytes=queries.nbytes)
        row = (part.head * self.ring.cluster + rank) * (eights * EIGHT)
        tilus.copy_tensor(queries, q, [part.sequence, row, 0], barrier=full[0], dims=[1, 2])
        self.turn = 1 - self.turn
        self.ring.fill(cache, block_tables[part.sequence], part, rank)


def launch(
    q: Any, cache: Any, block_tables: Any, kv_lens: Any, scale: float, plan: MlaPlan, split: Split, teams: int,
    return_lse: bool, device: str | None,
) -> tuple[Any, Any]:  # fmt: skip
    """(output, log-sum-exp or None) by a given plan, on so many clusters."""
    sequences, q_len, heads, width = q.shape
    page_size, rows = cache.shape[1], q_len * heads
    row_blocks = -(-rows // ROWS)
    eights, groups = rows // row_blocks // EIGHT, row_blocks // plan.cluster
    most = places(sequences * groups, block_tables.shape[1] * page_size, teams, split)
    out = empty(q, (sequences, q_len, heads, LATENT))
    lse = empty(q, (sequences, q_len, heads), "float32") if return_lse else None

    mla_decode_kernel.on(device)(
        q.flatten(1, 2), cache, block_tables, kv_lens, out.view(-1, eights, 1, EIGHT, LATENT),
        empty(q, (plan.cluster * most, eights, EIGHT, LATENT), "float32"),
        empty(q, (plan.cluster * most, eights, EIGHT), "float32"),
        counters(q, sequences * row_blocks), scale * math.log2(math.e), teams,
        None if lse is None else lse.view(-1, eights, 1, EIGHT),
        width=width, latent=LATENT, q_len=q_len, heads=heads, groups=groups, eights=eights, page_size=page_size, split=split,
        plan=plan,
    )  # fmt: skip
    return out, lse
