"""PTX text from a module, with the lowest `.version` that its instructions and target need."""

from __future__ import annotations

from collections.abc import Iterable

from tilus.errors import Loc
from tilus.ptx.module import (
    Address,
    Call,
    Comment,
    FloatImm,
    Guard,
    Imm,
    Instr,
    Item,
    Kernel,
    Label,
    LabelRef,
    Module,
    Operand,
    Pair,
    Param,
    Reg,
    RegClass,
    SharedArray,
    Special,
    Symbol,
    TensorAddress,
    Vector,
)  # fmt: skip
from tilus.ptx.versions import required_version


def print_module(module: Module) -> str:
    """The text of a module. Source positions become `.loc` directives over a `.file` table, one per user file."""
    opcodes = [item.opcode for kernel in module.kernels for item in kernel.body if isinstance(item, Instr)]
    major, minor = required_version(opcodes, module.target)
    files = _files(module.kernels)
    lines = [f".version {major}.{minor}", f".target {module.target.name}", ".address_size 64", ""]
    lines += [f'.file {index} "{name}"' for name, index in files.items()]
    calls = {item.function: len(item.args) for k in module.kernels for item in k.body if isinstance(item, Call)}
    for function, count in calls.items():
        params = ", ".join(f".param .b64 argument_{i}" for i in range(count))
        lines.append(f".extern .func (.param .b32 result) {function} ({params});")
    for data in module.data:
        lines.append(f".global .align 1 .b8 {data.name}[{len(data.data)}] = {{{', '.join(map(str, data.data))}}};")
    for kernel in module.kernels:
        lines += _kernel(kernel, files)
    return "\n".join(lines) + "\n"


def _files(kernels: Iterable[Kernel]) -> dict[str, int]:
    names = {item.loc.file: None for kernel in kernels for item in kernel.body if isinstance(item, Instr) and item.loc}
    return {name: index for index, name in enumerate(names, start=1)}


def _kernel(kernel: Kernel, files: dict[str, int]) -> list[str]:
    dynamic = [array for array in kernel.shared if array.dynamic]
    static = [array for array in kernel.shared if not array.dynamic]
    lines = [_shared(array) for array in dynamic]
    params = ",\n".join("    " + _param(param) for param in kernel.params)
    lines += [f".visible .entry {kernel.name}(", *([params] if params else []), ")"]
    lines.append(f".reqntid {kernel.num_threads}, 1, 1")
    if kernel.cluster > 1:
        lines.append(f".reqnctapercluster {kernel.cluster}, 1, 1")
    if kernel.explicit_cluster:
        lines.append(".explicitcluster")
    if kernel.min_blocks_per_sm is not None:
        lines.append(f".minnctapersm {kernel.min_blocks_per_sm}")
    if kernel.max_registers is not None:
        lines.append(f".maxnreg {kernel.max_registers}")
    lines.append("{")
    lines += [f"    .reg .{cls.value} {cls.prefix}<{count}>;" for cls, count in _register_counts(kernel.body).items()]
    lines += ["    " + _shared(array) for array in static]
    lines += [f"    .local .align 8 .b8 {array.name}[{array.nbytes}];" for array in kernel.local]
    lines += _body(kernel.body, files)
    lines += ["}", ""]
    return lines


def _param(param: Param) -> str:
    align = f" .align {param.align}" if param.align is not None else ""
    count = f"[{param.count}]" if param.count is not None else ""
    return f".param{align} .{param.type} {param.name}{count}"


def _shared(array: SharedArray) -> str:
    if array.dynamic:
        return f".extern .shared .align {array.align} .b8 {array.name}[];"
    return f".shared .align {array.align} .b8 {array.name}[{array.nbytes}];"


def _register_counts(body: Iterable[Item]) -> dict[RegClass, int]:
    counts: dict[RegClass, int] = {}
    for item in body:
        if isinstance(item, Instr):
            guards = (item.guard.reg,) if item.guard else ()
            for reg in (*guards, *_registers(item.operands)):
                counts[reg.cls] = max(counts.get(reg.cls, 0), reg.index + 1)
    return counts


def _registers(operands: Iterable[Operand]) -> Iterable[Reg]:
    for operand in operands:
        match operand:
            case Reg():
                yield operand
            case Address(base=Reg() as base):
                yield base
            case TensorAddress(map=base, coordinates=coordinates):
                yield from _registers((base, coordinates))
            case Vector(elements=elements):
                yield from (element for element in elements if isinstance(element, Reg))
            case Pair(first, second):
                yield from (element for element in (first, second) if isinstance(element, Reg))
            case Guard(reg):
                yield reg
            case _:
                pass


def _body(body: Iterable[Item], files: dict[str, int]) -> list[str]:
    lines: list[str] = []
    last = None
    for item in body:
        match item:
            case Label():
                lines.append(f"{item.name}:")
            case Comment():
                lines.append(f"    // {item.text}")
            case Call():
                lines += [f"    {line}" for line in _call(item)]
            case Instr():
                if item.loc is not None and (position := _position(item.loc, files)) != last:
                    lines.append(position)
                    last = position
                lines.append("    " + print_instr(item))
    return lines


def _position(loc: Loc, files: dict[str, int]) -> str:
    return f"    .loc {files[loc.file]} {loc.line} {loc.column}"


def _call(call: Call) -> list[str]:
    """The calling sequence in a block of its own, where its parameters are declared."""
    names = [f"argument_{i}" for i in range(len(call.args))]
    lines = ["{"]
    lines += [
        f".param .b64 {name}; st.param.b64 [{name}], {print_operand(a)};"
        for name, a in zip(names, call.args, strict=True)
    ]
    return [*lines, f".param .b32 result; call (result), {call.function}, ({', '.join(names)});", "}"]


def print_instr(instr: Instr) -> str:
    guard = f"{_guard(instr.guard)} " if instr.guard else ""
    operands = ", ".join(map(print_operand, instr.operands))
    return f"{guard}{instr.opcode}{' ' if operands else ''}{operands};"


def _guard(guard: Guard) -> str:
    return f"@{'!' if guard.negated else ''}{print_operand(guard.reg)}"


def print_operand(operand: Operand) -> str:
    match operand:
        case Reg(cls, index):
            return f"{cls.prefix}{index}"
        case Imm(value):
            return str(value)
        case FloatImm(bits, nbits):
            return f"0f{bits:08X}" if nbits == 32 else f"0d{bits:016X}"
        case Special(name) | Symbol(name) | LabelRef(name):
            return name
        case Address(base, offset):
            sign = f"+{offset}" if offset else ""  # ptxas wants the plus in front of a minus, too
            return f"[{print_operand(base)}{sign}]"
        case TensorAddress(base, coordinates):
            return f"[{print_operand(base)}, {print_operand(coordinates)}]"
        case Pair(first, second):
            return f"{print_operand(first)}|{print_operand(second)}"
        case Guard():
            return _guard(operand).removeprefix("@")
        case Vector(elements):
            return "{" + ", ".join(map(print_operand, elements)) + "}"
