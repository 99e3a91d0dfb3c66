"""Products of matrices that are not quantised: `tilus.kernels.gemm`, y = x W^T, beside torch's.

The shapes are square ones, ragged ones, a long K, and layers of language models from one token on. Weights are constant, as those
of a layer are, so that kernels ask for them while the one in front of them ends. What exceeds the L2 cache is never found there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from products.limits import product_us
from products.run import Run, outputs_like
from products.timing import ACTIVATIONS, in_turn
from products.weights import Expected, expected

LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096))  # N, K
SHAPES = (
    (8192, 8192, 8192), (4096, 4096, 4096), (2048, 2048, 2048), (1000, 4104, 4104), (1000, 4112, 4112), (333, 1000, 3000),
    (333, 1008, 3008), (512, 512, 16384), *((m, n, k) for n, k in LAYERS for m in (1, 16, 64, 128, 256)), (4096, 14336, 4096),
    (4096, 4096, 14336),
)  # fmt: skip
"""M, N, K"""
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn}
ROW_MULTIPLE_NBYTES = 16  # of rows of operands, for tensor copies
FLOAT8_SUM_NBITS = 13  # of tensor cores of Hopper (DeepSeek-V3, arXiv 2412.19437, section 3.3.2: about 14 bits in all)
PEAK_FACTOR = {"f16": 1.0, "bf16": 1.0, "float8_e4m3": 2.0}  # of the speed of bf16
COLUMNS = {"M x N x K": 20, "type": 13, "us": 10, "torch": 10, "ratio": 8, "TFLOP/s": 9, "read": 10, "limit": 10}
MOST_READ_TOKENS = 256  # for more, reading the weight takes no part in the limit


def is_available() -> bool:
    """Whether this version of tilus has the kernel."""
    return importlib.util.find_spec("tilus.kernels.gemm") is not None


def rows(run: Run, shapes: Sequence[tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    """A row for each shape and type that both kernels take; see gemm.py for its keys."""
    for m, n, k in shapes:
        for name in DTYPES:
            if run.budget.exhausted:
                return
            if k * DTYPES[name].itemsize % ROW_MULTIPLE_NBYTES == 0:
                yield row(run, m, n, k, name)


def row(run: Run, m: int, n: int, k: int, name: str) -> dict[str, Any]:
    from tilus.kernels import gemm

    dtype = DTYPES[name]
    out = torch.bfloat16 if dtype.itemsize == 1 else dtype
    xs = [torch.randn(m, k, device="cuda").to(dtype) for _ in range(ACTIVATIONS)]
    weights = run.copies_of((torch.randn(n, k, device="cuda") / k**0.5).to(dtype))
    values, sum_nbits = weights[0].float(), FLOAT8_SUM_NBITS if dtype.itemsize == 1 else 23
    what = f"{name} {m} x {n} x {k}"

    def timed(product: Any, roundings: int, who: str) -> tuple[float, dict[str, float]]:
        wanted: list[Expected] = [
            expected(x, lambda a, b: values[a:b].double(), n, out, roundings=roundings, sum_nbits=sum_nbits) for x in xs
        ]
        outputs = outputs_like(wanted, out)
        return run.timer.checked_us(in_turn(product, xs, weights, outputs), outputs, wanted, f"{who}, {what}")

    ours = run.attempt("us", lambda: timed(lambda x, w, y: gemm(x, w, out=y, constant=True), 1, "tilus"))
    tried = [run.attempt("torch_us", lambda p=p: timed(p, 4, "torch")) for p in _torch_products(dtype)]
    torch_us = min((found[0] for found in tried if found is not None), default=None)
    us = ours and ours[0]
    read_us = run.reads.us(weights[0].nbytes // 16 * 16)[0] if m <= MOST_READ_TOKENS else None
    return {
        "M": m, "N": n, "K": k, "dtype": name, "us": us, **(ours[1] if ours else {"error": None, "rms": None}),
        "torch_us": torch_us, "ratio": round(torch_us / us, 3) if us and torch_us else None,
        "tflops": us and round(2 * m * n * k / us * 1e-6, 1),
        "read_us": read_us, "limit_us": round(max(read_us or 0, product_us(n, k, m, run.tflops * PEAK_FACTOR[name])), 3),
        "failures": run.taken_failures(),
    }  # fmt: skip


def _torch_products(dtype: torch.dtype) -> list[Any]:
    """Of float8 with sums as the tensor cores keep them, as ours are, and with sums that are moved to f32 in between."""
    if dtype.itemsize > 1:
        return [lambda x, w, y: torch.mm(x, w.T, out=y)]
    one = torch.ones((), device="cuda")
    return [
        lambda x, w, y, fast=fast: torch._scaled_mm(
            x, w.T, scale_a=one, scale_b=one, out_dtype=y.dtype, out=y, use_fast_accum=fast
        )
        for fast in (True, False)
    ]


def cells(row: dict[str, Any]) -> list[Any]:
    keys = ("dtype", "us", "torch_us", "ratio", "tflops", "read_us", "limit_us")
    return [f"{row['M']} x {row['N']} x {row['K']}", *(row[key] for key in keys)]
