"""Layers of a mixture of experts: `tilus.kernels.grouped_linear` beside loops of `linear` over the experts that have rows.

One loop is a CUDA graph, which is given what a program does not know when it records one: where each expert's rows begin. The
other is what a program can do, launched from Python: it copies the offsets to the host, waits for them, and launches a product
for each expert that has rows. It is compared with `grouped_linear` launched from Python. All read the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from products.run import Run
from products.timing import ACTIVATIONS, Action
from products.weights import Case, Expected, RandomWeight, expected, random_weight
from tilus.kernels import grouped_linear, linear
from tilus.kernels.quantize import QuantizedWeight, stack

SHAPES = ((14336, 4096),)  # N, K of an expert
TOKENS = (16, 256, 64, 32, 128)
EXPERTS, CHOSEN = 64, 2  # experts, and how many of them each token goes to
DISTINCT = 4  # weights that differ; the others are copies in memory of their own
BAR, BAR_TOKENS = 1.3, (16, 256)  # of the ratio to the loop that waits for the offsets, from so many tokens to so many
COLUMNS = {
    "N x K": 13, "tokens": 8, "active": 8, "us": 10, "loop": 10, "ratio": 8, "eager": 10, "host loop": 11, "host ratio": 12,
    "read": 10, "met": 6,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Routed:
    """Activations [CHOSEN * tokens, K], sorted by expert, and where the rows of each expert begin: int32 [experts + 1], also as
    a list."""

    x: torch.Tensor
    offsets: torch.Tensor
    bounds: list[int]

    @property
    def active(self) -> list[int]:
        return [expert for expert, first in enumerate(self.bounds[:-1]) if first < self.bounds[expert + 1]]


def routed(tokens: int, k: int, experts: int, device: str, seed: int) -> Routed:
    """Every token goes to CHOSEN different experts, all choices being equally likely."""
    generator = torch.Generator(device).manual_seed(seed)
    picked = torch.rand(tokens, experts, device=device, generator=generator).argsort(1)[:, :CHOSEN]
    counts = torch.bincount(picked.flatten(), minlength=experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    x = torch.randn(CHOSEN * tokens, k, device=device, generator=generator).half()
    return Routed(x, offsets, offsets.tolist())


def products_of(given: Routed, weights: Sequence[RandomWeight]) -> Expected:
    """In float64, where expert e has weight e modulo their number."""
    n = weights[0].shape[0]
    parts: dict[int, Expected] = {}
    for expert in given.active:
        own, weight = given.x[given.bounds[expert] : given.bounds[expert + 1]], weights[expert % len(weights)]
        parts[expert] = expected(own, weight.rows, n, own.dtype, offset=weight.offset)
    found = parts.values()
    return Expected(torch.cat([p.exact for p in found]), torch.cat([p.bound for p in found]), next(iter(found)).rms)


def experts_of(stacked: QuantizedWeight, experts: int) -> list[QuantizedWeight]:
    """Each expert's weight, in the same memory."""
    n, k = stacked.shape
    header = replace(stacked.header, shape=(n // experts, k))
    parts = {name: array.chunk(experts) for name, array in stacked.arrays.items()}
    return [QuantizedWeight(header, **{name: part[e] for name, part in parts.items()}) for e in range(experts)]


def looped(given: Routed, weights: Sequence[QuantizedWeight], y: torch.Tensor) -> None:
    for expert in given.active:
        own = slice(given.bounds[expert], given.bounds[expert + 1])
        linear(given.x[own], weights[expert], out=y[own])


def host_looped(given: Routed, weights: Sequence[QuantizedWeight], y: torch.Tensor) -> None:
    """The same where only the GPU knows the offsets."""
    looped(Routed(given.x, given.offsets, given.offsets.tolist()), weights, y)


def rows(
    run: Run, shapes: Sequence[tuple[int, int]], tokens: Sequence[int], experts: int = EXPERTS
) -> Iterator[dict[str, Any]]:
    """A row for each shape and number of tokens; see gemm.py for its keys."""
    for shape in shapes:
        if run.budget.exhausted:
            return
        weights = [random_weight(Case(shape, "int4"), seed=seed) for seed in range(DISTINCT)]
        packed = [weight.pack() for weight in weights]
        stacked = stack([packed[expert % DISTINCT] for expert in range(experts)])
        for count in tokens:
            if run.budget.exhausted:
                return
            yield row(run, weights, stacked, count, experts)


def row(
    run: Run, weights: Sequence[RandomWeight], stacked: QuantizedWeight, tokens: int, experts: int
) -> dict[str, Any]:  # fmt: skip
    n, k = weights[0].shape
    given = [routed(tokens, k, experts, "cuda", seed) for seed in range(ACTIVATIONS)]
    wanted = [products_of(one, weights) for one in given]
    outputs = [torch.empty(one.exact.shape, dtype=torch.float16, device="cuda") for one in wanted]
    what = f"{experts} experts {n} x {k}, {tokens} tokens"
    alone = experts_of(stacked, experts)

    def timed(actions: Sequence[Action], who: str) -> tuple[float, dict[str, float]]:
        return run.timer.checked_us(actions, outputs, wanted, f"{who}, {what}")

    together = [
        functools.partial(grouped_linear, one.x, stacked, one.offsets, out=y)
        for one, y in zip(given, outputs, strict=True)
    ]
    in_loop = [functools.partial(looped, one, alone, y) for one, y in zip(given, outputs, strict=True)]
    on_host = [functools.partial(host_looped, one, alone, y) for one, y in zip(given, outputs, strict=True)]
    ours = run.attempt("us", lambda: timed(together, "grouped"))
    loop = run.attempt("loop_us", lambda: timed(in_loop, "looped"))
    eager_us = run.attempt("eager_us", lambda: run.timer.eager_us(together))
    host_us = run.attempt("host_loop_us", lambda: run.timer.eager_us(on_host))
    us, loop_us = ours and ours[0], loop and loop[0]
    active = sum(len(one.active) for one in given) / len(given)
    read_us, _ = run.reads.us(round(active * alone[0].nbytes / 16) * 16)
    host_ratio = ratio(host_us, eager_us)
    has_bar = BAR_TOKENS[0] <= tokens <= BAR_TOKENS[1]
    return {
        "N": n, "K": k, "M": CHOSEN * tokens, "tokens": tokens, "experts": experts, "active": active,
        "us": us, **(ours[1] if ours else {"error": None, "rms": None}), "loop_us": loop_us, "ratio": ratio(loop_us, us),
        "eager_us": eager_us, "host_loop_us": host_us, "host_ratio": host_ratio,
        "bar": BAR if has_bar else None, "met": host_ratio is not None and host_ratio >= BAR if has_bar else None,
        "read_us": read_us, "failures": run.taken_failures(),
    }  # fmt: skip


def ratio(other_us: float | None, us: float | None) -> float | None:
    return round(other_us / us, 3) if us and other_us else None


def cells(row: dict[str, Any]) -> list[Any]:
    keys = ("tokens", "active", "us", "loop_us", "ratio", "eager_us", "host_loop_us", "host_ratio", "read_us", "met")
    return [f"{row['N']} x {row['K']}", *(row[key] for key in keys)]
