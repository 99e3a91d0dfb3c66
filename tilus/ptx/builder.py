"""Builds the body of one PTX kernel: structured scopes, in-place emission, and hoisted value-numbered pure operations.

A scope is the body of the kernel, of a loop or of an `if`. `emit` appends where the builder stands. `pure` is for index
arithmetic: the operation goes to the outermost scope in which all its operands live, and equal operations there are
emitted once. That is common-subexpression elimination, loop-invariant motion (out of guarded code too, which the
assembler does not do) and needs no later pass; it relies on index arithmetic that does not wrap. Nothing leaves the scope of
a `role`, whose threads are not those in front of it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tilus.errors import Loc
from tilus.ptx.module import (
    Call,
    Comment,
    Guard,
    Imm,
    Instr,
    Item,
    Label,
    LabelRef,
    Operand,
    Pair,
    Reg,
    RegClass,
    Special,
    Vector,
)

_CLASS_OF_TYPE = {
    "pred": RegClass.PRED,
    "b8": RegClass.B16, "u8": RegClass.B16, "s8": RegClass.B16,
    "b16": RegClass.B16, "u16": RegClass.B16, "s16": RegClass.B16, "f16": RegClass.B16, "bf16": RegClass.B16,
    "b32": RegClass.B32, "u32": RegClass.B32, "s32": RegClass.B32, "f32": RegClass.B32, "tf32": RegClass.B32,
    "f16x2": RegClass.B32, "bf16x2": RegClass.B32,
    "b64": RegClass.B64, "u64": RegClass.B64, "s64": RegClass.B64, "f64": RegClass.B64,
    "e4m3x2": RegClass.B16, "e5m2x2": RegClass.B16,
}  # fmt: skip


def result_class(opcode: str) -> RegClass:
    """The register class of an opcode's result, from its type suffix.

    `setp` gives a predicate; `mul.wide` and `mad.wide` double their type; `cvt`, `set` and `ld` name the result type
    first; everything else has one type, or the result type first.
    """
    parts = opcode.split(".")
    if parts[0] == "setp":
        return RegClass.PRED
    types = [part for part in parts[1:] if part in _CLASS_OF_TYPE]
    if not types:
        raise ValueError(f"opcode {opcode!r} names no type")
    if "wide" in parts:
        return {RegClass.B16: RegClass.B32, RegClass.B32: RegClass.B64}[_CLASS_OF_TYPE[types[0]]]
    return _CLASS_OF_TYPE[types[0]]


@dataclass
class _Scope:
    items: list[Item] = field(default_factory=list[Item])
    values: dict[tuple[str, tuple[Operand, ...]], Reg] = field(
        default_factory=dict[tuple[str, tuple[Operand, ...]], Reg]
    )


class Builder:
    """Emits instructions into nested scopes. `loc` is attached to every instruction emitted while it is set."""

    def __init__(self) -> None:
        self.loc: Loc | None = None
        self._scopes = [_Scope()]
        self._levels: dict[Reg, int] = {}
        self._counts = dict.fromkeys(RegClass, 0)
        self._labels = 0
        self._floor = 0  # the level that pure operations do not leave
        self._first_thread = 0

    @property
    def level(self) -> int:
        """Depth of the scope the builder stands in; 0 is the kernel body."""
        return len(self._scopes) - 1

    def reg(self, cls: RegClass, level: int | None = None) -> Reg:
        """A new register that lives in the scope of `level` (default: the current one)."""
        reg = Reg(cls, self._counts[cls])
        self._counts[cls] += 1
        self._levels[reg] = self.level if level is None else level
        return reg

    def level_of(self, operand: Operand) -> int:
        if isinstance(operand, Vector):
            return max(map(self.level_of, operand.elements))
        return self._levels[operand] if isinstance(operand, Reg) else 0

    def emit(self, opcode: str, *srcs: Operand, guard: Guard | None = None, out: RegClass | None = None) -> Reg:
        """Append an instruction with one new result register, and return it."""
        dst = self.reg(out or result_class(opcode))
        self.emit_to(opcode, dst, *srcs, guard=guard)
        return dst

    def emit_to(self, opcode: str, *operands: Operand, guard: Guard | None = None) -> None:
        """Append an instruction with all operands given, destination included (stores, mma, `mov` to a variable)."""
        self._scopes[-1].items.append(Instr(opcode, operands, guard, self.loc))

    def pure(self, opcode: str, *srcs: Operand, out: RegClass | None = None) -> Reg:
        """The result of a pure operation, emitted once in the outermost scope where its operands live."""
        return self._once(opcode, srcs, out or result_class(opcode), None)

    def second(self, opcode: str, *srcs: Operand) -> Reg:
        """The predicate that a pure operation has as its second result, emitted like `pure`."""
        return self._once(opcode, srcs, RegClass.PRED, Special("_"))

    def _once(self, opcode: str, srcs: tuple[Operand, ...], out: RegClass, first: Special | None) -> Reg:
        level = max((self.level_of(src) for src in srcs), default=0)
        key = (opcode, srcs)
        for scope in (self._scopes[level], self._scopes[max(level, self._floor)]):
            if key in scope.values:
                return scope.values[key]
        level = max(level, self._floor)
        dst = self.reg(out, level)
        target = dst if first is None else Pair(first, dst)
        self._scopes[level].items.append(Instr(opcode, (target, *srcs), None, self.loc))
        self._scopes[level].values[key] = dst
        return dst

    def thread_id(self) -> Reg:
        """The number of the thread among those that run the code: the block's, or the role's."""
        thread = self.pure("mov.u32", Special("%tid.x"))
        return self.pure("sub.u32", thread, Imm(self._first_thread)) if self._first_thread else thread

    def comment(self, text: str) -> None:
        self._scopes[-1].items.append(Comment(text))

    def call(self, function: str, *args: Reg) -> None:
        """Call an external function of 64-bit parameters; its result is dropped."""
        self._scopes[-1].items.append(Call(function, args))

    def label(self, stem: str) -> str:
        """A fresh label name."""
        self._labels += 1
        return f"{stem}_{self._labels}"

    def place(self, label: str) -> None:
        self._scopes[-1].items.append(Label(label))

    def branch(self, label: str, guard: Guard | None = None, *, uniform: bool = True) -> None:
        """A jump. `uniform` promises that all threads of a warp go the same way."""
        self.emit_to("bra.uni" if uniform else "bra", LabelRef(label), guard=guard)

    @contextmanager
    def scope(self) -> Generator[None]:
        """A nested scope; its items land after everything that was hoisted in front of it meanwhile."""
        self._scopes.append(_Scope())
        try:
            yield
        finally:
            inner = self._scopes.pop()
            self._scopes[-1].items.extend(inner.items)

    @contextmanager
    def role(self, first_thread: int) -> Generator[None]:
        """The scope of code that only the threads from `first_thread` on run: they are counted from it, and nothing is hoisted
        out of it."""
        outer = self._floor, self._first_thread
        with self.scope():
            self._floor, self._first_thread = self.level, first_thread
            try:
                yield
            finally:
                self._floor, self._first_thread = outer

    def finish(self) -> tuple[Item, ...]:
        """All items of the kernel body; the builder must be outside of every nested scope."""
        if self.level != 0:
            raise ValueError(f"finish() inside {self.level} open scopes")
        return tuple(self._scopes[0].items)

    # Frequent operations by name.
    def mov(self, dst: Reg, src: Operand, guard: Guard | None = None) -> None:
        """Copy into an existing (mutable) register."""
        self.emit_to(f"mov.{dst.cls.value}", dst, src, guard=guard)

    def const(self, value: int, cls: RegClass = RegClass.B32) -> Reg:
        """A register holding an integer constant."""
        return self.pure(f"mov.{cls.value}", Imm(value), out=cls)
