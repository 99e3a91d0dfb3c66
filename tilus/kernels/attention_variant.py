"""Variants of attention as functions in the language, which a kernel inlines: of scores, of which keys are seen, a sink.

The last 1024 tokens, and scores between -30 and 30, are

    def window(at):
        return at.key > at.query - 1024

    def soft_cap(score, at):
        return tilus.tanh(score * (1 / 30)) * 30.0

    paged_prefill(..., variant=Variant(logits=soft_cap, mask=window))

Variants are equal when their functions are: define them once, at the top of a module, so that a kernel is compiled once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tilus
from tilus.dtypes import DataType, boolean, f32
from tilus.errors import Loc, TilusError


@dataclass(frozen=True)
class Variant:
    """Functions of tiles [rows, keys], or what broadcasts to it, in the language of kernels; at is a `Position`.

    logits(score, at): in place of the scaled score, f32. mask(at): which keys a query sees, boolean, beside what causality and
    lengths say. sink(at): the logit of one more key, whose value is zero, f32 [rows, 1] or a number; it counts in the logarithms.
    """

    logits: Callable[[Any, Any], Any] | None = None
    mask: Callable[[Any], Any] | None = None
    sink: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for what, function, expected in (
            ("logits", self.logits, ("score", "at")),
            ("mask", self.mask, ("at",)),
            ("sink", self.sink, ("at",)),
        ):
            if function is not None:
                _check_signature(what, function, expected)


@dataclass(frozen=True, eq=False)
class Position:
    """Where scores are. query [rows, 1], key [1, keys]: positions in the sequence, int32. head [rows, 1]: of all query heads.

    parameters: the caller's f32 tensor, None where there is none. head_runs: rows follow each other in such runs of one head,
    from the head `first_head` on.
    """

    query: Any
    key: Any
    head: Any
    parameters: Any
    first_head: Any
    head_runs: tuple[int, int]

    def of_heads(self, offset: int = 0) -> Any:
        """parameters[offset + head] of each row, [rows, 1]."""
        heads, rows = self.head_runs
        values = tilus.load(self.parameters, [self.first_head + offset], [heads])
        return tilus.broadcast(values.reshape([heads, 1]), [heads, rows]).reshape([heads * rows, 1])


def scaled_logits(logits: Callable[..., Any], scores: Any, scale_log2: Any, at: Position) -> Any:
    """What the exponential of base 2 is taken of."""
    found = logits(scores * (scale_log2 * math.log(2.0)), at)
    check_tile("logits", logits, shape_of(found), dtype_of(found), tuple(scores.shape), f32)
    return found * math.log2(math.e)


def seen(mask: Callable[..., Any], allowed: Any, at: Position, shape: tuple[int, int]) -> Any:
    """Which keys are seen, of those that are allowed."""
    found = mask(at)
    check_tile("mask", mask, shape_of(found), dtype_of(found), shape, boolean)
    return allowed & found


def sink_log2(sink: Callable[..., Any], at: Position, rows: int) -> Any:
    """[rows, 1]"""
    found = sink(at)
    if not isinstance(found, (int, float)):
        check_tile("sink", sink, shape_of(found), dtype_of(found), (rows, 1), f32)
    return tilus.zeros([rows, 1]) + found * math.log2(math.e)


def shape_of(value: Any) -> Any:
    return tuple(value.shape) if hasattr(value, "shape") else None


def dtype_of(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else None


def check_tile(
    what: str, function: Callable[..., Any], shape: tuple[int, ...] | None, dtype: DataType | None,
    wanted: tuple[int, int], wanted_dtype: DataType,
) -> None:  # fmt: skip
    """Raise at the user's function unless its result is a tile that broadcasts to the wanted one."""
    fits = (
        shape is not None
        and len(shape) <= 2
        and all(have in (1, want) for have, want in zip(reversed(shape), reversed(wanted)))
    )
    if fits and dtype == wanted_dtype:
        return
    found = f"{dtype.name}{list(shape)}" if dtype is not None and shape is not None else "no tile"
    raise TilusError(
        f"the {what} of an attention variant, {_name(function)}, gives {found}, expected {wanted_dtype.name} that broadcasts "
        f"to {list(wanted)}",
        loc=_defined_at(function),
        hint="at.query and at.head are [rows, 1], at.key is [1, keys]"
        + (
            ": compare them"
            if wanted_dtype == boolean
            else ", a score is f32 [rows, keys]: cast integers by .to(tilus.f32)"
        ),
    )


def _check_signature(what: str, function: Callable[..., Any], expected: tuple[str, ...]) -> None:
    try:
        inspect.signature(function).bind(*expected)
    except TypeError as error:
        wanted = ", ".join(expected)
        raise TilusError(
            f"the {what} of an attention variant is {_name(function)}{inspect.signature(function)}, expected {what}({wanted})",
            loc=_defined_at(function),
            hint=f"{error}; parameters with defaults may follow",
        ) from None


def _defined_at(function: Callable[..., Any]) -> Loc | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else Loc(code.co_filename, code.co_firstlineno)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
