"""A chain of layers, each of which needs the result of the one before it: x1 = x0 W0^T, x2 = x1 W1^T, and so on.

Products that depend on each other cannot overlap beyond what dependent launch allows, and a kernel that reads its activations too
early is wrong here. Every layer has its own weight, and all of them exceed the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from products.run import Run
from products.timing import one_after_the_other, poison
from products.weights import Case, RandomWeight, WrongResult, expected, random_weight
from tilus.kernels import linear
from tilus.kernels.quantize import QuantizedWeight

SIZES = (4096, 8192)
TOKENS = (1, 16, 64)
COLUMNS = {"N x K": 13, "M": 6, "layers": 8, "us": 9, "plain": 9, "read": 9, "plain read": 12, "rms": 10}


class Chain:
    """The layers of one size and their activations; every one is kept."""

    def __init__(self, weights: Sequence[RandomWeight], packed: Sequence[QuantizedWeight], x: torch.Tensor) -> None:
        self.weights, self.packed = weights, packed
        self.states = [x, *(torch.empty_like(x) for _ in weights)]

    def actions(self, device: str | None) -> list[Any]:
        triples = zip(self.states, self.packed, self.states[1:])
        return [lambda x=x, w=w, y=y: linear(x, w, out=y, device=device) for x, w, y in triples]

    def check(self, what: str) -> dict[str, float]:
        """Each layer is compared with the product of what the layer before it left, and the last with a chain in float64: the
        roundings of the layers, each of which random weights pass on at the same size, add up at most."""
        for index, (x, weight, y) in enumerate(zip(self.states, self.weights, self.states[1:])):
            expected(x, weight.rows, weight.shape[0], y.dtype, offset=weight.offset).check(y, f"{what}, layer {index}")
        exact = self.states[0].double()
        for weight in self.weights:
            exact = exact @ weight.rows(0, weight.shape[0]).T
        rms = float((self.states[-1].double() - exact).norm() / exact.norm())
        bound = len(self.weights) * 2.0**-11
        if not rms <= bound:
            raise WrongResult(f"{what}: the last layer is off by {rms:.3g} of its size, expected {bound:.3g}")
        return {"rms": float(f"{rms:.3g}")}


def rows(run: Run, sizes: Sequence[int], tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each size and M; see gemm.py for its keys."""
    for size in sizes:
        if run.budget.exhausted:
            return
        weights = [random_weight(Case((size, size), "int4", signed=True))]
        packed = [weights[0].pack()]
        for seed in range(1, run.timer.copies(packed[0].nbytes)):
            weights.append(random_weight(Case((size, size), "int4", signed=True), seed=seed))
            packed.append(weights[-1].pack())
        for m in tokens:
            if run.budget.exhausted:
                return
            chain = Chain(weights, packed, torch.randn(m, size, device="cuda").half())
            yield row(run, chain, size, m)


def row(run: Run, chain: Chain, size: int, m: int) -> dict[str, Any]:
    what = f"a chain of {len(chain.weights)} layers, {size} x {size}, M = {m}"

    def timed(device: str | None) -> tuple[float, dict[str, float]]:
        poison(chain.states[1:])
        for action in chain.actions(device):
            action()
        chain.check(f"{what}, one call")
        us = run.timer.us(chain.actions(device), chain.states[1:])
        return us, chain.check(f"{what}, after the replays")

    dependent = run.attempt("us", lambda: timed(None))
    with one_after_the_other():
        plain = run.attempt("plain_us", lambda: timed("cuda"))
    read_us, plain_read_us = run.reads.us(chain.packed[0].nbytes)
    return {
        "N": size, "K": size, "M": m, "layers": len(chain.weights), "us": dependent and dependent[0],
        "plain_us": plain and plain[0], "read_us": read_us, "plain_read_us": plain_read_us,
        "rms": dependent[1]["rms"] if dependent else None, "failures": run.taken_failures(),
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    keys = ("M", "layers", "us", "plain_us", "read_us", "plain_read_us", "rms")
    return [f"{row['N']} x {row['K']}", *(row[key] for key in keys)]
