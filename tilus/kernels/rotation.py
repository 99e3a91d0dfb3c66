"""Rotary position embedding inside of a kernel, and the norm of heads in front of it.

J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864, with the pairs of Hugging Face's
models: element i of a head's first half goes with element i of its second half.
"""

from __future__ import annotations

from typing import Any

import tilus


def loaded_norm(weight: Any, half: int) -> Any:
    """The two halves [1, D/2] of a norm's weight [D]; None without one."""
    return None if weight is None else [tilus.load(weight, [at], [half]).reshape([1, half]) for at in (0, half)]


def normed(halves: Any, weight: Any, eps: Any) -> Any:
    """The two halves [heads, D/2] of heads, each head divided by its root mean square and multiplied by a weight, whose halves
    are given; as they are where there is none."""
    if weight is None:
        return halves
    low, high = halves
    half = low.shape[1]
    squares = tilus.sum(low * low, 1, keepdims=True) + tilus.sum(high * high, 1, keepdims=True)
    inverse = tilus.rsqrt(squares / (2 * half) + eps)
    return low * inverse * weight[0], high * inverse * weight[1]


def angles_of(cos_sin: Any, position: Any, half: int) -> Any:
    """Cosines and sines [1, D/2] of a position's angles."""
    return [tilus.load(cos_sin, [position, at], [1, half]) for at in (0, half)]


def rotated(halves: Any, angles: Any) -> Any:
    """The two halves [heads, D/2] of heads, turned by the angles of a position. Which products are rounded is said and not left
    to a compiler, whose choice could depend on how many heads there are."""
    low, high = halves
    cos, sin = angles
    return tilus.fma(low, cos, -(high * sin)), tilus.fma(high, cos, low * sin)
