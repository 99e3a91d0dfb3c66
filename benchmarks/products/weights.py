"""Random quantised weights on a device, and float64 products with them that share nothing with packing or kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import tilus
from tilus.kernels.quantize import QuantizedMatrix, QuantizedWeight, pack

GROUP = 128
ROWS = 2048  # of a weight that are float64 at a time


@dataclass(frozen=True)
class Case:
    """A kind of weight: [N, K] codes of a type, and how their scales are organised.

    signed: half of the scales are negative, so that the weight has no mean, which a chain of layers would raise to a power.
    """

    shape: tuple[int, int]
    dtype: str
    scheme: str = "symmetric"
    group: int = GROUP
    signed: bool = False


@dataclass(frozen=True, eq=False)
class RandomWeight:
    """A weight as it was before packing, in tensors on the device.

    codes: uint8 [N, K]. numbers: float64 [codes of the type], what each stands for. scales, zeros, mins: float64
    [N, K / group], the global scale in the scales. columns: int64 [K].
    """

    matrix: QuantizedMatrix
    codes: torch.Tensor
    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    mins: torch.Tensor | None
    columns: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of the weight, float64: exact, since factors and codes have few digits."""
        scales = self.scales[first:last, :, None]
        values = self.numbers[self.codes[first:last].long()].view(*scales.shape[:2], -1)
        if self.zeros is not None:
            values = values - self.zeros[first:last, :, None]
        values = values * scales
        if self.mins is not None:
            values = values + self.mins[first:last, :, None]
        values = values.view(last - first, -1)
        if self.columns is None:
            return values
        ordered = torch.empty_like(values)
        ordered[:, self.columns] = values
        return ordered

    @functools.cached_property
    def offset(self) -> float:
        """The largest part of a weight that a kernel may multiply on its own."""
        return 0.0 if self.mins is None else float(self.mins.abs().max())

    def pack(self) -> QuantizedWeight:
        return pack(self.matrix, self.codes.device)

    def rounded(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight [N, K], each value rounded to a type."""
        n, k = self.shape
        out = torch.empty(n, k, dtype=dtype, device=self.codes.device)
        for first in range(0, n, ROWS):
            out[first : first + ROWS] = self.rows(first, min(first + ROWS, n)).to(dtype)
        return out


def random_weight(case: Case, device: str = "cuda", seed: int = 0) -> RandomWeight:
    """All finite codes of the type are equally likely; scales are such that y has about the size of x."""
    generator = torch.Generator(device).manual_seed(seed)
    rng = np.random.default_rng(seed)
    dtype = tilus.dtype(case.dtype)
    n, k = case.shape
    groups = (n, k // case.group)
    decoded = np.float64(dtype.decode(np.arange(dtype.num_codes, dtype=np.uint8)))
    usable = torch.tensor(np.flatnonzero(np.isfinite(decoded)), dtype=torch.uint8, device=device)
    picked = torch.randint(len(usable), (n, k), dtype=torch.int32, device=device, generator=generator)
    codes = usable[picked]
    scales, scale_dtype, global_scale = _scales(case.scheme, rng, groups, _size(decoded) * math.sqrt(k))
    if case.signed:
        scales = scales * rng.choice(np.float32([-1, 1]), groups)
    zeros = mins = table = columns = None
    if case.scheme in ("zero points", "activation order"):
        zeros = rng.integers(dtype.min_value, int(dtype.max_value) + 1, groups).astype(np.int16)
        columns = rng.permutation(k).astype(np.int32) if case.scheme == "activation order" else None
    if case.scheme == "minimums":
        mins = tilus.f16.round(-scales * np.float32(dtype.max_value / 2))
    if case.scheme == "table":
        table = tilus.f16.round(np.sort(rng.uniform(-1, 1, 16)))  # in the activations' type, so that nothing is rounded
        scales = scales * np.float32(8)
    matrix = QuantizedMatrix(
        codes.cpu().numpy(), scales, mins, dtype, zeros, table, columns, global_scale, scale_dtype
    )  # fmt: skip

    def double(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.tensor(array, dtype=torch.float64, device=device)

    numbers = double(decoded if table is None else table)
    order = None if columns is None else torch.tensor(columns, dtype=torch.int64, device=device)
    return RandomWeight(matrix, codes, numbers, double(scales) * global_scale, double(zeros), double(mins), order)


def _size(decoded: np.ndarray) -> float:
    """The root mean square of the finite numbers of a type."""
    return float(np.sqrt(np.mean(decoded[np.isfinite(decoded)] ** 2)))


def _scales(
    scheme: str, rng: np.random.Generator, groups: tuple[int, int], size: float
) -> tuple[np.ndarray, tilus.dtypes.DataType, float]:
    """Scales of about 1 / size: float32 numbers of their type, the type, and the global scale."""
    if scheme == "powers of two":
        powers = rng.integers(-1, 2, groups) - round(math.log2(size))
        return np.float32(2.0) ** powers, tilus.float8_e8m0, 1.0
    if scheme == "two levels":
        levels = tilus.float8_e4m3.round(rng.uniform(1, 448, groups))
        return levels, tilus.float8_e4m3, 2.0 ** -round(math.log2(224 * size))
    return tilus.f16.round(rng.uniform(0.5, 1.5, groups) / size), tilus.f16, 1.0


class WrongResult(SystemExit):
    """A product that would have been timed is wrong. Not an Exception: nothing that goes on after failures catches it."""


@dataclass(frozen=True, eq=False)
class Expected:
    """A product in float64, [M, N], and by how much each element may differ.

    The bound is that of K additions in f32 in any order plus one rounding to the type of the result. It is wide for
    large K, so the root mean square of all differences has a bound, too: `rms` times that of the product.
    """

    exact: torch.Tensor
    bound: torch.Tensor
    rms: float

    def check(self, y: torch.Tensor, what: str) -> dict[str, float]:
        """{error: the largest difference in parts of its bound, rms: relative}. Raises WrongResult."""
        difference = y.double() - self.exact
        error = float((difference.abs() / self.bound).max())
        rms = float(difference.norm() / self.exact.norm())
        if not error <= 1:
            raise WrongResult(f"{what}: an element is off by {error:.3g} times what rounding explains")
        if not rms <= self.rms:
            raise WrongResult(
                f"{what}: off by {rms:.3g} of the product in the root mean square, expected {self.rms:.3g}"
            )
        return {"error": round(error, 4), "rms": float(f"{rms:.3g}")}


def expected(
    x: torch.Tensor, rows: Callable[[int, int], torch.Tensor], n: int, out: torch.dtype,
    *, offset: float = 0.0, roundings: int = 1, sum_nbits: int = 23,
) -> Expected:  # fmt: skip
    """x [M, K] times the transpose of the weight whose float64 rows `rows(first, last)` gives.

    out: type of the result. roundings: how many values of that type, or weights that were rounded to it, make an element.
    sum_nbits: bits behind the leading one that sums keep of the largest of their terms.
    """
    wide = x.float().double()
    exact = torch.empty(x.shape[0], n, dtype=torch.float64, device=x.device)
    size = torch.empty_like(exact)
    for first in range(0, n, ROWS):
        last = min(first + ROWS, n)
        part = rows(first, last)
        exact[:, first:last] = wide @ part.T
        size[:, first:last] = wide.abs() @ (part.abs() + 2 * offset).T
    unit = torch.finfo(out).eps / 2
    bound = (
        max((x.shape[1] + 8) * 2.0**-23, 2.0 ** (1 - sum_nbits)) * size
        + unit * exact.abs()
        + torch.finfo(out).tiny * unit
    )
    if roundings > 1:
        bound += (roundings - 1) * unit * size
    return Expected(exact, bound, roundings * unit)
