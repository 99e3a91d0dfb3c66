"""Rows of prefill and of appending to a cache: tilus beside torch's attention on contiguous keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from products.timing import Budget, Timer, one_after_the_other

from paged import sdpa
from paged.batches import PagedBatch, check
from paged.cases import Case
from paged.decode import AttentionRun
from tilus.kernels import paged_decode, paged_prefill
from tilus.kernels.paged_decode_arguments import MAX_QUERIES

COLUMNS = {
    "batch": 7, "new": 7, "context": 9, "heads": 10, "page": 6, "us": 10, "TFLOP/s": 9, "plain": 10, "best peer": 24, "bar": 6,
}  # fmt: skip


class PrefillRun(AttentionRun):
    def row(self, batch: PagedBatch) -> dict[str, Any]:
        case = batch.case
        us, error = self.ours(batch)
        with one_after_the_other():
            plain_us, _ = self.ours(batch, device="cuda")
        tflops = round(case.flops / us * 1e-6, 1)
        peers = dict(self.peers(batch)) if self.with_peers else {}
        return {
            "phase": "prefill" if case.q_len == case.context else "append", "batch": case.batch, "context": case.context,
            "q_len": case.q_len, "heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim, "page": case.page,
            "kv_dtype": case.kv_dtype, "us": us, "tflops": tflops, "plain_us": plain_us, "read_us": self.reads.us(case.nbytes)[0],
            "error": error, "peers": peers,
            "peer_errors": {name: batch.errors[name] for name in peers if name in batch.errors},
            "bar": case.bar, "met": None if case.bar is None else tflops >= case.bar,
            "failures": self.failures,
        }  # fmt: skip

    def ours(self, batch: PagedBatch, device: str | None = None) -> tuple[float, float]:
        """Microseconds and error; results are checked before and after they are timed."""
        case = batch.case
        flat, starts = (
            batch.q.flatten(0, 1),
            torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * case.q_len,
        )

        def attend(cache: Any) -> torch.Tensor:
            if case.q_len <= MAX_QUERIES:
                return paged_decode(
                    batch.q, cache, batch.block_tables, batch.kv_lens, batch.scale, constant_tables=True, device=device
                )  # fmt: skip
            out = paged_prefill(flat, cache, batch.block_tables, starts, batch.kv_lens, batch.scale, device=device)
            return out.view_as(batch.q)

        error = check(batch, attend(batch.caches[0]), "tilus")
        us = self.timer.us([lambda cache=cache: attend(cache) for cache in batch.caches])
        return us, round(max(error, check(batch, attend(batch.caches[-1]), "tilus")), 6)

    def peers(self, batch: PagedBatch) -> Iterator[tuple[str, float | None]]:
        """Where all tokens are new and of 16 bits; others would need a mask of another corner."""
        if batch.case.q_len == batch.case.context and batch.case.code_nbits == 16:
            for backend in sdpa.BACKENDS:
                make = lambda backend=backend: sdpa.actions(batch, backend, self.timer.l2_nbytes)  # noqa: E731
                yield backend, self.attempt(backend, [make])


def rows(timer: Timer, budget: Budget, peers: bool, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    return PrefillRun(timer, peers).rows(budget, cases)


def cells(row: dict[str, Any]) -> list[Any]:
    known = {name: us for name, us in row["peers"].items() if us is not None}
    best = min(known, key=lambda name: known[name], default=None)
    peer = None if best is None else f"{best} {row['tflops'] * row['us'] / known[best]:.0f}"
    heads = f"{row['heads']}/{row['kv_heads']}" + ("" if row["kv_dtype"] == "bfloat16" else f" {row['kv_dtype']}")
    keys = ("us", "tflops", "plain_us")
    return [
        row["batch"], row["q_len"], row["context"], heads, row["page"], *(row[key] for key in keys), peer, row["bar"]
    ]  # fmt: skip
