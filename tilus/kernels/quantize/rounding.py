"""Rounding float weights to codes with scales: round to nearest, under the scale that loses least.

For every group of weights the scale (with a zero point or minimum where the scheme has one) is searched: around the one under
which the largest weight just fits, down to ones that cut it off but are finer for all others, and finally the least-squares
scale of the best codes so far. The one with the least squared error stays. Plain round-to-nearest, the first candidate, is
never better. The search takes some 10 to 25 roundings of the matrix: O(candidates * N * K) time, in pieces of
2^16 weights that stay in a core's cache, spread over the cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, f16, f32, float8_e4m3, float8_e8m0
from tilus.errors import TilusError
from tilus.kernels.quantize.grid import Codes, Floats, Grid
from tilus.kernels.quantize.matrix import QuantizedMatrix

Scheme = Literal["symmetric", "zero", "minimum", "table", "mx", "nv"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
MIN_EXPONENT, MAX_EXPONENT = -127, 127  # of float8_e8m0

# The quantiles of a normal distribution that QLoRA (Dettmers et al., 2023) calls NormalFloat4.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_PIECE = 1 << 16  # weights that are rounded at a time


@dataclass(frozen=True, eq=False)
class Fit:
    """The scale of each group, with its zero point (in numbers of the grid) or minimum: float32 [rows, groups] each."""

    scales: Floats
    zeros: Floats | None = None
    mins: Floats | None = None

    def numbers(self, groups: Floats, grid: Grid) -> Floats:
        """The grid's numbers nearest to weights [rows, groups, group]; those of 0 where the scale is 0."""
        inverse = np.divide(np.float32(1), self.scales, out=np.zeros_like(self.scales), where=self.scales != 0)
        x = groups - self.mins[..., None] if self.mins is not None else groups
        x = x * inverse[..., None]
        if self.zeros is not None:
            x += self.zeros[..., None]
        return grid.nearest(x)

    def values(self, numbers: Floats) -> Floats:
        """What numbers stand for."""
        x = numbers - self.zeros[..., None] if self.zeros is not None else numbers
        x = x * self.scales[..., None]
        if self.mins is not None:
            x += self.mins[..., None]
        return x


@dataclass(frozen=True, eq=False)
class Rule:
    """How groups are fitted: the grid of numbers, the scheme, and the type that scales and minima are rounded to."""

    grid: Grid
    scheme: Scheme
    scale_dtype: DataType
    search: bool
    name: str

    def fit(self, groups: Floats) -> Fit:
        """The best fit of weights [rows, groups, group], each group by itself."""
        candidates = _CANDIDATES[self.scheme](self, groups)
        best = next(candidates)
        if not self.search:
            return best
        numbers = best.numbers(groups, self.grid)
        error = _error(groups, best, numbers)
        for candidate in candidates:
            best, numbers, error = self._better(groups, best, numbers, error, candidate)
        if self.scheme != "mx":
            best, _, _ = self._better(groups, best, numbers, error, self._least_squares(groups, best, numbers))
        return best

    def _better(
        self, groups: Floats, best: Fit, numbers: Floats, error: Floats, candidate: Fit
    ) -> tuple[Fit, Floats, Floats]:
        """Group by group, the better of two fits, with its numbers and error."""
        found = candidate.numbers(groups, self.grid)
        found_error = _error(groups, candidate, found)
        wins = found_error < error

        def choose(old: Floats | None, new: Floats | None) -> Floats | None:
            return None if old is None or new is None else np.where(wins, new, old)

        scales = np.where(wins, candidate.scales, best.scales)
        chosen = Fit(scales, choose(best.zeros, candidate.zeros), choose(best.mins, candidate.mins))
        return chosen, np.where(wins[..., None], found, numbers), np.where(wins, found_error, error)

    def _least_squares(self, groups: Floats, fit: Fit, numbers: Floats) -> Fit:
        """The scale (and minimum) that is best for these numbers; the fit's own where they do not determine it."""
        x = numbers if fit.zeros is None else numbers - fit.zeros[..., None]
        size = np.float32(groups.shape[-1])
        mean_x, mean_w = (x.mean(-1), groups.mean(-1)) if fit.mins is not None else (0.0, 0.0)
        spread = np.einsum("rgk,rgk->rg", x, x) - size * mean_x * mean_x
        shared = np.einsum("rgk,rgk->rg", x, groups) - size * mean_x * mean_w
        scales = np.divide(shared, spread, out=fit.scales.copy(), where=spread > 0)
        mins = None if fit.mins is None else self.round_scales(np.asarray(mean_w - scales * mean_x, np.float32))
        return Fit(self.round_scales(scales), fit.zeros, mins)

    def factors(self) -> Floats:
        """Factors on the scale under which the largest weight fits. The fewer the codes, the more it pays to cut it off; where
        codes lie unevenly it may be better placed on one below the largest."""
        nbits = self.grid.dtype.nbits
        if self.grid.dtype.is_float or self.grid.table is not None:
            return np.linspace(1.5, 0.5, 21, dtype=np.float32)
        if nbits <= 2:
            return np.linspace(1, 0.3, 15, dtype=np.float32)
        return (
            np.linspace(1.15, 0.5, 15, dtype=np.float32) if nbits <= 4 else np.linspace(1.1, 0.8, 9, dtype=np.float32)
        )

    def round_scales(self, scales: Floats) -> Floats:
        """Rounded to the type in which they are stored; what exceeds it becomes its largest number."""
        if self.scale_dtype == f32:
            return scales
        limit = np.float32(self.scale_dtype.max_value)
        return np.asarray(self.scale_dtype.round(np.clip(scales, -limit, limit)), np.float32)

    def round_fitting(self, scales: Floats) -> Floats:
        """The same for what no search can avoid; raises TilusError, with the tensor's name, when it overflows."""
        limit, largest = float(self.scale_dtype.max_value), float(np.abs(scales).max(initial=0.0))
        if largest > limit * (1 + 2.0**-20):  # float32 arithmetic may exceed the scale of a whole matrix by a rounding
            raise TilusError(
                f"{self.name} needs a quantisation scale of {largest:g}, but {self.scale_dtype} holds at most {limit:g}"
            )
        return self.round_scales(scales)


def _error(groups: Floats, fit: Fit, numbers: Floats) -> Floats:
    difference = fit.values(numbers)
    difference -= groups
    return np.einsum("rgk,rgk->rg", difference, difference)


def _symmetric(rule: Rule, groups: Floats) -> Iterator[Fit]:
    place = np.abs(groups).argmax(-1)
    extreme = np.take_along_axis(groups, place[..., None], -1)[..., 0]
    fitting = np.abs(extreme) / np.float32(rule.grid.limit)
    yield Fit(rule.round_fitting(fitting))
    # Two's complement has one more code below zero: it goes to the side of the largest weight.
    if rule.grid.dtype.kind == "int" and rule.grid.table is None:
        fitting = -extreme / np.float32(rule.grid.limit)
    for factor in rule.factors():
        yield Fit(rule.round_scales(fitting * factor))


def _zero(rule: Rule, groups: Floats) -> Iterator[Fit]:
    steps = np.float32(rule.grid.high)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    span = high - low
    zeros = np.rint(np.divide(-low * steps, span, out=np.zeros_like(span), where=span > 0))
    yield Fit(rule.round_fitting(span / steps), zeros)
    for factor in rule.factors():
        yield Fit(rule.round_scales(span * (factor / steps)), zeros)


def _minimum(rule: Rule, groups: Floats) -> Iterator[Fit]:
    low, high = groups.min(-1), groups.max(-1)
    half = (high - low) / 2
    yield Fit(rule.round_fitting((high - low) / np.float32(rule.grid.high)), None, rule.round_fitting(low))
    for factor in rule.factors():
        mins = rule.round_scales(low + half * (1 - factor))
        yield Fit(rule.round_scales(half * (2 * factor / np.float32(rule.grid.high))), None, mins)


def _mx(rule: Rule, groups: Floats) -> Iterator[Fit]:
    """The exponent that OCP Microscaling prescribes, then its neighbours."""
    largest = np.abs(groups).max(-1)
    exponents = np.frexp(largest)[1] - int(np.frexp(rule.grid.high)[1])
    exponents = np.where(largest > 0, exponents, MIN_EXPONENT)
    for step in (0, 1, -1):
        clipped = np.clip(exponents + step, MIN_EXPONENT, MAX_EXPONENT)
        yield Fit(np.ldexp(np.float32(1), clipped).astype(np.float32))


_CANDIDATES: dict[Scheme, Callable[[Rule, Floats], Iterator[Fit]]] = {
    "symmetric": _symmetric,
    "zero": _zero,
    "minimum": _minimum,
    "table": _symmetric,
    "mx": _mx,
    "nv": _symmetric,
}


def quantize(
    weight: Any,
    dtype: DataType,
    group: int | None = None,
    scheme: Scheme | None = None,
    *,
    table: npt.ArrayLike | None = None,
    scale_dtype: DataType = f16,
    search: bool = True,
    name: str = "weight",
) -> QuantizedMatrix:
    """Round a weight to nearest, with the scales that lose least in the mean square.

    weight: [N, K], floats, numpy or torch. group: columns that share a scale, by default K. search: False takes the scale under
    which the largest weight of a group fits. name: of the tensor, for errors. scheme, by default "minimum" for unsigned
    integers and "symmetric" for others:

    - symmetric: value = scale * number; scales of integers may be negative. scale_dtype: f16, bf16 or f32.
    - zero: unsigned codes with an integer zero point from 0 to the largest code.
    - minimum: unsigned codes with a minimum of scale_dtype.
    - table: entries of `table` [2^nbits], by default NF4 for 4 bits.
    - mx: scales are powers of two (e8m0), as in OCP Microscaling.
    - nv: scales of float8_e4m3 and one float32 scale for the matrix, as in NVFP4.

    A group of zeros has scale 0 (2^-127 with mx) and codes of 0, as has a group whose scale underflows scale_dtype; a constant
    group is its minimum where there is one. Raises TilusError for NaN and infinite weights, a group that does not divide K,
    scales that overflow scale_dtype, and schemes that do not go with the type.
    """
    values = as_floats(weight, name)
    n, k = values.shape
    width = group_width(k, group, name)
    rule, global_scale = make_rule(values, dtype, scheme, table, scale_dtype, search, name)
    groups = values.reshape(n, k // width, width)
    step = max(1, _PIECE // k)
    pieces = [groups[i : i + step] for i in range(0, n, step)]

    def work(piece: Floats) -> tuple[Codes, Fit]:
        piece = piece / np.float32(global_scale) if global_scale != 1 else piece
        fit = rule.fit(piece)
        return rule.grid.codes(fit.numbers(piece, rule.grid)), fit

    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1)) as pool:
        done = list(pool.map(work, pieces))
    codes = np.concatenate([codes for codes, _ in done]).reshape(n, k)
    return as_matrix(codes, [fit for _, fit in done], rule, global_scale)


def make_rule(
    values: Floats, dtype: DataType, scheme: Scheme | None, table: npt.ArrayLike | None, scale_dtype: DataType,
    search: bool, name: str,
) -> tuple[Rule, float]:  # fmt: skip
    """The rule of `quantize`'s arguments, and the scale of the whole matrix."""
    unsigned = dtype.kind == "uint"
    chosen: Scheme = scheme or ("minimum" if unsigned else "symmetric")
    if unsigned != (chosen in ("zero", "minimum", "table")):
        fitting = "zero, minimum or table" if unsigned else "symmetric, mx or nv"
        raise TilusError(f"scheme {chosen!r} with codes of {dtype}, expected {fitting} for this type")
    if (table is not None) and chosen != "table":
        raise TilusError(f"a table with scheme {chosen!r}, expected scheme 'table'")
    entries = None
    if chosen == "table":
        entries = np.asarray(NF4 if table is None else table, np.float32)
        if entries.shape != (dtype.num_codes,) or not np.isfinite(entries).all() or not entries.any():
            raise TilusError(
                f"a table of shape {list(entries.shape)}, expected {dtype.num_codes} finite numbers for {dtype}"
            )
    grid, global_scale = Grid(dtype, entries), 1.0
    if chosen == "mx":
        scale_dtype = float8_e8m0
    elif chosen == "nv":
        scale_dtype = float8_e4m3
        # Its reciprocal is what NVFP4 files store, so that one is a float32.
        largest = float(np.abs(values).max(initial=0.0))
        global_scale = 1 / float(np.float32(grid.limit * scale_dtype.max_value / largest)) if largest else 1.0
    return Rule(grid, chosen, scale_dtype, search, name), global_scale


def as_matrix(codes: Codes, fits: list[Fit], rule: Rule, global_scale: float) -> QuantizedMatrix:
    """Codes [N, K] with the fits of consecutive rows."""

    def join(parts: list[Floats | None]) -> Floats | None:
        present = [part for part in parts if part is not None]
        return np.concatenate(present) if present else None

    zeros = join([fit.zeros for fit in fits])
    return QuantizedMatrix(
        codes,
        np.concatenate([fit.scales for fit in fits]),
        join([fit.mins for fit in fits]),
        rule.grid.dtype,
        zeros=None if zeros is None else zeros.astype(np.int16),
        table=rule.grid.table,
        global_scale=global_scale,
        scale_dtype=rule.scale_dtype,
    )


def group_width(k: int, group: int | None, name: str) -> int:
    """Columns that share a scale; raises TilusError, with the tensor's name, when that does not divide K."""
    width = k if group is None else group
    if width < 1 or k % width:
        raise TilusError(
            f"{name}: groups of {width} do not divide K = {k}", hint="choose a group that divides K, or K itself"
        )
    return width


def as_floats(weight: Any, name: str) -> Floats:
    """A weight [N, K] as float32; raises TilusError when it is no matrix or has values that are not finite."""
    array = weight.detach().float().cpu().numpy() if hasattr(weight, "detach") else np.asarray(weight)
    values = np.ascontiguousarray(array, np.float32)
    if values.ndim != 2 or not values.size:
        raise TilusError(f"{name} has shape {list(values.shape)}, expected a matrix [N, K]")
    finite = np.isfinite(values)
    if not finite.all():
        row, column = (int(x) for x in np.argwhere(~finite)[0])
        raise TilusError(
            f"{name} has {finite.size - int(finite.sum())} weights that are not finite, the first {values[row, column]} at "
            f"[{row}, {column}]",
            hint="weights must be finite: the checkpoint is damaged, or its training diverged",
        )
    return values
