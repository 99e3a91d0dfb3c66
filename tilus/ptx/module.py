"""PTX modules as typed objects.

Registers are untyped by bit width (`.pred`, `.b16`, `.b32`, `.b64`): PTX lets an operand of an untyped class stand for
any fundamental type of its size (PTX ISA, "Operand type checking"), so a packed pair of f16 and a u32 share one class.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from tilus.errors import Loc
from tilus.target import Target


class RegClass(enum.Enum):
    """Width of a register; the value is its PTX type without the dot."""

    PRED = "pred"
    B16 = "b16"
    B32 = "b32"
    B64 = "b64"

    # Members are singletons. The hash of `Enum` is a Python function, which registers as keys call all the time.
    __hash__ = object.__hash__

    @property
    def prefix(self) -> str:
        return {"pred": "%p", "b16": "%h", "b32": "%r", "b64": "%d"}[self.value]


@dataclass(frozen=True)
class Reg:
    cls: RegClass
    index: int


@dataclass(frozen=True)
class Imm:
    """An integer immediate."""

    value: int


@dataclass(frozen=True)
class FloatImm:
    """A float immediate by its bits: exact, printed as `0f3F800000` (nbits 32) or `0d...` (nbits 64)."""

    bits: int
    nbits: int = 32


@dataclass(frozen=True)
class Special:
    """A special register such as `%tid.x`."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a named variable (a shared array) or a kernel parameter."""

    name: str


@dataclass(frozen=True)
class Address:
    """A memory operand `[base + offset]`; offset in bytes."""

    base: Reg | Symbol
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """A brace-enclosed operand such as `{%r0, %r1}`."""

    elements: tuple[Reg | Imm | FloatImm | Special, ...]


@dataclass(frozen=True)
class TensorAddress:
    """A place in a tensor, `[map, {c0, c1}]`: the address of its tensor map and the coordinates, innermost first."""

    map: Reg | Symbol
    coordinates: Vector


@dataclass(frozen=True)
class LabelRef:
    name: str


@dataclass(frozen=True)
class Pair:
    """A double destination `d|p`: the second result of setp, shfl.sync and match.sync. `Special("_")` drops one."""

    first: Reg | Special
    second: Reg | Special


@dataclass(frozen=True)
class Guard:
    """`@p` or `@!p` in front of an instruction; as an operand, a predicate or its negation `!p`."""

    reg: Reg
    negated: bool = False


Operand = Reg | Imm | FloatImm | Special | Symbol | Address | TensorAddress | Vector | LabelRef | Pair | Guard


@dataclass(frozen=True)
class Instr:
    """One instruction: opcode with modifiers, operands in PTX order (destination first), optional guard.

    loc: the user's source position, printed as a `.loc` directive so that tools and the emulator can show it.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Guard | None = None
    loc: Loc | None = None


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Comment:
    text: str


@dataclass(frozen=True)
class Call:
    """A call of an external function that takes 64-bit parameters and gives a 32-bit result, which is dropped (vprintf)."""

    function: str
    args: tuple[Reg, ...]


Item = Instr | Label | Comment | Call


@dataclass(frozen=True)
class Param:
    """A kernel parameter; `type` is a PTX type without the dot (`u64`, `s32`, `f32`, `b8` ...).

    count: number of elements of an array parameter (a tensor map is `b8` with count 128); None for a scalar.
    align: alignment in bytes when it is more than the natural one.
    """

    name: str
    type: str
    count: int | None = None
    align: int | None = None


@dataclass(frozen=True)
class SharedArray:
    """A shared-memory array of bytes. `dynamic` ones are extern, sized at launch (needed above 48 KiB)."""

    name: str
    nbytes: int
    align: int = 16
    dynamic: bool = False


@dataclass(frozen=True)
class GlobalBytes:
    """Constant bytes in global memory, such as the format of a print."""

    name: str
    data: bytes


@dataclass(frozen=True)
class LocalArray:
    """Bytes of memory that each thread has for itself, aligned to 8."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Kernel:
    """One `.entry`. `num_threads` becomes `.reqntid`; `min_blocks_per_sm` and `max_registers` are optional caps.

    cluster: blocks along x that make a cluster (`.reqnctapercluster`). explicit_cluster: the launch must say how many
    (`.explicitcluster`).
    """

    name: str
    params: tuple[Param, ...]
    body: tuple[Item, ...]
    shared: tuple[SharedArray, ...]
    num_threads: int
    min_blocks_per_sm: int | None = None
    max_registers: int | None = None
    local: tuple[LocalArray, ...] = ()
    cluster: int = 1
    explicit_cluster: bool = False


@dataclass(frozen=True)
class Module:
    target: Target
    kernels: tuple[Kernel, ...]
    data: tuple[GlobalBytes, ...] = ()
