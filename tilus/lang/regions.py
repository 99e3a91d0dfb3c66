"""Run-time loops and branches: which names their code may bind, and which of them need storage.

Code in a region that assigns a name (or attribute) bound outside of it needs that name to be a slot. Most are seen in the
syntax; where not (attributes set by methods, compile-time numbers that turn out to change), the assignment raises `Promote`
and the construct around it is translated again with the slot.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tilus.errors import TilusError
from tilus.ir.expr import Const, Expr
from tilus.ir.stmt import Seq, Stmt
from tilus.ir.tensor import RegisterTensor
from tilus.lang.frame import Binding, Frame, Scope
from tilus.lang.storage import Slot, is_storable
from tilus.lang.values import Value, describe

T = TypeVar("T")


class Promote(Exception):
    """Code of a region assigns `owner`'s name, which was bound at `level` outside of it: it needs a slot."""

    def __init__(self, owner: Any, name: str, level: int) -> None:
        super().__init__()
        self.owner = owner
        self.name = name
        self.level = level


@dataclass
class Region:
    """The code of a loop body or of one side of a branch, and the names that it bound."""

    stmts: list[Stmt] = field(default_factory=list[Stmt])
    bound: dict[str, Value] = field(default_factory=dict[str, Value])

    def assign(self, frame: Frame, slot: Slot, value: Value, name: str) -> None:
        """Write a slot at the end of the region."""
        with frame.builder.block() as extra:
            frame.storage.write(slot, value, name)
        self.stmts.extend(extra)

    def body(self) -> Seq:
        return Seq(tuple(self.stmts))


@contextmanager
def region(frame: Frame) -> Generator[Region]:
    """Translate code that may run any number of times; names that it binds are gone behind it."""
    names, result = dict(frame.scope.names), Region()
    frame.translation.level += 1
    try:
        with frame.builder.block() as result.stmts:
            yield result
        level = frame.translation.level
        result.bound = {name: b.value for name, b in frame.scope.names.items() if b.level >= level}
    finally:
        frame.translation.level -= 1
        frame.scope.names = names


def promoting(frame: Frame, translate: Callable[[], T], assigned: Iterable[str] = ()) -> T:
    """Translate a construct with regions; again, with more slots, when its code assigns what was bound before it.

    assigned: names that the construct's syntax assigns.
    """
    level, journal = frame.translation.level, len(frame.translation.journal)
    for name in sorted(assigned):
        binding = frame.scope.names.get(name)
        if binding is not None and binding.level == level and not binding.slot and _is_runtime_variable(binding.value):
            _promote(frame, frame.scope, name)
    while True:
        names, lost, loops = dict(frame.scope.names), dict(frame.scope.lost), list(frame.loops)
        try:
            with frame.builder.block() as stmts:
                result = translate()
        except Promote as request:
            if request.level != level:
                raise
            frame.translation.rollback(journal)
            frame.scope.names, frame.scope.lost, frame.loops = names, lost, loops
            _promote(frame, request.owner, request.name)
            journal = len(frame.translation.journal)
        else:
            for stmt in stmts:
                frame.builder.append(stmt)
            return result


def _is_runtime_variable(value: Value) -> bool:
    return isinstance(value, RegisterTensor) or (isinstance(value, Expr) and not isinstance(value, Const))


def _promote(frame: Frame, owner: Any, name: str) -> None:
    """Give a name of a scope, or an attribute of an object, a slot that holds its present value."""
    value = owner.names[name].value if isinstance(owner, Scope) else getattr(owner, name)
    slot = frame.storage.allocate(value, name)
    frame.storage.write(slot, value, name)
    binding = Binding(slot, frame.translation.level, slot=True)
    if isinstance(owner, Scope):
        owner.names[name] = binding
    else:
        frame.translation.set_attribute(owner, name, binding)


def bind(frame: Frame, name: str, value: Value) -> None:
    """`name = value`: a new binding, or a write of the name's slot when it was bound outside of the open region."""
    binding = frame.scope.names.get(name)
    if binding is not None and binding.level < frame.translation.level:
        _write(frame, frame.scope, name, binding, value)
        return
    kept = frame.storage.snapshot(value, name)
    frame.builder.name(kept, name)
    frame.scope.names[name] = Binding(kept, frame.translation.level)
    frame.scope.lost.pop(name, None)


def bind_attribute(frame: Frame, obj: Any, name: str, value: Value) -> None:
    """`obj.name = value` on an object that the kernel made.

    Raises: TilusError for objects from outside.
    """
    translation = frame.translation
    born = translation.owner_level(obj)
    if born is None:
        raise TilusError(
            f"attribute {name} of {describe(obj)} is assigned, which was made outside of the kernel",
            hint="make the object in the kernel: a kernel must not change the program that compiles it",
        )
    binding = translation.attributes.get((id(obj), name))
    if binding is None and hasattr(obj, name):
        binding = Binding(getattr(obj, name), born)
    if binding is not None and binding.level < translation.level:
        _write(frame, obj, name, binding, value)
        return
    try:
        translation.set_attribute(obj, name, Binding(frame.storage.snapshot(value, name), translation.level))
    except AttributeError as error:
        raise TilusError(f"attribute {name} of {type(obj).__name__} cannot be assigned: {error}") from None


def _write(frame: Frame, owner: Any, name: str, binding: Binding, value: Value) -> None:
    role_level = frame.translation.role_level
    if role_level is not None and binding.level < role_level:
        raise TilusError(
            f"{name} is assigned in a role, and belongs to what was made outside of it",
            hint="make the object in the role: what a role assigns is known to its warps only",
        )
    if binding.slot:
        frame.storage.write(binding.value, value, name)
    elif is_storable(binding.value):
        raise Promote(owner, name, binding.level)
    else:
        raise TilusError(
            f"{name} is {describe(binding.value)} and is assigned {describe(value)} in a run-time loop or branch",
            hint="only scalars and tiles can change there: use another name, or give it a first value of that type before",
        )
