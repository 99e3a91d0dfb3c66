"""What a name can stand for inside a kernel: compile-time Python values, run-time scalars and tensors, and helpers.

Run-time values are scalars (`Expr`), tiles, shared and global tensors and their views. Everything else is a Python
value that is known while compiling; tuples, lists and dicts may hold both.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from tilus.ir.builder import Builtin
from tilus.ir.expr import Const, Expr, const
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor, SharedView

if TYPE_CHECKING:
    from tilus.lang.frame import Frame
    from tilus.lang.source import Source

Value = Any

MAX_UNROLLED = 4096  # statements of this many trips would take minutes to compile and no instruction cache holds them


@dataclass(frozen=True)
class RuntimeRange:
    """`range(start, stop, step)` that becomes a loop of the kernel; `unroll`: copies of the body per trip."""

    start: Expr | int
    stop: Expr | int
    step: int = 1
    unroll: int = 1


@dataclass(frozen=True, eq=False)
class LocalFunction:
    """A function or lambda written inside a kernel; it sees the names of `frame` as they are when it is called."""

    name: str
    source: Source
    signature: inspect.Signature
    frame: Frame


@dataclass(frozen=True, eq=False)
class BoundBuiltin:
    """`tile.sum`: a function of the language with its first argument."""

    builtin: Builtin
    receiver: Value


RUNTIME_TYPES = (Expr, RegisterTensor, SharedTensor, SharedView, GlobalTensor)


def is_runtime(value: Value) -> bool:
    """Whether a value, or anything in the container that it is, exists only when the kernel runs."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return any(is_runtime(item) for item in cast("tuple[Value, ...]", value))
    if isinstance(value, dict):
        return any(is_runtime(item) for item in cast("dict[Value, Value]", value).values())
    return isinstance(value, (*RUNTIME_TYPES, RuntimeRange, LocalFunction, BoundBuiltin))


def is_number(value: Value) -> bool:
    return isinstance(value, (bool, int, float))


def is_scalar(value: Value) -> bool:
    """A number, known now or at run time."""
    return isinstance(value, (bool, int, float, Expr))


def simplified(expr: Expr) -> Value:
    """A constant of the type that Python's number would get is that number again; other expressions stay."""
    if isinstance(expr, Const) and const(expr.value).type == expr.type:
        return expr.value
    return expr


def describe(value: Value) -> str:
    """How error messages name a value."""
    match value:
        case RegisterTensor():
            return f"a tile of {value.dtype} {list(value.shape)}"
        case SharedTensor() | SharedView():
            return f"a shared tensor of {value.dtype} {list(value.shape)}"
        case GlobalTensor():
            return f"a global tensor of {value.dtype} [{', '.join(map(str, value.shape))}]"
        case Expr():
            return f"a run-time scalar of {value.dtype}"
        case LocalFunction():
            return f"the function {value.name}"
        case Builtin() | BoundBuiltin():
            builtin = value.builtin if isinstance(value, BoundBuiltin) else value
            return f"the function tilus.{getattr(builtin, '__name__', '?')}"
        case RuntimeRange():
            return "a run-time range"
        case _ if is_runtime(value):
            return f"a {type(value).__name__} that holds run-time values"
        case _:
            text = repr(value)
            return text if len(text) <= 60 else f"a {type(value).__name__}"


def close_matches(name: str, known: Iterable[str]) -> str | None:
    """A hint that lists names like this one."""
    import difflib

    matches = difflib.get_close_matches(name, [k for k in known if not k.startswith("_")], n=3, cutoff=0.6)
    return f"did you mean {' or '.join(matches)}?" if matches else None
