"""Weights of 4 bits with a scale for each group of 128, symmetric: over shapes and tokens, beside peers and limits."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from products.limits import limit_us, speedup
from products.run import Run, activations, outputs_like, products_with
from products.timing import Action, in_turn
from products.weights import Case, Expected, RandomWeight, random_weight
from tilus.kernels.quantize import QuantizedWeight

SHAPES = ((4096, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 8192))  # N, K
# In the order of measuring: a run that is cut off has covered the range.
TOKENS = (1, 16, 64, 256, 4096, 8, 32, 128, 4, 512, 1024)

TUNING_REPLAYS = 5  # for each configuration of the Triton kernel
COLUMNS = {
    "N x K": 13, "M": 6, "us": 10, "plain": 10, "Triton": 10, "cuBLAS": 10, "bf16": 10, "read": 9, "plain read": 12,
    "limit": 9, "speed-up": 10, "possible": 10,
}  # fmt: skip


def rows(run: Run, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each M and shape; see gemm.py for its keys."""
    operands = [Operands(run, shape) for shape in shapes]
    for m in tokens:
        for operand in operands:
            if run.budget.exhausted:
                return
            yield operand.row(m)


class Operands:
    """One shape: copies of its weight in every form, made when they are first needed."""

    def __init__(self, run: Run, shape: tuple[int, int]) -> None:
        self.run, self.shape = run, shape
        self._copies: dict[Any, list[Any]] = {}

    @functools.cached_property
    def weight(self) -> RandomWeight:
        return random_weight(Case(self.shape, "int4"))

    @functools.cached_property
    def packed(self) -> list[QuantizedWeight]:
        return self.run.packed_copies(self.weight)

    def dense(self, dtype: torch.dtype) -> list[torch.Tensor]:
        if dtype not in self._copies:
            self._copies[dtype] = self.run.copies_of(self.weight.rounded(dtype))
        return self._copies[dtype]

    def triton(self, step: int) -> list[Any]:
        """Packed for an iteration of `step` columns."""
        if step not in self._copies:
            kernel = importlib.import_module("triton_int4")
            packed = kernel.weight(self.weight.codes, self.weight.scales, step)
            count = self.run.timer.copies(packed.nbytes)
            self._copies[step] = [packed, *(packed.clone() for _ in range(count - 1))]
        return self._copies[step]

    def row(self, m: int) -> dict[str, Any]:
        run, (n, k) = self.run, self.shape
        xs = activations(m, k)
        what = f"int4 {n} x {k}, M = {m}"
        row: dict[str, Any] = {"N": n, "K": k, "M": m}
        row |= run.linear_us(xs, self.packed, products_with(self.weight, xs), f"tilus, {what}")
        read_us, plain_read_us = run.reads.us(self.packed[0].nbytes)
        wide = [x.bfloat16() for x in xs]
        row |= {
            "cublas_fp16_us": run.attempt(
                "cublas_fp16_us", lambda: run.torch_us(xs, self.dense(torch.float16), f"cuBLAS fp16, {what}")
            ),
            "cublas_bf16_us": run.attempt(
                "cublas_bf16_us", lambda: run.torch_us(wide, self.dense(torch.bfloat16), f"cuBLAS bf16, {what}")
            ),
        }
        wanted = products_with(self.weight, xs, roundings=2)  # the kernel rounds its weights to f16
        found = run.attempt("triton_us", lambda: self.triton_us(xs, wanted, what))
        row |= {"triton_us": found and found[0], "triton_config": found and found[1]}
        row |= {
            "read_us": read_us, "plain_read_us": plain_read_us,
            "limit_us": limit_us(n, k, m, read_us, run.tflops), "plain_limit_us": limit_us(n, k, m, plain_read_us, run.tflops),
            "failures": run.taken_failures(),
        }  # fmt: skip
        return {key: round(value, 3) if key.endswith("limit_us") else value for key, value in row.items()}

    def triton_us(self, xs: Sequence[torch.Tensor], wanted: Sequence[Expected], what: str) -> tuple[float, str]:
        """The time of the fastest configuration, and which it is."""
        kernel = importlib.import_module("triton_int4")
        n, k = self.shape
        outputs = outputs_like(wanted, torch.float16)

        def actions(config: Any) -> list[Action]:
            weights = self.triton(config.step)
            return in_turn(kernel.launcher(config, xs[0].shape[0], weights[0]), xs, weights, outputs)

        times: dict[Any, float] = {}
        for config in kernel.configs(n, k, xs[0].shape[0]):
            try:
                times[config] = self.run.timer.us(actions(config), replays=TUNING_REPLAYS)
            except kernel.TooLarge:  # too large a tile for this GPU: the others remain
                continue
        if not times:
            raise RuntimeError("no configuration of the Triton kernel fits this GPU")
        best = min(times, key=lambda config: times[config])
        us, _ = self.run.timer.checked_us(actions(best), outputs, wanted, f"Triton, {what}, {best}")
        return us, str(best)


def cells(row: dict[str, Any]) -> list[Any]:
    """What the table on the terminal says of a row, in the order of COLUMNS."""
    keys = (
        "us", "plain_us", "triton_us", "cublas_fp16_us", "cublas_bf16_us", "read_us", "plain_read_us", "limit_us"
    )  # fmt: skip
    ratios = (speedup(row, "us"), speedup(row, "limit_us"))
    return [f"{row['N']} x {row['K']}", row["M"], *(row[key] for key in keys), *ratios]
