"""Builds a function's statements in program order; the front end and the user-level functions of instructions use it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

from tilus.dtypes import DataType
from tilus.errors import Loc, Note, TilusError
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import Inst, Seq, Stmt
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout

InstructionT = TypeVar("InstructionT", bound=Instruction)


class IRBuilder:
    """Collects statements. `loc` is the user's position that is being compiled; `tilus.grid` sets the rest."""

    def __init__(self) -> None:
        self.loc: Loc | None = None
        self.num_warps: int | None = None
        self.cluster = 1
        self.ends_alone = False
        self._blocks: list[list[Stmt]] = [[]]
        self._names: dict[str, int] = {}
        self._pins: dict[RegisterTensor, Loc | None] = {}

    def append(self, stmt: Stmt) -> None:
        self._blocks[-1].append(stmt)

    def take_back(self, kind: type[Instruction]) -> None:
        """Remove the last statement of the open block if it is an instruction of this kind."""
        stmts = self._blocks[-1]
        if stmts and isinstance(last := stmts[-1], Inst) and isinstance(last.inst, kind):
            stmts.pop()

    def emit(self, inst: InstructionT) -> InstructionT:
        """Verify and append an instruction; a mistake in it is reported at the current position."""
        try:
            inst.verify()
        except TilusError as error:
            raise error.at(self.loc, self._pinned(inst) if inst.reads_layouts else ()) from None
        self.append(Inst(inst, self.loc))
        self._pins |= {t: self._pins.get(t, self.loc) for t in inst.register_results if t.layout is not None}
        return inst

    def _pinned(self, inst: Instruction) -> list[Note]:
        """Where the program pins the layouts of the operands."""
        return [
            Note(f"its operand is pinned to {tile.layout} here", self._pins.get(tile))
            for tile in inst.register_operands
            if tile.layout is not None
        ]

    def tile(
        self, dtype: DataType, shape: tuple[int, ...], layout: RegisterLayout | None = None, name: str = "t",
        mutable: bool = False,
    ) -> RegisterTensor:  # fmt: skip
        """A new register tensor with a name that is unique in the function. Raises: TilusError for a negative extent."""
        if any(extent < 0 for extent in shape):
            raise TilusError(f"a tile of shape {list(shape)}, expected extents of at least 0")
        return RegisterTensor(dtype, shape, layout, self.fresh(name), mutable)

    def fresh(self, stem: str) -> str:
        """A name not used before: the stem itself, then stem_1, stem_2 ..."""
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return stem if count == 0 else f"{stem}_{count}"

    @contextmanager
    def block(self) -> Generator[list[Stmt]]:
        """Collect statements of a nested body: `with builder.block() as stmts`."""
        stmts: list[Stmt] = []
        self._blocks.append(stmts)
        try:
            yield stmts
        finally:
            self._blocks.pop()

    def body(self) -> Seq:
        return Seq(tuple(self._blocks[0]))


class Builtin:
    """A function of the language: documented and importable in Python, callable only inside a kernel.

    `build` is what the front end calls; it takes the IRBuilder before the user's arguments.
    """

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build
        self.__name__ = build.__name__
        functools.update_wrapper(self, build)
        signature = inspect.signature(build)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = getattr(self.build, "__name__", "?")
        raise TilusError(
            f"tilus.{name} was called outside of a kernel",
            hint="use it in a function decorated with @tilus.kernel, and launch that function with arrays",
        )


def builtin(build: Callable[..., Any]) -> Builtin:
    """Make a user-level function `build(b: IRBuilder, ...)` part of the language."""
    return Builtin(build)
