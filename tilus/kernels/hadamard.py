"""The Hadamard transform of heads inside of a kernel: sums and differences, which spread what is in few elements over all."""

from __future__ import annotations

from typing import Any

import tilus
from tilus import f32


def mixed(low: Any, high: Any) -> Any:
    """The Hadamard transform of heads whose halves [heads, D/2] are given, orthonormal: of all elements where D is a power of
    two, else of runs of as many as the largest one that divides D, in each half."""
    half = low.shape[1]
    run = half & -half
    if run == half:
        low, high = low + high, low - high
    factor = (2 * run if run == half else run) ** -0.5
    return butterflies(low, run) * factor, butterflies(high, run) * factor


def butterflies(x: Any, run: int) -> Any:
    """Sums and differences [rows, columns] of each run of elements, at distances 1, 2, 4, ..."""
    rows, columns = x.shape
    distance = 1
    while distance < run:
        pairs = x.reshape([rows, columns // (2 * distance), 2, distance])
        second = tilus.arange(2, shape=[1, 1, 2, 1], axis=2).to(f32)
        x = (tilus.sum(pairs, 2, keepdims=True) - pairs * (second * 2.0)).reshape([rows, columns])  # a + b, a - b
        distance *= 2
    return x
