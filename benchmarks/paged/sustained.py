"""Rows of prefill while the GPU is hot: large products draw as much power as a board may, and its clock falls until they do not.

Contenders take turns of about a second each, and what counts is the second half of a turn, so that all are as hot. With the clock
that nvidia-smi reports meanwhile, a row says what share of the tensor cores' cycles does work that was asked for.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from products.timing import Action, Budget, Timer

from paged import sdpa
from paged.batches import PagedBatch, check, random_batch
from paged.cases import Case
from tilus.kernels import paged_prefill

COLUMNS = {
    "batch": 7, "new": 7, "context": 9, "page": 6, "by": 12, "us": 10, "TFLOP/s": 9, "MHz": 7, "W": 6, "share": 7, "bar": 6,
}  # fmt: skip
TURNS, TURN_SECONDS, GRAPH_SECONDS = 3, 0.8, 0.04
FLOPS_PER_CYCLE = 4096  # of a multiprocessor of an H100, products of 16-bit numbers (NVIDIA H100 white paper)


class SustainedRun:
    def __init__(self, timer: Timer, peers: bool) -> None:
        self.timer, self.with_peers = timer, peers
        self.num_sms: int = torch.cuda.get_device_properties(0).multi_processor_count

    def rows(self, batch: PagedBatch) -> Iterator[dict[str, Any]]:
        """One for each contender."""
        case = batch.case
        contenders = {"tilus": self.ours(batch)}
        if self.with_peers and case.q_len == case.context:
            contenders["sdpa_cudnn"] = sdpa.actions(batch, "sdpa_cudnn", self.timer.l2_nbytes)[0]
        graphs = {name: captured(action, case.flops) for name, action in contenders.items()}
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in graphs}
        for _ in range(TURNS):
            for name, (graph, count) in graphs.items():
                found[name].append(turn(graph, count))
        for name, turns in found.items():
            yield {
                "phase": "prefill" if case.q_len == case.context else "append", "batch": case.batch, "context": case.context,
                "q_len": case.q_len, "heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim,
                "page": case.page if name == "tilus" else None, "kv_dtype": case.kv_dtype, "by": name,
                **self.summary(case, turns), "bar": case.bar if name == "tilus" else None, "failures": {},
            }  # fmt: skip

    def ours(self, batch: PagedBatch) -> Action:
        case = batch.case
        starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * case.q_len
        given = batch.q.flatten(0, 1), batch.caches[0], batch.block_tables, starts, batch.kv_lens, batch.scale
        check(batch, paged_prefill(*given).view_as(batch.q), "tilus")
        return lambda: paged_prefill(*given)

    def summary(self, case: Case, turns: Sequence[tuple[float, float, float]]) -> dict[str, float]:
        us, mhz, watts = (statistics.median(values) for values in zip(*turns, strict=True))
        tflops = case.flops / us * 1e-6
        share = tflops * 1e6 / (self.num_sms * FLOPS_PER_CYCLE * mhz)
        return {
            "us": round(us, 1), "tflops": round(tflops, 1), "mhz": mhz, "watts": round(watts), "share": round(share, 3)
        }  # fmt: skip


def captured(action: Action, flops: int) -> tuple[Callable[[], None], int]:
    """(what replays a graph, calls in it)"""
    action()
    torch.cuda.current_stream().synchronize()
    count = max(1, round(GRAPH_SECONDS / (flops / 600e12)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(count):
            action()
    return graph.replay, count


def turn(replay: Callable[[], None], count: int) -> tuple[float, float, float]:
    """Medians over the second half of a turn: (microseconds of a call, MHz, watts)."""
    times: list[float] = []
    with smi_lines() as read:
        end = time.monotonic() + TURN_SECONDS
        while time.monotonic() < end:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            times.append(1e3 * start.elapsed_time(stop) / count)
        readings = [[float(part) for part in line.split(",")] for line in read()]
    late = readings[len(readings) // 2 :]
    mhz, watts = (statistics.median(values) for values in zip(*late, strict=True))
    return statistics.median(times[len(times) // 2 :]), mhz, watts


@contextmanager
def smi_lines() -> Iterator[Callable[[], list[str]]]:
    """A function that ends nvidia-smi and has the clock in MHz and the power in watts that it read every 40 ms, a line each."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits"]
    process = subprocess.Popen([*query, "-lms", "40"], stdout=subprocess.PIPE, text=True)

    def lines() -> list[str]:
        process.terminate()
        return process.communicate(timeout=10)[0].splitlines()

    try:
        yield lines
    finally:
        process.kill()
        process.wait(timeout=10)


def rows(timer: Timer, budget: Budget, peers: bool, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    run = SustainedRun(timer, peers)
    for case in cases:
        if budget.exhausted:
            return
        yield from run.rows(random_batch(case, 1))
        torch.cuda.empty_cache()


def cells(row: dict[str, Any]) -> list[Any]:
    keys = ("batch", "q_len", "context", "page", "by", "us", "tflops", "mhz", "watts", "share", "bar")
    return [row[key] for key in keys]
