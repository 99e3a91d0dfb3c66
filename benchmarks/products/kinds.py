"""Every type of codes, and every scheme, at one shape and few tokens: how close products come to a pure read of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

import tilus
from products.limits import read_bar
from products.run import Run, activations, products_with
from products.weights import GROUP, Case, random_weight

TYPES = (
    "uint1", "uint2", "int2", "int3", "int4", "uint4", "float4_e2m1", "int5", "float5_e2m2", "int6", "float6_e3m2", "int7",
    "int8", "float8_e4m3",
)  # fmt: skip
SHAPE = (8192, 8192)
TOKENS = (1, 16)
COLUMNS = {
    "N x K": 13, "M": 6, "type": 13, "scheme": 18, "group": 7, "us": 9, "plain": 9, "read": 9, "plain read": 12, "ratio": 7,
    "plain ratio": 13, "bar": 6, "cuBLAS": 9,
}  # fmt: skip


def type_cases(shapes: Sequence[tuple[int, int]]) -> list[Case]:
    """Symmetric; integers with zero points, too."""
    cases = [Case(shape, name) for shape in shapes for name in TYPES]
    integers = [case for case in cases if tilus.dtype(case.dtype).is_integer]
    return cases + [replace(case, scheme="zero points") for case in integers]


def scheme_cases(shapes: Sequence[tuple[int, int]]) -> list[Case]:
    """Scheme, type and group as checkpoints have them."""
    kinds = (
        ("uint4", "zero points", 128),  # AWQ, GPTQ
        ("uint4", "activation order", 128),  # GPTQ with desc_act
        ("uint4", "minimums", 32),  # Q4_1, Q4_K
        ("int8", "symmetric", 32),  # Q8_0
        ("int4", "symmetric", None),  # one scale for a row
        ("float4_e2m1", "powers of two", 32),  # MXFP4
        ("float4_e2m1", "two levels", 16),  # NVFP4
        ("uint4", "table", 64),  # NF4
    )
    return [
        Case(shape, name, scheme, shape[1] if group is None else group)
        for shape in shapes
        for name, scheme, group in kinds
    ]


def rows(run: Run, cases: Sequence[Case], tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each case and M; see gemm.py for its keys."""
    cublas = Cublas(run)
    for case in cases:
        if run.budget.exhausted:
            return
        weight = random_weight(case)
        packed = run.packed_copies(weight)
        for m in tokens:
            if run.budget.exhausted:
                return
            xs = activations(m, case.shape[1])
            found = run.linear_us(xs, packed, products_with(weight, xs), f"{case}, M = {m}")
            peer = cublas.us(case.shape, m)
            yield entry(case, m, found, run.reads.us(packed[0].nbytes), peer, run.taken_failures())


class Cublas:
    """fp16 products, measured once for each shape and M."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._found: dict[tuple[tuple[int, int], int], float | None] = {}

    def us(self, shape: tuple[int, int], m: int) -> float | None:
        if (shape, m) not in self._found:
            self._found[shape, m] = self._run.attempt("cublas_fp16_us", lambda: self._measured(shape, m))
        return self._found[shape, m]

    def _measured(self, shape: tuple[int, int], m: int) -> float:
        n, k = shape
        weights = self._run.copies_of((torch.randn(n, k, device="cuda") / k**0.5).half())
        return self._run.torch_us(activations(m, k), weights, f"cuBLAS fp16 {n} x {k}, M = {m}")


def entry(
    case: Case, m: int, found: dict[str, Any], reads: tuple[float, float], cublas_us: float | None, failures: dict[str, str]
) -> dict[str, Any]:  # fmt: skip
    """The ratios are of like to like: both kernels with dependent launch, or none. Schemes that cost more have no bar."""
    read_us, plain_read_us = reads
    is_judged = case.group == GROUP and case.scheme in ("symmetric", "zero points")
    bar = read_bar(tilus.dtype(case.dtype).nbits) if is_judged else None
    ratio = None if found["us"] is None else round(found["us"] / read_us, 3)
    plain = None if found["plain_us"] is None else round(found["plain_us"] / plain_read_us, 3)
    return {
        "N": case.shape[0], "K": case.shape[1], "M": m, "dtype": case.dtype, "scheme": case.scheme, "group": case.group,
        **found, "read_us": read_us, "plain_read_us": plain_read_us, "ratio": ratio, "plain_ratio": plain,
        "bar": bar, "met": None if bar is None else ratio is not None and ratio <= bar,
        "cublas_fp16_us": cublas_us, "failures": failures,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    keys = (
        "M", "dtype", "scheme", "group", "us", "plain_us", "read_us", "plain_read_us", "ratio", "plain_ratio", "bar",
        "cublas_fp16_us",
    )  # fmt: skip
    return [f"{row['N']} x {row['K']}", *(row[key] for key in keys)]
