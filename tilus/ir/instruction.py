"""The base class of tile instructions: one instruction is one class that knows everything about itself.

A subclass is a frozen dataclass. Its fields are its operands and attributes; every other fact is a method on it:
`effects`, `verify`, `layout_rule`, `evaluate` (its numpy meaning), `emit` (its PTX) and `emit_c` (its C). Passes ask; they
hold no lists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from tilus.errors import TilusError
from tilus.ir.expr import Expr, Var
from tilus.ir.layout_rules import AnyLayout, LayoutPriority, LayoutRule
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor, Tensor
from tilus.layout.conversion import ConversionPlan
from tilus.target import Target

if TYPE_CHECKING:
    from tilus.codegen.c.context import CContext
    from tilus.codegen.context import EmitContext
    from tilus.codegen.shared_access import SharedAccess
    from tilus.ir.evaluation import Evaluation


@dataclass(frozen=True)
class Effects:
    """What an instruction touches besides its register results. An instruction without effects may be removed when unused.

    reads, writes: tensors in memory. barrier: waits for other threads or for asynchronous copies. other: prints and the like.
    waits_for_kernels: waits for the end of the earlier kernels of the stream; constants: tensors that none of them which may
    still be running writes. remote: touches shared memory of other blocks of the cluster; publishes: tells them that what its
    threads wrote is there. cluster_barrier: waits for all of them. by_proxy: accesses shared memory by the asynchronous proxy, as
    copies and products of warpgroups do. hands_on: other threads may go on when these have come here.
    """

    reads: tuple[Tensor, ...] = ()
    writes: tuple[Tensor, ...] = ()
    barrier: bool = False
    other: bool = False
    waits_for_kernels: bool = False
    constants: tuple[Tensor, ...] = ()
    remote: bool = False
    publishes: bool = False
    cluster_barrier: bool = False
    by_proxy: bool = False
    hands_on: bool = False

    @property
    def removable(self) -> bool:
        return not self.writes and not self.barrier and not self.other


PURE = Effects()


@dataclass(frozen=True, eq=False)
class Instruction:
    """Base of tile instructions.

    Fields whose name is `out` or starts with `out_` are results (RegisterTensor or Var); other tensor fields, alone or in
    tuples, are operands; the rest are attributes. `mnemonic` is the name in the text form of the IR.
    """

    mnemonic: ClassVar[str]

    # Whose turn it is to choose a layout when nothing follows from the known ones.
    layout_priority: ClassVar[LayoutPriority] = LayoutPriority.COMPUTE

    # Whether `verify` looks at pinned layouts: a mistake is then shown with the lines that pin them.
    reads_layouts: ClassVar[bool] = False

    # Whether it means something on a GPU only, so that there is no C of it.
    needs_gpu: ClassVar[bool] = False

    # Whether it may only stand where the whole block passes exactly once.
    once: ClassVar[bool] = False

    # Whether `out` may be the storage of an operand that the instruction adds to.
    accumulates: ClassVar[bool] = False

    # Whether it goes on while the program does: until an instruction that awaits it, its results are not there, and what it reads
    # may not be overwritten.
    asynchronous: ClassVar[bool] = False

    def fields(self) -> Iterator[tuple[str, Any]]:
        return ((name, getattr(self, name)) for name in _field_names(type(self)))

    # Every pass and the verifier ask for these again and again, so an instruction keeps its answers.

    @functools.cached_property
    def results(self) -> tuple[RegisterTensor | Var, ...]:
        return tuple(v for name, v in self.fields() if is_out(name) and isinstance(v, (RegisterTensor, Var)))

    @functools.cached_property
    def operands(self) -> tuple[Tensor, ...]:
        return tuple(t for name, value in self.fields() if not is_out(name) for t in _tensors(value))

    @functools.cached_property
    def register_operands(self) -> tuple[RegisterTensor, ...]:
        return tuple(t for t in self.operands if isinstance(t, RegisterTensor))

    @functools.cached_property
    def register_results(self) -> tuple[RegisterTensor, ...]:
        return tuple(t for t in self.results if isinstance(t, RegisterTensor))

    @functools.cached_property
    def scalars(self) -> tuple[Expr, ...]:
        """Scalar expressions that the instruction reads."""
        return tuple(e for name, value in self.fields() if not is_out(name) for e in _exprs(value))

    def replace(self, tensors: Mapping[Tensor, Tensor], exprs: Mapping[Expr, Expr] | None = None) -> Self:
        """The same instruction over other tensors (and substituted scalars); `self` when nothing changes."""
        changes = {
            name: new for name, value in self.fields() if (new := _replaced(value, tensors, exprs or {})) is not value
        }
        return dataclasses.replace(self, **changes) if changes else self

    def remark(self) -> str:
        """What the dump says behind the instruction; the text form skips it."""
        return ""

    def effects(self) -> Effects:
        return PURE

    def arrivals(self) -> tuple[SharedTensor, ...]:
        """The mbarriers at which the threads that run it arrive, once for each of their warps."""
        return ()

    def accumulator(self) -> RegisterTensor | None:
        """The operand whose registers the result must share, as an asynchronous instruction may still add to it."""
        return None

    def awaits(self) -> int | None:
        """How many of the latest asynchronous instructions may go on behind this one; None where it waits for none."""
        return None

    def verify(self) -> None:
        """Raise TilusError when shapes, dtypes or attributes do not fit; the caller adds the location."""

    def layout_rule(self, num_threads: int) -> LayoutRule:
        """The ways in which the instruction can run, as layouts of its tiles; `num_threads` of the block or
        the role run it."""
        return AnyLayout((*self.register_results, *self.register_operands), num_threads)

    def shared_accesses(self, num_threads: int, target: Target) -> tuple[tuple[SharedTensor, SharedAccess], ...]:
        """What it moves from or to which shared tensors, asked when all register layouts are known.

        It describes the special instruction of the target, too, that this one may become under some layout.
        """
        return ()

    def specialized(self, target: Target) -> Instruction | None:
        """The special instruction of the target that does the same, if there is one."""
        return None

    def conversions(self) -> Sequence[ConversionPlan]:
        """How tiles change their layout inside of this instruction; asked when all layouts are known."""
        return ()

    def scratch_nbytes(self, num_threads: int) -> int:
        """Shared memory this instruction needs between barriers of its own; asked when all layouts are known."""
        return max((plan.block_scratch_nbytes for plan in self.conversions()), default=0)

    # Meanings.

    def evaluate(self, env: Evaluation) -> None:
        """The numpy meaning, on all blocks at once: read operands from `env`, set the results."""
        raise NotImplementedError(f"{type(self).__name__}.evaluate")

    def emit(self, ctx: EmitContext) -> None:
        """Emit PTX: read operand registers from `ctx`, define the results."""
        raise NotImplementedError(f"{type(self).__name__}.emit")

    def emit_c(self, ctx: CContext) -> None:
        """Write C for a CPU: read operand tiles from `ctx`, define the results."""
        raise NotImplementedError(f"{type(self).__name__}.emit_c")


@functools.cache
def _field_names(cls: type[Instruction]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def is_out(name: str) -> bool:
    """Whether a field of this name is a result."""
    return name == "out" or name.startswith("out_")


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, (RegisterTensor, SharedTensor, GlobalTensor)):
        yield value
    elif isinstance(value, tuple):
        for element in cast("tuple[object, ...]", value):
            yield from _tensors(element)


def _exprs(value: object) -> Iterator[Expr]:
    if isinstance(value, Expr):
        yield value
    elif isinstance(value, GlobalTensor):
        yield from (*value.shape, *value.strides, value.offset)
    elif isinstance(value, tuple):
        for element in cast("tuple[object, ...]", value):
            yield from _exprs(element)


def _replaced(value: Any, tensors: Mapping[Tensor, Tensor], exprs: Mapping[Expr, Expr]) -> Any:
    from tilus.ir.expr import substitute

    if isinstance(value, (RegisterTensor, SharedTensor, GlobalTensor)):
        if value in tensors:
            return tensors[value]
        if isinstance(value, GlobalTensor) and exprs:
            offset = substitute(value.offset, exprs)
            return value if offset is value.offset else dataclasses.replace(value, offset=offset)
        return value
    if isinstance(value, Expr):
        new = substitute(value, exprs) if exprs else value
        return value if new == value else new
    if isinstance(value, tuple):
        old = cast("tuple[Any, ...]", value)
        new_tuple = tuple(_replaced(element, tensors, exprs) for element in old)
        return value if all(a is b for a, b in zip(new_tuple, old, strict=True)) else new_tuple
    return value


# Checks that many `verify` methods share, as functions that name both values.


def expect_same_shape(what: str, a: RegisterTensor, b: RegisterTensor) -> None:
    if a.shape != b.shape:
        raise TilusError(f"{what}: shapes {list(a.shape)} and {list(b.shape)} differ")
