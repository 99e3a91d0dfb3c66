"""Sampling on a GPU, beside torch's softmax, sort and multinomial, and the time of reading the logits.

    python benchmarks/sampling.py --out FILE        batches of 1 to 256 requests, vocabularies of 32k to 152k, f32 logits
    python benchmarks/sampling.py --plans           by several plans, tilus alone

--budget SECONDS stops before the first row that would start later; the file is whole after each row.

Times are medians over replays of a CUDA graph, in microseconds of one call; a graph goes through copies of the logits that add up
to four times the L2 cache. Tokens are compared with those of the native code for the CPU, for the first rows.

Output, as JSON: device, torch, cuda, l2_nbytes, replays, seconds, suites {sampling: {rows}} or {plans: {rows}}. Every row has
    batch, vocabulary
    logits            normal: of a normal distribution with deviation 2; zipf: the i-th best one of a row is -1.5 log(i), as
                      peaked as those of language models
    filters           greedy, none, top_k, top_p, min_p, top_k+top_p, edits (half of the rows masked, 64 tokens of each changed)
                      or logprobs (20 of each row)
    us                tilus
    limit_us          the bytes of the logits over 3.14 TB/s, or the 1.3 us of an empty kernel in a graph where that is more
    torch_us          argmax; softmax and multinomial; with filters also sort, cumsum and masks; null where there is no time
    run, whole        how the two launches go through a row (tilus.kernels.sampling_row.Tiling)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from products.report import Report, Row
from products.timing import Action, Budget, Timer

from tilus.kernels import edit_logits, sample, token_logprobs
from tilus.kernels.sampling import GPU_PLAN, Plan, launch
from tilus.kernels.sampling_row import Tiling
from tilus.ptx.assembler import SpillError

BATCHES = (1, 16, 64, 256)
VOCABULARIES = (32000, 128256, 151936)
READ_TBPS, EMPTY_US = 3.14, 1.3
FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0), "none": (1.0, 0, 1.0, 0.0), "top_k": (1.0, 50, 1.0, 0.0), "top_p": (1.0, 0, 0.9, 0.0),
    "min_p": (1.0, 0, 1.0, 0.05), "top_k+top_p": (0.8, 50, 0.9, 0.0),
}  # fmt: skip


def parameters(batch: int, filters: str) -> list[torch.Tensor]:
    """temperature, top_k, top_p, min_p, seeds, positions."""
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32)
    of_requests = [torch.full((batch,), v, dtype=d, device="cuda") for v, d in zip(FILTERS[filters], kinds)]
    seeds = torch.arange(batch, dtype=torch.int64, device="cuda") * 0x123456789ABC
    return [*of_requests, seeds, torch.arange(batch, dtype=torch.int32, device="cuda")]


def by_torch(logits: torch.Tensor, filters: str) -> torch.Tensor:
    """What one writes with torch's operations; the host reads nothing."""
    temperature, top_k, top_p, min_p = FILTERS[filters]
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k or top_p < 1:
        logits, order = logits.sort(-1, descending=True)
        if top_k:
            logits[:, top_k:] = -torch.inf
        probabilities = logits.softmax(-1)
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
        return order.gather(-1, torch.multinomial(probabilities, 1))
    probabilities = logits.softmax(-1)
    if min_p:
        probabilities = probabilities.where(probabilities >= min_p * probabilities.amax(-1, keepdim=True), 0)
    return torch.multinomial(probabilities, 1)


def limit_us(batch: int, vocabulary: int) -> float:
    return round(max(EMPTY_US, 4e-6 * batch * vocabulary / READ_TBPS), 2)


def copies_of(timer: Timer, batch: int, vocabulary: int, kind: str) -> list[torch.Tensor]:
    count = min(64, timer.copies(4 * batch * vocabulary))
    copies = [2 * torch.randn(batch, vocabulary, device="cuda") for _ in range(count)]
    if kind == "zipf":
        logits = -1.5 * torch.arange(1, vocabulary + 1, device="cuda").log()
        copies = [torch.empty_like(x).scatter_(1, x.argsort(1), logits.expand(batch, -1)) for x in copies]
    return copies


def check(logits: torch.Tensor, filters: str) -> None:
    """On a GPU and natively on the CPU the same tokens; sums in another order may move a border, in one row of hundreds."""
    given = parameters(len(logits), filters)
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    found = sample(logits, **dict(zip(names, given)))
    few = min(2, len(logits))
    wanted = sample(logits[:few].cpu(), **{n: a[:few].cpu() for n, a in zip(names, given)}, device="cpu")
    if not torch.equal(found[:few].cpu(), wanted):
        raise SystemExit(f"wrong tokens with {filters}: {found[:few].tolist()}, expected {wanted.tolist()}")


def tilus_actions(rows: list[torch.Tensor], filters: str, plan: Plan) -> list[Action]:
    given = parameters(len(rows[0]), filters)
    tokens = torch.zeros(len(rows[0]), dtype=torch.int32, device="cuda")
    return [functools.partial(launch, x, *given, tokens, plan, None) for x in rows]


def other_actions(rows: list[torch.Tensor], kind: str) -> list[Action]:
    """edits: a mask for half of the rows and 64 changed tokens in each. logprobs: 20 of each row."""
    batch, vocabulary = rows[0].shape

    def ints(values: torch.Tensor) -> torch.Tensor:
        return values.to(device="cuda", dtype=torch.int32)

    requests = ints(torch.arange(batch))
    if kind == "logprobs":
        counts = ints(torch.full((batch,), 20))
        return [functools.partial(token_logprobs, x, requests, asking=requests, counts=counts) for x in rows]
    bits = torch.randint(0, 256, (1, -(-vocabulary // 32) * 4), dtype=torch.uint8, device="cuda")
    tokens = torch.arange(64, device="cuda").repeat(batch) * (vocabulary // 64)
    out, ones = torch.empty_like(rows[0]), torch.ones(64 * batch, device="cuda")
    return [
        functools.partial(
            edit_logits, x, bits=bits, mask_of=requests % 2 - 1, rows=requests.repeat_interleave(64), tokens=ints(tokens),
            penalties=ones, addends=ones, out=out,
        )
        for x in rows
    ]  # fmt: skip


def plans() -> list[Plan]:
    """Other tiles, and more blocks beside each other."""
    runs = [(8, 4, 1, 1), (8, 2, 1, 1), (8, 2, 1, 8), (4, 4, 1, 8), (4, 8, 1, 4), (16, 2, 1, 2)]
    wholes = [(16, 1, 4, 1), (32, 1, 1, 1), (8, 1, 2, 4), (8, 2, 2, 2)]
    found = [GPU_PLAN, *(replace(GPU_PLAN, run=Tiling(*run)) for run in runs)]
    return found + [replace(GPU_PLAN, whole=Tiling(*whole)) for whole in wholes]


def cases(compare: bool) -> Iterator[tuple[int, int, str, str]]:
    """(vocabulary, batch, kind of logits, filters)"""
    if compare:
        yield from ((32000, 256, "normal", filters) for filters in ("greedy", "none", "top_k", "top_p"))
        yield from ((128256, 64, "normal", filters) for filters in ("greedy", "none"))
        yield from ((128256, 1, "zipf", filters) for filters in ("top_k", "top_k+top_p"))
        return
    for vocabulary in VOCABULARIES:
        for batch in BATCHES:
            yield from ((vocabulary, batch, "normal", filters) for filters in (*FILTERS, "edits", "logprobs"))
            yield from ((vocabulary, batch, "zipf", filters) for filters in FILTERS if "top" in filters)


def rows_of(timer: Timer, budget: Budget, compare: bool) -> Iterator[Row]:
    known: tuple[int, int, str] | None = None
    logits: list[torch.Tensor] = []
    for vocabulary, batch, kind, filters in cases(compare):
        if budget.exhausted:
            return
        if known != (vocabulary, batch, kind):
            logits.clear()  # before there are others
            logits, known = copies_of(timer, batch, vocabulary, kind), (vocabulary, batch, kind)
        row: Row = {
            "batch": batch,
            "vocabulary": vocabulary,
            "logits": kind,
            "filters": filters,
            "limit_us": limit_us(batch, vocabulary),
        }
        if compare:
            for plan in plans():
                yield {**row, **timed(timer, plan, logits, filters), "torch_us": None}
        elif filters in ("edits", "logprobs"):
            yield {**row, "us": timer.us(other_actions(logits, filters)), "torch_us": None, "failures": {}}
        else:
            if batch == BATCHES[0]:
                check(logits[0], filters)
            torch_us = timer.us([functools.partial(by_torch, x, filters) for x in logits[:4]])
            yield {**row, **timed(timer, GPU_PLAN, logits, filters), "torch_us": torch_us}


def timed(timer: Timer, plan: Plan, logits: list[torch.Tensor], filters: str) -> Row:
    try:
        us, failures = timer.us(tilus_actions(logits, filters, plan)), {}
    except SpillError as error:
        us, failures = None, {"us": str(error).splitlines()[0]}
    return {**dataclasses.asdict(plan), "us": us, "failures": failures}


COLUMNS = {"batch": 7, "vocabulary": 12, "logits": 9, "filters": 13, "us": 10, "limit": 10, "torch": 10, "plan": 24}


def cells(row: Row) -> list[Any]:
    run, whole = (row.get(key, {}) for key in ("run", "whole"))
    plan = "-".join(str(value) for value in (*run.values(), *whole.values()))
    return [*(row[key] for key in ("batch", "vocabulary", "logits", "filters", "us", "limit_us", "torch_us")), plan]


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--plans", action="store_true", help="compare plans")
    parser.add_argument("--replays", type=int, default=30, help="at most so many graph replays a time (default 30)")
    parser.add_argument("--budget", type=float, help="seconds after which no row starts")
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: `tilus doctor` says what is missing")
    timer, budget = Timer(options.replays), Budget(options.budget)
    facts = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda,
        "l2_nbytes": timer.l2_nbytes, "replays": timer.replays,
    }  # fmt: skip
    report = Report(options.out, facts)
    with torch.cuda.stream(torch.cuda.Stream()):
        rows = rows_of(timer, budget, options.plans)
        name = "plans" if options.plans else "sampling"
        report.suite(name, rows, COLUMNS, cells, facts=lambda: {"seconds": round(budget.used, 1)})


if __name__ == "__main__":
    main()
