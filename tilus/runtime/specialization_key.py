"""What goes into the machine code of a kernel, as a name: for kernels of tilus, whose source is known to the last file."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilus.lang.kernel import Specialization

_SUFFIXES = (".py", ".lark", ".h", ".c")  # of files that decide what a kernel becomes
_PACKAGE = __name__.partition(".")[0]
_PLAIN = (type(None), bool, int, float, str, bytes)


class _UnknownSource(Exception):
    """A value that depends on more than the files of tilus."""


def key(specialization: Specialization, tools: Iterable[str]) -> str | None:
    """A digest of a kernel's name, of what it is specialised for, of all of tilus' source, and of what names the tools and the
    target. None where that does not say all: for kernels of other modules, and compile-time values that are not data of tilus.
    """
    kernel = specialization.kernel
    module, name = kernel.python.__module__, kernel.python.__qualname__
    if not is_named(kernel, module, name):
        return None
    try:
        text = described((module, name, specialization.specification))
    except _UnknownSource:
        return None
    return _digest([_sources(), sys.version, *tools, text])


def is_named(value: object, module: str, name: str) -> bool:
    """Whether `value` is what a module of tilus has under this name, so that another process finds it there, too."""
    if not module or module.partition(".")[0] != _PACKAGE:  # functions that were made from text have no module
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def described(value: Any) -> str:
    """Text that is equal for equal data of equal types, in every process."""
    if type(value) in _PLAIN:
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, tuple):
        return f"({', '.join(described(item) for item in value)})"  # type: ignore[misc]
    if isinstance(value, (type, FunctionType)):
        if value.__module__ != "builtins" and not is_named(value, value.__module__, value.__qualname__):
            raise _UnknownSource
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value)
    if not is_named(kind, kind.__module__, kind.__qualname__):
        raise _UnknownSource
    if isinstance(value, Enum):
        return f"{described(kind)}.{value.name}"
    if not is_dataclass(value):
        raise _UnknownSource
    parts = (f"{field.name}={described(getattr(value, field.name))}" for field in fields(value))
    return f"{described(kind)}({', '.join(parts)})"


@functools.cache
def _sources() -> str:
    """A digest of all files of tilus: whatever changes in one may change every kernel."""
    root = Path(__file__).parents[1]
    files = sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES)
    return _digest(part for path in files for part in (str(path.relative_to(root)), path.read_bytes()))


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
