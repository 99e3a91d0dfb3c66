"""Rows of multi-head latent attention: tilus' mla_decode and mla_prefill beside a pure read of the cached bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from products.reads import Reads
from products.timing import Budget, Timer

from paged.batches import BOUND, L2_MULTIPLE, MOST_CHECKED
from tilus.kernels import mla_decode, mla_prefill

LATENT, WIDTH = 512, 576
SCALE = 192**-0.5
COLUMNS = {"phase": 9, "batch": 7, "context": 12, "heads": 7, "page": 6, "us": 10, "TB/s": 7, "TFLOP/s": 9, "read": 9}


@dataclass(frozen=True)
class MlaCase:
    """batch: sequences of `context` cached tokens, the last `q_len` of which are queries."""

    batch: int
    context: int
    heads: int
    q_len: int = 1
    page: int = 64

    @property
    def decodes(self) -> bool:
        return self.q_len <= 4

    @property
    def nbytes(self) -> int:
        """Of the cache, in bfloat16."""
        return self.batch * self.context * WIDTH * 2

    @property
    def operations(self) -> int:
        """Of the products of queries with the keys that they see, and of weights with values."""
        seen = self.q_len * self.context - self.q_len * (self.q_len - 1) // 2
        return 2 * self.batch * self.heads * seen * (WIDTH + LATENT)

    def __str__(self) -> str:
        return f"MLA of {self.batch} x {self.q_len} on {self.context}, {self.heads} heads"


CASES = [
    *(MlaCase(batch, context, heads) for heads in (16, 128) for batch in (1, 8, 32, 128) for context in (4096, 16384)),
    MlaCase(32, 4096, 128, q_len=2), MlaCase(32, 4096, 128, page=16), MlaCase(1, 4096, 128, q_len=4096),
    MlaCase(4, 8192, 16, q_len=512),
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class LatentBatch:
    """q: [batch, q_len, heads, 576]. caches: [pages, page, 576], the same numbers in all; pages are in random order."""

    case: MlaCase
    q: torch.Tensor
    caches: list[torch.Tensor]
    block_tables: torch.Tensor
    kv_lens: torch.Tensor
    q_start: torch.Tensor


def random_batch(case: MlaCase, l2_nbytes: int, device: str = "cuda") -> LatentBatch:
    pages = case.context // case.page
    generator = torch.Generator().manual_seed(case.batch * pages)
    tables = torch.randperm(case.batch * pages, generator=generator).int().view(case.batch, pages).to(device)
    cache = torch.empty(case.batch * pages, case.page, WIDTH, dtype=torch.bfloat16, device=device).normal_()
    copies = max(1, -(-L2_MULTIPLE * l2_nbytes // case.nbytes))
    q = torch.empty(case.batch, case.q_len, case.heads, WIDTH, dtype=torch.bfloat16, device=device).normal_()
    lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.q_len
    return LatentBatch(case, q, [cache, *(cache.clone() for _ in range(copies - 1))], tables, lens, starts)


def attend(batch: LatentBatch, cache: torch.Tensor, device: str | None = None) -> torch.Tensor:
    """[batch, q_len, heads, 512]"""
    rest = cache, batch.block_tables
    if batch.case.decodes:
        return mla_decode(batch.q, *rest, batch.kv_lens, scale=SCALE, device=device)
    out = mla_prefill(batch.q.flatten(0, 1), *rest, batch.q_start, batch.kv_lens, scale=SCALE, device=device)
    return out.unflatten(0, (batch.case.batch, batch.case.q_len))


def check(batch: LatentBatch, out: torch.Tensor) -> float:
    """The largest relative L2 error, against f32, of the first and last query of the first, a middle and the last sequence.

    Raises: SystemExit where it is too large.
    """
    case, worst = batch.case, 0.0
    for row in sorted({0, case.batch // 2, case.batch - 1})[:MOST_CHECKED]:
        tokens = batch.caches[0][batch.block_tables[row].long()].flatten(0, 1).float()
        for query in sorted({0, case.q_len - 1}):
            keys = tokens[: case.context - case.q_len + query + 1]
            weights = (batch.q[row, query].float() @ keys.T * SCALE).softmax(-1)
            wanted = weights @ keys[:, :LATENT]
            worst = max(worst, float((out[row, query].float() - wanted).norm() / wanted.norm()))
    if not worst <= BOUND:
        raise SystemExit(f"{case}: the relative error is {worst:.2e}, expected at most {BOUND}")
    return worst


def rows(timer: Timer, budget: Budget, peers: bool, cases: Sequence[MlaCase]) -> Iterator[dict[str, Any]]:
    """Measurements on the current GPU, on the current stream. peers: of no meaning here; the other suites have them."""
    reads = Reads(timer)
    for case in cases:
        if budget.exhausted:
            return
        yield _row(timer, reads, random_batch(case, timer.l2_nbytes))
        torch.cuda.empty_cache()


def _row(timer: Timer, reads: Reads, batch: LatentBatch) -> dict[str, Any]:
    case = batch.case
    error = check(batch, attend(batch, batch.caches[0]))
    us = timer.us([lambda cache=cache: attend(batch, cache) for cache in batch.caches])
    error = max(error, check(batch, attend(batch, batch.caches[-1])))
    return {
        "phase": "mla_decode" if case.decodes else "mla_prefill", "batch": case.batch, "context": case.context,
        "q_len": case.q_len, "heads": case.heads, "page": case.page, "kv_dtype": "bfloat16", "us": us,
        "tbps": round(case.nbytes / us * 1e-6, 3), "tflops": round(case.operations / us * 1e-6, 1),
        "read_us": reads.us(case.nbytes)[0], "error": round(error, 6), "failures": {},
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    context = row["context"] if row["q_len"] == 1 else f"{row['q_len']}/{row['context']}"
    keys = ("heads", "page", "us", "tbps", "tflops", "read_us")
    return [row["phase"].removeprefix("mla_"), row["batch"], context, *(row[key] for key in keys)]
