"""From an instruction to a closure: operands are decoded once, execution only touches arrays.

A family file registers one function per opcode with `@instruction`; it gets a `Site`, asks it for its operands as numpy
views of the register rows, and returns a step that runs on a mask of lanes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.errors import TilusError
from tilus.ptx.module import FloatImm, Guard, Imm, Operand, Reg, Special, Symbol
from tilus.runtime.emulator.errors import EmulatorError
from tilus.runtime.emulator.machine import WARP, Array, Machine

Mask = npt.NDArray[np.bool_] | None
"""Lanes that execute; None means all lanes of the machine."""
Step = Callable[[Mask], None]
Handler = Callable[["Site"], Step]
Function = (
    Callable[[Array], Array]
    | Callable[[Array, Array], Array]
    | Callable[[Array, Array, Array], Array]
    | Callable[[Array, Array, Array, Array], Array]
)
"""What an instruction computes, from typed source arrays to a result array; it sees all lanes, running or not."""

HANDLERS: dict[str, Handler] = {}

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.uint32,
    "f16x2": np.float16, "bf16x2": np.uint16,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "e4m3x2": np.uint16, "e5m2x2": np.uint16,
}  # fmt: skip
"""numpy type of the elements of a PTX type; the packed pairs give arrays of shape [lanes, 2]."""
PAIRS = frozenset({"f16x2", "bf16x2"})


def instruction(*opcodes: str) -> Callable[[Handler], Handler]:
    """Register the handler of these opcodes (first word of the instruction, or its leading words)."""

    def register(handler: Handler) -> Handler:
        for opcode in opcodes:
            if opcode in HANDLERS:
                raise ValueError(f"two handlers for {opcode!r}")
            HANDLERS[opcode] = handler
        return handler

    return register


class Site:
    """One instruction of a running kernel while it is decoded."""

    def __init__(self, machine: Machine, pc: int) -> None:
        self.machine, self.pc = machine, pc
        self.instr = machine.program.instrs[pc]
        self.operands = self.instr.operands
        self.name, *words = self.instr.opcode.split(".")
        self.words = words
        self.types = [word for word in words if word in DTYPES]

    # Modifiers.
    def has(self, word: str) -> bool:
        return word in self.words

    def allow(self, *words: str) -> None:
        """Refuse modifiers other than these and the types: what is not modelled must not be ignored."""
        for word in self.words:
            if word not in words and word not in DTYPES:
                raise self.unsupported(f"modifier .{word}", f"modelled here: {', '.join('.' + w for w in words)}")

    def one_of(self, *words: str) -> str | None:
        return next((word for word in words if word in self.words), None)

    def type(self, index: int = -1) -> str:
        if not self.types:
            raise self.unsupported("an opcode without a type")
        return self.types[index]

    def unsupported(self, what: str, hint: str | None = None) -> TilusError:
        return self.fault(f"the emulator does not know {what} of `{self.instr.opcode}`", hint=hint)

    def fault(self, message: str, lane: int | None = None, hint: str | None = None) -> EmulatorError:
        return self.machine.fault(self.pc, message, lane, hint)

    # Operands.
    def expect_operands(self, *counts: int) -> None:
        if len(self.operands) not in counts:
            raise self.fault(f"{len(self.operands)} operands, expected {' or '.join(map(str, counts))}")

    def row(self, reg: Reg) -> Array:
        """The untyped row of a register."""
        return self.machine.regs[reg.cls][reg.index]

    def source(self, operand: Operand | int, type_name: str) -> Array:
        """An operand as [lanes] elements (pairs: [lanes, 2]), or a 0-d constant (pairs: [2]).

        A register wider than the type gives its low bits (PTX ISA, "Operand Size Exceeding Instruction-Type Size").
        """
        if isinstance(operand, int):
            operand = self.operands[operand]
        match operand:
            case Reg():
                return self._typed(self.row(operand), type_name)
            case Special(name):
                if self.name != "mov":
                    raise self.fault(
                        f"special register {name} as operand of {self.name}", hint="read it with mov first"
                    )
                if name not in self.machine.special:
                    raise self.unsupported(f"special register {name}")
                return self._typed(self.machine.special[name], type_name)
            case Symbol(name) if name in self.machine.shared_symbols:
                address = self.machine.shared.address_of(self.machine.shared_symbols[name])
                return np.asarray(address).astype(DTYPES[type_name])
            case Symbol(name) if name in self.machine.param_symbols and DTYPES[type_name] is np.uint64:
                return np.asarray(self.machine.param_symbols[name], np.uint64)
            case Imm() | FloatImm():
                return self._constant(operand, type_name)
            case _:
                raise self.fault(f"operand {operand} cannot be read as .{type_name}")

    def predicate(self, operand: Operand) -> Callable[[], Array]:
        """A predicate operand, negated or not, as a function of the moment."""
        if isinstance(operand, Guard) and operand.negated:
            row = self.row(operand.reg)
            return lambda: ~row
        values = self.source(operand.reg if isinstance(operand, Guard) else operand, "pred")
        return lambda: values

    def target(self, operand: Operand | int, type_name: str) -> Array:
        """A destination register as a writable view of the type; its width must match."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if isinstance(operand, Special) and operand.name == "_":
            return self._typed(np.zeros(self.machine.lanes, self._unsigned(type_name)), type_name)
        if not isinstance(operand, Reg):
            raise self.fault(f"destination {operand}, expected a register")
        row = self.row(operand)
        wanted = self._unsigned(type_name)
        if row.dtype != wanted:
            raise self.fault(
                f"destination register has {row.dtype.itemsize * 8} bits, expected "
                f"{wanted.itemsize * 8} for .{type_name}"
            )
        return self._typed(row, type_name)

    def _unsigned(self, type_name: str) -> np.dtype[Any]:
        dtype = np.dtype(DTYPES[type_name])
        if dtype == np.bool_:
            return dtype
        return np.dtype(f"u{max(2, dtype.itemsize * (2 if type_name in PAIRS else 1))}")

    def _typed(self, row: Array, type_name: str) -> Array:
        dtype = np.dtype(DTYPES[type_name])
        if (dtype == np.bool_) != (row.dtype == np.bool_):
            raise self.fault(f"a predicate and .{type_name} are mixed up")
        if type_name in PAIRS:
            if row.dtype.itemsize != 4:
                raise self.fault(f"operand of {row.dtype.itemsize * 8} bits, expected 32 for .{type_name}")
            return row.view(dtype).reshape(-1, 2)
        if row.dtype.itemsize < dtype.itemsize:
            raise self.fault(
                f"operand of {row.dtype.itemsize * 8} bits, expected {dtype.itemsize * 8} for .{type_name}"
            )
        return row.view(dtype)[:: row.dtype.itemsize // dtype.itemsize]

    def _constant(self, operand: Imm | FloatImm, type_name: str) -> Array:
        dtype = np.dtype(DTYPES[type_name])
        if isinstance(operand, Imm):
            if type_name == "pred":
                return np.asarray(operand.value != 0)
            if dtype.kind == "f" and type_name != "f16x2":
                return np.asarray(operand.value, dtype)
            nbits = 32 if type_name in PAIRS else dtype.itemsize * 8
            raw = np.asarray(operand.value & ((1 << nbits) - 1), f"u{nbits // 8}")
        elif operand.nbits == 64 and type_name == "f32":
            value = struct.unpack("<d", struct.pack("<Q", operand.bits))[0]
            return np.asarray(value, np.float32)
        else:
            raw = np.asarray(operand.bits, f"u{operand.nbits // 8}")
            if raw.dtype.itemsize != dtype.itemsize:
                raise self.fault(f"float immediate of {operand.nbits} bits as .{type_name}")
        return raw.reshape(1).view(dtype) if type_name in PAIRS else raw.view(dtype)

    def elementwise(self, function: Function, out: Array, *sources: Array) -> Step:
        """The step `out = function(*sources)` on the lanes of the mask."""
        compute: Callable[..., Array] = function

        def step(mask: Mask) -> None:
            if mask is None:
                out[...] = compute(*sources)
            else:
                np.copyto(out, compute(*sources), where=mask if out.ndim == 1 else mask[:, None])

        return step

    # Lanes.
    def lanes(self, mask: Mask) -> npt.NDArray[np.int64]:
        return self.all_lanes if mask is None else np.flatnonzero(mask)

    @property
    def all_lanes(self) -> npt.NDArray[np.int64]:
        return self.machine.all_lanes

    def whole_warps(self, mask: Mask) -> npt.NDArray[np.int64]:
        """Indices of the warps (over all slots) that execute, all of which must do so with all 32 lanes.

        Raises: EmulatorError naming a lane that is missing.
        """
        if mask is None:
            return np.arange(self.machine.lanes // WARP)
        by_warp = mask.reshape(-1, WARP)
        some = by_warp.any(axis=1)
        partial = some & ~by_warp.all(axis=1)
        if partial.any():
            warp = int(np.flatnonzero(partial)[0])
            missing = np.flatnonzero(~by_warp[warp])
            raise self.fault(
                f"lanes {missing.tolist()} of the warp do not execute this warp-wide instruction",
                warp * WARP + int(missing[0]),
                hint="all 32 threads of a warp must reach it together",
            )
        return np.flatnonzero(some)

    def whole_live_warps(self, mask: npt.NDArray[np.bool_]) -> None:
        """Check that of every warp that executes, all threads that have not exited do.

        Raises: EmulatorError naming a thread that is elsewhere.
        """
        missing = self.machine.alive & ~mask
        if not missing.any():
            return
        torn = missing.reshape(-1, WARP) & mask.reshape(-1, WARP).any(axis=1, keepdims=True)
        if torn.any():
            self._fail_torn(torn, "the threads of one warp diverge at an instruction that they must execute together")

    def check_members(self, mask: Mask, members: Array) -> None:
        """Check the member mask of a .sync instruction: it names the executing lane, and all it names are here."""
        if mask is None and members.ndim == 0 and int(members) == 0xFFFFFFFF:
            return
        here = np.ones(self.machine.lanes, np.bool_) if mask is None else mask
        named = np.broadcast_to(members, here.shape).reshape(-1, WARP)
        bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        by_warp = here.reshape(-1, WARP)
        absent = by_warp & (named & bits == 0)
        if absent.any():
            lane = int(np.flatnonzero(absent)[0])
            raise self.fault(
                f"lane {lane % WARP} executes but is not in the member mask {int(named.flat[lane]):#x}", lane
            )
        wanted = np.bitwise_or.reduce(np.where(by_warp, named, np.uint32(0)), axis=1, keepdims=True) & bits != 0
        torn = wanted & ~by_warp & self.machine.alive.reshape(-1, WARP)
        if torn.any():
            self._fail_torn(torn, "lanes that the member mask names do not execute this instruction together")

    def _fail_torn(self, torn: npt.NDArray[np.bool_], message: str) -> None:
        warp = int(np.flatnonzero(torn.any(axis=1))[0])
        lanes = np.flatnonzero(torn[warp]).tolist()
        raise self.fault(
            f"{message}: lanes {lanes} are missing",
            warp * WARP + lanes[0],
            hint="move it out of the divergent branch, or let the whole warp take the branch",
        )
