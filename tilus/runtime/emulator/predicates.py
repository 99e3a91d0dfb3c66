"""Comparison and selection (PTX ISA 9.7.6): setp, set, selp, slct, and logic on predicates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tilus.ptx.module import Pair
from tilus.runtime.emulator.decode import PAIRS, Array, Mask, Site, Step, instruction
from tilus.runtime.emulator.floating import widen
from tilus.runtime.emulator.rounding import flush

_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_COMPARISONS = (*_ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _comparison(site: Site, type_name: str) -> Callable[[Array, Array], Array]:
    """The boolean function of the comparison operator. Ordered ones are false on NaN, `..u` ones true."""
    operator = site.one_of(*_COMPARISONS)
    if operator is None:
        raise site.unsupported("a comparison without an operator", f"expected one of {', '.join(_COMPARISONS)}")
    if "f" not in type_name:
        return _ORDERED[operator]
    ftz = site.has("ftz") and type_name == "f32"

    def compare(a: Array, b: Array) -> Array:
        x, y = (flush(a), flush(b)) if ftz else (a, b)
        x, y = widen(x, type_name), widen(y, type_name)
        unordered = np.isnan(x) | np.isnan(y)
        if operator in ("num", "nan"):
            return unordered if operator == "nan" else ~unordered
        if operator in _ORDERED:
            return _ORDERED[operator](x, y) & ~unordered
        return _ORDERED[operator[:-1]](x, y) | unordered

    return compare


@instruction("setp")
def set_predicate(site: Site) -> Step:
    """setp.cmp{.bool}{.ftz}.type p{|q}, a, b{, {!}c}: p = (a cmp b) bool c and q = !(a cmp b) bool c.

    For packed pairs p belongs to the low half and q to the high one.
    """
    site.allow(*_COMPARISONS, *_COMBINE, "ftz")
    type_name = site.type()
    combine = site.one_of(*_COMBINE)
    site.expect_operands(4 if combine else 3)
    target = site.operands[0]
    firsts = (target.first, target.second) if isinstance(target, Pair) else (target,)
    outs = [site.target(operand, "pred") for operand in firsts]
    compare = _comparison(site, type_name)
    a, b = site.source(1, type_name), site.source(2, type_name)
    packed = type_name in PAIRS
    if not combine and not packed and len(outs) == 1:
        return site.elementwise(compare, outs[0], a, b)
    third = site.predicate(site.operands[3]) if combine else None

    def step(mask: Mask) -> None:
        result = compare(a, b)
        values = [result[:, 0], result[:, 1]] if packed else [result, ~result]
        if combine and third is not None:
            values = [_COMBINE[combine](value, third()) for value in values]
        for out, value in zip(outs, values[: len(outs)], strict=True):
            np.copyto(out, value, where=True if mask is None else mask)

    return step


@instruction("set")
def set_value(site: Site) -> Step:
    """set.cmp{.ftz}.dtype.stype d, a, b: all ones (integers) or 1.0 (floats) where true."""
    site.allow(*_COMPARISONS, "ftz")
    site.expect_operands(3)
    result, type_name = site.type(0), site.type(1)
    compare = _comparison(site, type_name)
    out = site.target(0, result)
    true = {"f32": np.float32(1), "f16": np.float16(1), "f16x2": np.float16(1), "bf16": np.uint16(0x3F80)}.get(result)
    true = np.uint16(0x3F80) if result == "bf16x2" else true

    def function(a: Array, b: Array) -> Array:
        ones = np.asarray(-1, np.int64).astype(out.dtype) if true is None else true
        return np.where(compare(a, b), ones, out.dtype.type(0))

    return site.elementwise(function, out, site.source(1, type_name), site.source(2, type_name))


@instruction("selp")
def select(site: Site) -> Step:
    site.allow()
    site.expect_operands(4)
    type_name = site.type()
    sources = [site.source(3, "pred"), site.source(1, type_name), site.source(2, type_name)]
    return site.elementwise(np.where, site.target(0, type_name), *sources)


@instruction("slct")
def select_by_sign(site: Site) -> Step:
    """slct.dtype.ctype d, a, b, c: a where c >= 0, else b."""
    site.allow("ftz")
    site.expect_operands(4)
    type_name = site.type(0)
    return site.elementwise(
        lambda c, a, b: np.where(c >= 0, a, b),
        site.target(0, type_name),
        site.source(3, site.type(1)),
        site.source(1, type_name),
        site.source(2, type_name),
    )
