"""A Triton kernel to compare with: decoding over pages, keys split among blocks, partial results merged by a second kernel.

Blocks take an equal number of tokens of one sequence and kv head; the heads of the group are rows of the products, padded to 16.
Needs triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged.batches import PagedBatch, check

LEAST = 16  # rows of a product


@dataclass(frozen=True)
class Config:
    """tile: tokens of an iteration. per_sm: blocks for each multiprocessor."""

    tile: int
    stages: int
    warps: int
    per_sm: int


CONFIGS = [Config(64, 6, 4, 2), Config(128, 5, 8, 1), Config(64, 7, 4, 4), Config(32, 7, 2, 8)]


@triton.jit
def decode(
    q, cache, tables, lens, parts_out, parts_lse, scale_log2, table_stride, page_stride, kind_stride, slot_stride, head_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    length = tl.load(lens + sequence)
    share = tl.cdiv(tl.cdiv(length, TILE), SPLITS) * TILE
    first, last = split * share, tl.minimum(split * share + share, length)
    rows, d, token = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, TILE)
    row = (sequence * heads + head) * GROUP + rows
    queries = tl.load(q + row[:, None] * D + d[None, :], mask=rows[:, None] < GROUP, other=0.0)
    highest, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for at in range(first, last, TILE):
        inside = at + token < last
        page = tl.load(tables + sequence * table_stride + (at + token) // PAGE, mask=inside, other=0).to(tl.int64)
        place = cache + page * page_stride + (at + token) % PAGE * slot_stride + head * head_stride
        keys = tl.load(place[None, :] + d[:, None], mask=inside[None, :], other=0.0)
        values = tl.load(place[:, None] + kind_stride + d[None, :], mask=inside[:, None], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(queries, keys) * scale_log2, -1e30)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
        highest = higher
    safe = tl.where(total > 0, total, 1.0)
    place = row * SPLITS + split
    tl.store(parts_out + place[:, None] * D + d[None, :], acc / safe[:, None], mask=rows[:, None] < GROUP)
    tl.store(parts_lse + place, tl.where(total > 0, highest + tl.log2(safe), -1e30), mask=rows < GROUP)


@triton.jit
def merge(parts_out, parts_lse, out, D: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr):
    row, split, d = tl.program_id(0), tl.arange(0, PADDED), tl.arange(0, D)
    lse = tl.load(parts_lse + row * SPLITS + split, mask=split < SPLITS, other=-1e30)
    weights = tl.exp2(lse - tl.max(lse, 0))
    parts = tl.load(
        parts_out + (row * SPLITS + split[:, None]) * D + d[None, :], mask=split[:, None] < SPLITS, other=0.0
    )
    tl.store(out + row * D + d, (tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)).to(out.dtype.element_ty))


def actions(batch: PagedBatch, config: Config, num_sms: int) -> list[Callable[[], object]]:
    """One call for each copy of the cache; checked. Only for one query a sequence."""
    case, group = batch.case, batch.case.heads // batch.case.kv_heads
    pairs, rows = case.batch * case.kv_heads, case.batch * case.heads
    most = -(-max(case.lengths) // config.tile)
    splits = max(1, min(most, -(-config.per_sm * num_sms // pairs)))
    parts_out = torch.empty(rows, splits, case.head_dim, dtype=torch.float32, device="cuda")
    parts_lse, out = torch.empty(rows, splits, device="cuda"), torch.empty_like(batch.q)
    pages, kind, slot, head, _ = batch.caches[0].stride()

    def attend(cache: torch.Tensor) -> None:
        decode[(case.batch, case.kv_heads, splits)](
            batch.q, cache, batch.block_tables, batch.kv_lens, parts_out, parts_lse, batch.scale * 1.4426950408889634,
            batch.block_tables.stride(0), pages, kind, slot, head, GROUP=group, ROWS=max(LEAST, triton.next_power_of_2(group)),
            D=case.head_dim, PAGE=case.page, TILE=config.tile, SPLITS=splits, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        merge[(rows,)](
            parts_out,
            parts_lse,
            out,
            D=case.head_dim,
            SPLITS=splits,
            PADDED=triton.next_power_of_2(splits),
            num_warps=4,
        )

    attend(batch.caches[0])
    check(batch, out, f"triton {config}")
    return [lambda cache=cache: attend(cache) for cache in batch.caches]
