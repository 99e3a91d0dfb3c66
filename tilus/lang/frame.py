"""State of a translation: the kernel's builder and levels, and one frame for each function that is being inlined."""

from __future__ import annotations

import builtins
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, TracebackType
from typing import Any

from tilus.errors import Loc, TilusError
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import Expr
from tilus.ir.stmt import Seq, Stmt
from tilus.ir.tensor import RegisterTensor, SharedTensor, Tensor
from tilus.ir.visit import instructions, replace, seq
from tilus.lang.source import Source
from tilus.lang.storage import Storage
from tilus.lang.values import LocalFunction, Value, close_matches


class KernelBuilder(IRBuilder):
    """The builder of a whole kernel: it knows the launch grid, that nothing may come before it, and the user's names."""

    def __init__(self) -> None:
        super().__init__()
        self.grid: tuple[Expr, ...] | None = None
        self.blocks_per_sm = 1
        self._user_names: dict[Tensor, str] = {}

    def name(self, value: object, name: str) -> None:
        """Remember the first variable that a tile or shared tensor is bound to: `body` names it so."""
        if isinstance(value, SharedTensor) or (isinstance(value, RegisterTensor) and not value.mutable):
            self._user_names.setdefault(value, name)

    def body(self) -> Seq:
        """The statements, with tensors called as the user calls them."""
        body = super().body()
        named: dict[Tensor, Tensor] = {}
        for stmt in instructions(body):
            for tensor in (*stmt.inst.register_results, *stmt.inst.operands):
                if tensor in self._user_names and tensor not in named:
                    named[tensor] = dataclasses.replace(tensor, name=self.fresh(self._user_names[tensor]))
        return seq(replace(body, named)) if named else body

    def append(self, stmt: Stmt) -> None:
        if self.grid is None:
            raise TilusError(
                "the kernel does something before tilus.grid, expected tilus.grid(...) first",
                loc=self.loc,
                hint="start the kernel with tilus.grid(number of blocks, warps=...)",
            )
        super().append(stmt)


@dataclass(frozen=True)
class Binding:
    """What a name stands for. level: the nesting of run-time loops and branches in which it was bound.

    slot: the value is storage that belongs to this name, so that an assignment at a deeper level writes it.
    """

    value: Value
    level: int
    slot: bool = False


@dataclass
class Scope:
    """The names of one function.

    local: names that the function binds somewhere. free: what the others mean (closure, globals, builtins).
    lost: names that were bound only inside of a run-time loop or branch that has ended, with an explanation and a way out.
    """

    local: frozenset[str]
    free: Mapping[str, Value]
    names: dict[str, Binding] = field(default_factory=dict[str, Binding])
    enclosing: Scope | None = None
    lost: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])

    def lookup(self, name: str) -> Value:
        """The value of a name.

        Raises: TilusError when it is unknown, not assigned yet, or assigned only inside of a loop or branch.
        """
        if name in self.names:
            return self.names[name].value
        if name in self.lost:
            why, instead = self.lost[name]
            raise TilusError(f"{name} is {why} and is read after it", hint=instead)
        if name in self.local:
            raise TilusError(f"{name} is read before it is assigned")
        if self.enclosing is not None:
            return self.enclosing.lookup(name)
        if name in self.free:
            return self.free[name]
        raise TilusError(
            f"unknown name {name}", hint=close_matches(name, [*self.names, *(self.free.keys() - vars(builtins).keys())])
        )


@dataclass(frozen=True)
class Loop:
    """A loop that is being translated. level: that of its body. optional: unrolled, but could be a run-time loop."""

    runtime: bool
    level: int
    optional: bool = False


class NotUnrollable(Exception):
    """An unrolled loop turns out to be left, or to go on, under a run-time condition: it must be a run-time loop."""


@dataclass
class Translation:
    """One kernel on its way from Python to IR.

    level: how many run-time loops and branches are open. role_level: that of the body of the role that is open. owned: objects
    and containers made by the kernel, which may be changed, with the level of their birth. attributes: those that the kernel
    set; journal: what to restore when the code of a loop is translated again. calls: functions being inlined, outermost first.
    uses_language: of functions and classes, where it has been asked (tilus.lang.calls).
    """

    builder: KernelBuilder
    storage: Storage
    level: int = 0
    role_level: int | None = None
    owned: dict[int, Binding] = field(default_factory=dict[int, Binding])
    attributes: dict[tuple[int, str], Binding] = field(default_factory=dict[tuple[int, str], Binding])
    journal: list[tuple[Any, str, Binding | None]] = field(default_factory=list[tuple[Any, str, "Binding | None"]])
    calls: list[tuple[object, Loc | None]] = field(default_factory=list[tuple[object, "Loc | None"]])
    uses_language: dict[object, bool] = field(default_factory=dict[object, bool])

    def own(self, value: Value) -> Value:
        self.owned[id(value)] = Binding(value, self.level)
        return value

    def owner_level(self, value: Value) -> int | None:
        """The level at which the kernel made an object; None when it comes from outside."""
        binding = self.owned.get(id(value))
        return None if binding is None else binding.level

    def set_attribute(self, obj: Any, name: str, binding: Binding) -> None:
        """`obj.name = value` on an object of the kernel, remembered for `rollback`."""
        key = (id(obj), name)
        self.journal.append((obj, name, self.attributes.get(key)))
        setattr(obj, name, binding.value)
        self.attributes[key] = binding

    def rollback(self, length: int) -> None:
        """Undo attribute assignments beyond the first `length`."""
        while len(self.journal) > length:
            obj, name, binding = self.journal.pop()
            if binding is None:
                delattr(obj, name)
                del self.attributes[(id(obj), name)]
            else:
                setattr(obj, name, binding.value)
                self.attributes[(id(obj), name)] = binding


class _At:
    """`Frame.at`, which is entered for every expression: a generator would take twice as long."""

    __slots__ = ("builder", "loc", "outer")

    def __init__(self, builder: IRBuilder, loc: Loc) -> None:
        self.builder, self.loc, self.outer = builder, loc, builder.loc

    def __enter__(self) -> None:
        self.builder.loc = self.loc

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.builder.loc = self.outer
        if isinstance(error, TilusError):
            raise error.at(self.loc) from error.__cause__


class Frame(ABC):
    """One function being translated: where its code comes from and what its names mean."""

    def __init__(self, translation: Translation, source: Source, scope: Scope) -> None:
        self.translation = translation
        self.builder = translation.builder
        self.storage = translation.storage
        self.source = source
        self.scope = scope
        self.entry_level = translation.level
        self.loops: list[Loop] = []

    def at(self, node: Any) -> _At:
        """Translate a node: what is emitted carries its position, and so do errors that have none yet."""
        return _At(self.builder, self.source.loc(node))

    @abstractmethod
    def inline(
        self, function: FunctionType | LocalFunction, args: Sequence[Value], kwargs: Mapping[str, Value]
    ) -> Value:
        """Translate the body of a function in place of a call; returns what it returns."""
