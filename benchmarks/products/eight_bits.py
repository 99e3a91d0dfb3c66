"""Activations in 8 bits: `gemm` with 8-bit weights and `w4a8_linear` with 4-bit ones, beside torch's products and pure reads.

Codes of float8 are small integers, so that sums are exact on tensor cores that keep few bits of them, and results can be checked.
torch multiplies int8 for more than 16 tokens only: for fewer, it gets TORCH_TOKENS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import tilus
from products.dense import FLOAT8_SUM_NBITS
from products.limits import product_us
from products.run import Run, outputs_like
from products.timing import ACTIVATIONS, in_turn
from products.weights import Case, Expected, expected, random_weight
from tilus.kernels import gemm, quantize_tokens, w4a8_linear

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # N, K
TOKENS = (16, 256, 1, 64, 4096)
KINDS = (
    ("int8", "int8"),
    ("float8_e4m3", "float8_e4m3"),
    ("int4", "int8"),
    ("int4", "float8_e4m3"),
)  # weight, activations
TORCH = {"int8": torch.int8, "float8_e4m3": torch.float8_e4m3fn}
TORCH_TOKENS = 32  # what torch's int8 product gets for 16 and fewer
PEAK_FACTOR = 2.0  # of the speed of bf16
COLUMNS = {
    "N x K": 13, "M": 6, "weight": 12, "act": 12, "us": 10, "torch": 10, "ratio": 8, "read": 10, "limit": 10, "quantise": 10,
}  # fmt: skip


def rows(run: Run, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each shape, number of tokens and kind; see gemm.py for its keys."""
    for shape in shapes:
        for kind in KINDS:
            if run.budget.exhausted:
                return
            operand = Operand(run, shape, *kind)
            for m in tokens:
                if run.budget.exhausted:
                    return
                yield operand.row(m)


def codes(rows: int, columns: int, dtype: torch.dtype, device: str = "cuda") -> torch.Tensor:
    """All of int8 but -128, or integers of -4 to 4."""
    most = 127 if dtype == torch.int8 else 4
    return torch.randint(-most, most + 1, (rows, columns), device=device).float().to(dtype)


def paired(x: torch.Tensor) -> torch.Tensor:
    """The columns of codes as `quantize_tokens(paired=True)` writes them."""
    parts = x.view(torch.uint8).reshape(x.shape[0], -1, 2, 4, 2).permute(0, 1, 3, 4, 2)
    return parts.reshape(x.shape).contiguous().view(x.dtype)


class Operand:
    """A weight of one kind and its copies."""

    def __init__(self, run: Run, shape: tuple[int, int], weight: str, act: str) -> None:
        self.run, self.shape, self.weight, self.act = run, shape, weight, act
        n, k = shape
        if weight == "int4":
            self.random = random_weight(Case(shape, "int4"))
            self.copies: list[Any] = run.packed_copies(self.random)
            self.values = self.random.rounded(torch.float64)
        else:
            self.copies = run.copies_of(codes(n, k, TORCH[weight]))
            self.w_scale = torch.rand(n, device="cuda") / (1000 * k**0.5)
            self.values = self.copies[0].double() * self.w_scale.double()[:, None]

    def product(self, x_scale: torch.Tensor) -> Any:
        if self.weight == "int4":
            return lambda x, w, y: w4a8_linear(x, x_scale, w, out=y)
        return lambda x, w, y: gemm(x, w, x_scale=x_scale, w_scale=self.w_scale, out=y, constant=True)

    def row(self, m: int) -> dict[str, Any]:
        run, (n, k) = self.run, self.shape
        xs, x_scale = [codes(m, k, TORCH[self.act]) for _ in range(ACTIVATIONS)], torch.rand(m, device="cuda") / 8
        wanted = [self.expected(x, x_scale) for x in xs]
        outputs = outputs_like(wanted, torch.bfloat16)
        given = [paired(x) for x in xs] if self.weight == "int4" else xs
        what = f"{self.weight} x {self.act}, {n} x {k}, M = {m}"
        actions = in_turn(self.product(x_scale), given, self.copies, outputs)
        ours = run.attempt("us", lambda: run.timer.checked_us(actions, outputs, wanted, f"tilus, {what}"))
        peer = None
        if self.weight != "int4":
            tried = [
                run.attempt("torch_us", lambda f=f: run.timer.us(self.torch_actions(xs, x_scale, f)))
                for f in self.ways_to_add
            ]
            peer = min((us for us in tried if us is not None), default=None)
        half = torch.randn(m, k, device="cuda").half()
        dtype = tilus.int8 if self.act == "int8" else tilus.float8_e4m3
        quantise = run.attempt("quantise_us", lambda: run.timer.us([lambda: quantize_tokens(half, dtype)]))
        read_us, _ = run.reads.us(self.copies[0].nbytes // 16 * 16)
        us = ours and ours[0]
        return {
            "N": n, "K": k, "M": m, "dtype": self.weight, "act": self.act, "us": us,
            **(ours[1] if ours else {"error": None, "rms": None}), "torch_us": peer,
            "ratio": round(peer / us, 3) if us and peer else None, "read_us": read_us,
            "limit_us": round(max(read_us, product_us(n, k, m, run.tflops * PEAK_FACTOR)), 3),
            "quantise_us": quantise, "failures": run.taken_failures(),
        }  # fmt: skip

    def expected(self, x: torch.Tensor, x_scale: torch.Tensor) -> Expected:
        sum_nbits = 23 if self.act == "int8" else FLOAT8_SUM_NBITS
        plain = expected(x, lambda a, b: self.values[a:b], self.shape[0], torch.bfloat16, sum_nbits=sum_nbits)
        scale = x_scale.double()[:, None]
        return Expected(plain.exact * scale, plain.bound * scale + 2.0**-20 * plain.exact.abs() * scale, plain.rms)

    @property
    def ways_to_add(self) -> tuple[bool, ...]:
        """See `fast` of `torch_actions`."""
        return (False,) if self.act == "int8" else (True, False)

    def torch_actions(self, xs: Sequence[torch.Tensor], x_scale: torch.Tensor, fast: bool) -> list[Any]:
        """Scales of rows for float8, the bare 32-bit sums for int8, of TORCH_TOKENS where there are 16 tokens and fewer.

        fast: sums of float8 as the tensor cores keep them, as ours are, not moved to f32 in between.
        """
        if self.act == "int8":
            missing = TORCH_TOKENS - xs[0].shape[0] if xs[0].shape[0] <= 16 else 0
            padded = [torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in xs]
            return in_turn(lambda x, w, _: torch._int_mm(x, w.T), padded, self.copies, padded)
        by_row, by_column = x_scale[:, None], self.w_scale[None]
        return in_turn(
            lambda x, w, _: torch._scaled_mm(
                x, w.T, scale_a=by_row, scale_b=by_column, out_dtype=torch.bfloat16, use_fast_accum=fast
            ),
            xs, self.copies, list(xs),
        )  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    keys = ("M", "dtype", "act", "us", "torch_us", "ratio", "read_us", "limit_us", "quantise_us")
    return [f"{row['N']} x {row['K']}", *(row[key] for key in keys)]
