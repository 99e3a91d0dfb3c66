"""Rows of decoding: tilus' paged_decode beside a pure read of the cached bytes, and beside others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from products.reads import Reads
from products.timing import Action, Budget, Timer, one_after_the_other

from paged import sdpa
from paged.batches import DTYPES, PagedBatch, check, random_batch
from paged.cases import Case
from tilus.kernels import paged_decode

COLUMNS = {
    "batch": 7,
    "context": 9,
    "heads": 8,
    "cache": 10,
    "us": 9,
    "TB/s": 7,
    "plain": 8,
    "read": 8,
    "best peer": 24,
    "bar": 6,
}


class AttentionRun:
    """Measurements on the current GPU, on the current stream."""

    def __init__(self, timer: Timer, peers: bool) -> None:
        self.timer, self.with_peers = timer, peers
        self.reads = Reads(timer)
        self.num_sms: int = torch.cuda.get_device_properties(0).multi_processor_count
        self.failures: dict[str, str] = {}

    def attempt(self, name: str, makers: Sequence[Callable[[], Sequence[Action]]]) -> float | None:
        """The fastest of several ways to do it. A wrong result ends the run, and so does a GPU that does not answer."""
        found: list[float] = []
        for make in makers:
            try:
                found.append(self.timer.us(make()))
            except Exception as error:
                torch.cuda.synchronize()
                self.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return min(found, default=None)

    def row(self, batch: PagedBatch) -> dict[str, Any]:
        raise NotImplementedError

    def rows(self, budget: Budget, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
        for case in cases:
            if budget.exhausted:
                return
            self.failures = {}
            batch = random_batch(case, self.timer.l2_nbytes)
            yield self.row(batch)
            del batch
            torch.cuda.empty_cache()


class DecodeRun(AttentionRun):
    def row(self, batch: PagedBatch) -> dict[str, Any]:
        case = batch.case
        us, error = self.ours(batch)
        with one_after_the_other():
            plain_us, _ = self.ours(batch, device="cuda")
        read_us, plain_read_us = self.reads.us(case.nbytes)
        tbps = round(case.nbytes / us * 1e-6, 3)
        peers = dict(self.peers(batch)) if self.with_peers else {}
        return {
            "phase": "decode", "batch": case.batch, "context": case.context, "skewed": case.skewed, "q_len": case.q_len,
            "heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim, "page": case.page,
            "kv_dtype": case.kv_dtype, "us": us, "tbps": tbps, "plain_us": plain_us, "read_us": read_us,
            "plain_read_us": plain_read_us, "error": error, "peers": peers,
            "peer_errors": {name: batch.errors[name] for name in peers if name in batch.errors}, "bar": case.bar,
            "met": None if case.bar is None else tbps >= case.bar, "failures": self.failures,
        }  # fmt: skip

    def ours(self, batch: PagedBatch, device: str | None = None) -> tuple[float, float]:
        """Microseconds and error; results are checked before and after they are timed."""

        def attend(cache: Any) -> torch.Tensor:
            return paged_decode(
                batch.q, cache, batch.block_tables, batch.kv_lens, batch.scale, constant_tables=True, constant_past=True,
                device=device,
            )  # fmt: skip

        error = check(batch, attend(batch.caches[0]), "paged_decode")
        us = self.timer.us([lambda cache=cache: attend(cache) for cache in batch.caches])
        return us, round(max(error, check(batch, attend(batch.caches[-1]), "paged_decode")), 6)

    def peers(self, batch: PagedBatch) -> Iterator[tuple[str, float | None]]:
        """Names and microseconds; None, with a line in `failures`, where one cannot do it."""
        if batch.case.q_len > 1 or batch.case.kv_dtype not in DTYPES:
            return
        if not batch.case.skewed:
            for backend in sdpa.BACKENDS:
                make = lambda backend=backend: sdpa.actions(batch, backend, self.timer.l2_nbytes)  # noqa: E731
                yield backend, self.attempt(backend, [make])
        if importlib.util.find_spec("triton") is not None:
            from paged import triton_decode

            yield (
                "triton",
                self.attempt(
                    "triton",
                    [lambda c=c: triton_decode.actions(batch, c, self.num_sms) for c in triton_decode.CONFIGS],
                ),
            )


def rows(timer: Timer, budget: Budget, peers: bool, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    return DecodeRun(timer, peers).rows(budget, cases)


def cells(row: dict[str, Any]) -> list[Any]:
    known = {name: us for name, us in row["peers"].items() if us is not None}
    best = min(known, key=lambda name: known[name], default=None)
    peer = None if best is None else f"{best} {known[best]:.1f}"
    context = f"{row['context']}{'~' if row['skewed'] else ''}"
    heads = f"{row['heads']}/{row['kv_heads']}"
    return [
        row["batch"],
        context,
        heads,
        row["kv_dtype"],
        row["us"],
        row["tbps"],
        row["plain_us"],
        row["read_us"],
        peer,
        row["bar"],
    ]
