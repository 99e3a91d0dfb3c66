"""Rotary position embedding inside of a kernel.

J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864, with the pairs of Hugging Face's
models: element i of a head's first half goes with element i of its second half.
"""

from __future__ import annotations

from typing import Any

import tilus


def rotated(halves: Any, cos_sin: Any, position: Any) -> Any:
    """The two halves [heads, D/2] of heads, turned by the angles of a position."""
    low, high = halves
    half = low.shape[1]
    cos, sin = (tilus.load(cos_sin, [position, at], [1, half]) for at in (0, half))
    return low * cos - high * sin, high * cos + low * sin
