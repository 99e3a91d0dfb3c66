"""Which blocks are active: True (all), False (none), or an array of bool [gx, gy, gz] that holds both values.

Control flow that all blocks take alike never leaves True and False, so it costs no array operation.
"""

from __future__ import annotations

from tilus.runtime.reference.affine import BoolArray, settle_mask

Mask = bool | BoolArray


def meet(a: Mask, b: Mask) -> Mask:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return settle_mask(a & b)


def join(a: Mask, b: Mask) -> Mask:
    if isinstance(a, bool):
        return True if a else b
    if isinstance(b, bool):
        return True if b else a
    return settle_mask(a | b)


def invert(mask: Mask) -> Mask:
    return not mask if isinstance(mask, bool) else ~mask
