"""Rows of decoding by other plans than the library's: which tiles, stages, warps and blocks a batch likes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from products.timing import Budget, Timer

from paged.batches import PagedBatch, check, random_batch
from paged.cases import Case
from tilus.kernels.paged_decode import DecodePlan, blocks_of, launch
from tilus.kernels.paged_decode_split import Split
from tilus.ptx.assembler import SpillError

COLUMNS = {"batch": 7, "context": 9, "cache": 10, "tile": 6, "stages": 8, "warps": 7, "blocks": 8, "us": 9, "TB/s": 7}

# For groups of up to eight heads of 128 elements.
PLANS = {
    16: [
        DecodePlan(64, 3, 4), DecodePlan(64, 2, 4), DecodePlan(64, 2, 4, 1, 2), DecodePlan(64, 3, 4, 1, 2), DecodePlan(128, 2, 8),
        DecodePlan(64, 2, 4, 1, 3),
    ],
    8: [
        DecodePlan(128, 3, 8), DecodePlan(128, 2, 8), DecodePlan(64, 5, 4), DecodePlan(64, 5, 4, 1, 2),
        DecodePlan(64, 3, 4, 1, 2),
    ],
    4: [
        DecodePlan(128, 5, 8), DecodePlan(64, 8, 4, 1, 2), DecodePlan(64, 5, 4, 1, 2),
        DecodePlan(64, 5, 4), DecodePlan(32, 8, 2, 1, 4),
    ],
}  # fmt: skip


def rows(timer: Timer, budget: Budget, peers: bool, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """peers: of no meaning here; the other suites have them."""
    for case in cases:
        if budget.exhausted:
            return
        batch = random_batch(case, timer.l2_nbytes)
        for plan in PLANS[case.code_nbits]:
            yield row(timer, batch, plan)
        del batch
        torch.cuda.empty_cache()


def row(timer: Timer, batch: PagedBatch, plan: DecodePlan) -> dict[str, Any]:
    case, failures, us, error = batch.case, dict[str, str](), None, None
    split = Split(min(plan.tile, case.page))
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    blocks = blocks_of(case.batch * case.kv_heads, sum(case.lengths), num_sms, plan)

    def attend(cache: Any) -> torch.Tensor:
        return launch(
            batch.q, cache, batch.block_tables, batch.kv_lens, batch.scale, plan, split, blocks, False, None, True
        )[0]  # fmt: skip

    try:
        error = check(batch, attend(batch.caches[0]), str(plan))
        us = timer.us([lambda cache=cache: attend(cache) for cache in batch.caches])
    except SpillError as spill:
        failures["us"] = str(spill).splitlines()[0]
    return {
        "phase": "decode", "batch": case.batch, "context": case.context, "skewed": case.skewed, "kv_dtype": case.kv_dtype,
        "tile": plan.tile, "stages": plan.stages, "warps": plan.warps, "blocks": blocks, "us": us,
        "tbps": None if us is None else round(case.nbytes / us * 1e-6, 3), "error": error, "failures": failures,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    context = f"{row['context']}{'~' if row['skewed'] else ''}"
    keys = ("kv_dtype", "tile", "stages", "warps", "blocks", "us", "tbps")
    return [row["batch"], context, *(row[key] for key in keys)]
