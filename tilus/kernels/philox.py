"""Random numbers as a function of a key and a counter: Philox 4x32 with ten rounds, for kernels.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A number depends on
nothing but its key and counter, so that whoever needs it computes it, in any order.
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import f32

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Below this, a logarithm of 1 - v would lose the last digits of v.
_SMALL = 2.0**-5
_LOG2_E = 1.4426950408889634


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Four words of 32 random bits for each counter. counter, key: tiles of uint32 that broadcast to one shape."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for step in tilus.static_range(ROUNDS):
        if step > 0:
            k0, k1 = k0 + KEY_STEPS[0], k1 + KEY_STEPS[1]
        high0, low0 = tilus.multiply_high(x0, MULTIPLIERS[0]), x0 * MULTIPLIERS[0]
        high1, low1 = tilus.multiply_high(x2, MULTIPLIERS[1]), x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
    return x0, x1, x2, x3


def log2_exponential(word: Any) -> Any:
    """log2 of a number from the exponential distribution with mean log2(e), from 32 random bits: a tile of f32.

    With v = (word + 1/2) / 2^32 it is log2(-log2(1 - v)). Small v, which win races, keep all digits: the series of the logarithm.
    """
    v = tilus.minimum((word.to(f32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    series = tilus.fma(v, tilus.fma(v, tilus.fma(v, tilus.fma(v, 0.2, 0.25), 1 / 3), 0.5), 1.0) * v * _LOG2_E
    return tilus.log2(tilus.where(v < _SMALL, series, -tilus.log2(1.0 - v)))
