"""Rotary position embedding inside of a kernel, and the norm of heads in front of it.

J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864, with the pairs of Hugging Face's
models: element i of a head's first half goes with element i of its second half.
"""

from __future__ import annotations

from typing import Any

import tilus


def normed(halves: Any, weight: Any, eps: Any) -> Any:
    """The two halves [heads, D/2] of heads, each head divided by its root mean square and multiplied by a weight [D]; as they
    are where there is none."""
    if weight is None:
        return halves
    low, high = halves
    half = low.shape[1]
    squares = tilus.sum(low * low, 1, keepdims=True) + tilus.sum(high * high, 1, keepdims=True)
    inverse = tilus.rsqrt(squares / (2 * half) + eps)
    first, second = (tilus.load(weight, [at], [half]).reshape([1, half]) for at in (0, half))
    return low * inverse * first, high * inverse * second


def rotated(halves: Any, cos_sin: Any, position: Any) -> Any:
    """The two halves [heads, D/2] of heads, turned by the angles of a position."""
    low, high = halves
    half = low.shape[1]
    cos, sin = (tilus.load(cos_sin, [position, at], [1, half]) for at in (0, half))
    return low * cos - high * sin, high * cos + low * sin
