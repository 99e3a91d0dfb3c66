"""The body of a PTX kernel: registers, scopes, labels, positions and instructions (PTX ISA, chapters 4 and 5)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field, replace

from tilus.errors import Loc
from tilus.ptx.lexer import Cursor
from tilus.ptx.module import (
    Address,
    Comment,
    FloatImm,
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
    SharedArray,
    Special,
    Symbol,
    TensorAddress,
    Vector,
)  # fmt: skip

_SPECIALS = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]|cluster_ctarank"
    r"|cluster_nctarank|is_explicit_cluster|laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64"
    r"|lanemask_(?:eq|le|lt|ge|gt)|globaltimer(?:_lo|_hi)?|(?:total|aggr|dynamic)_smem_size|current_graph_exec)$"
)
_NBYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
_CLASSES = {"8": RegClass.B16, "16": RegClass.B16, "16x2": RegClass.B32, "32": RegClass.B32, "64": RegClass.B64}


def _class_of(type_name: str) -> RegClass | None:
    """The register class of a declared type such as `.f32`; None for a type that no register can have."""
    return RegClass.PRED if type_name == ".pred" else _CLASSES.get(re.sub(r"^\.[a-z]+", "", type_name))


@dataclass
class _Scope:
    """Names of one kernel body or of a nested `{ }` in it."""

    regs: dict[str, Reg] = field(default_factory=dict[str, Reg])
    ranges: dict[str, tuple[RegClass, int, int]] = field(default_factory=dict[str, tuple[RegClass, int, int]])


def shared_array(p: Cursor) -> SharedArray:
    """After `.shared`: `.align 16 .b8 name[1024];` or a scalar; `[]` is the launch-sized array."""
    align = p.integer() if p.accept(".align") else None
    size = type_nbytes(p, p.name())
    name, count, dynamic = p.name(), 1, False
    while p.accept("["):
        if p.accept("]"):
            dynamic = True
        else:
            count *= p.integer()
            p.expect("]")
    p.expect(";")
    return SharedArray(name, 0 if dynamic else count * size, align or size, dynamic)


def type_nbytes(p: Cursor, type_name: str) -> int:
    """Bytes of a type such as `.f32` that has just been read."""
    size = _NBYTES.get(re.sub(r"^\.[a-z]+", "", type_name))
    if size is None:
        p.at -= 1
        raise p.error(f"expected a type such as .b32, found {type_name!r}")
    return size


class Body:
    """The body of one kernel."""

    def __init__(self, cursor: Cursor, files: dict[int, str]) -> None:
        """cursor: behind the opening brace. files: names in the `.file` table."""
        self.p = cursor
        self.files = files
        self.items: list[Item] = []
        self.lines: list[int] = []
        self.shared: list[SharedArray] = []
        self.symbols: set[str] = set()
        self.loc: Loc | None = None
        self.scopes = [_Scope()]
        self.scope_starts: list[int] = []
        self.counts = self._own_counts()

    def _own_counts(self) -> dict[RegClass, int]:
        """Registers named as the printer names them keep their index; all others come after these."""
        counts = dict.fromkeys(RegClass, 0)
        by_prefix = {cls.prefix: cls for cls in RegClass}
        depth, at, words = 1, self.p.at, self.p.words
        while depth and self.p.kinds[at] != "end":
            depth += (words[at] == "{") - (words[at] == "}")
            if words[at] == ".reg" and words[at + 3 : at + 4] == ["<"]:
                cls = by_prefix.get(words[at + 2])
                if cls is not None and _class_of(words[at + 1]) is cls:
                    counts[cls] = max(counts[cls], int(words[at + 4], 0) if self.p.kinds[at + 4] == "int" else 0)
            at += 1
        return counts

    def parse(self) -> None:
        p = self.p
        while True:
            kind, word = p.kinds[p.at], p.words[p.at]
            if kind == "comment":
                self.add(Comment(word[2:].strip()))
                p.at += 1
            elif word == "{":
                p.at += 1
                self.scopes.append(_Scope())
                self.scope_starts.append(len(self.items))
            elif word == "}":
                p.at += 1
                self.scopes.pop()
                if not self.scopes:
                    return
                self.localise_labels(self.scope_starts.pop())
            elif word == ";":
                p.at += 1
            elif word[0] == "." and kind == "name":
                self.directive()
            elif kind == "name" and p.words[p.at + 1] == ":":
                self.add(Label(word))
                p.at += 2
            else:
                self.instruction()

    def add(self, item: Item) -> None:
        self.lines.append(self.p.line())
        self.items.append(item)

    def localise_labels(self, start: int) -> None:
        """A label of a nested scope hides outer ones: it gets the scope's position as a suffix when taken outside."""
        inner = {item.name for item in self.items[start:] if isinstance(item, Label)}
        taken = {item.name for item in self.items[:start] if isinstance(item, Label)} & inner
        for index in range(start, len(self.items)) if taken else ():
            item = self.items[index]
            if isinstance(item, Label) and item.name in taken:
                self.items[index] = Label(f"{item.name}_{start}")
            elif isinstance(item, Instr):
                self.items[index] = replace(
                    item,
                    operands=tuple(
                        LabelRef(f"{operand.name}_{start}")
                        if isinstance(operand, LabelRef) and operand.name in taken
                        else operand
                        for operand in item.operands
                    ),
                )

    def directive(self) -> None:
        p = self.p
        match p.next():
            case ".reg":
                self.declare_registers()
            case ".shared":
                self.shared.append(shared_array(p))
            case ".loc":
                self.loc = self.location()
            case ".pragma" | ".branchtargets":
                p.skip_to(";")
            case word:
                p.at -= 1
                raise p.error(f"unsupported directive {word!r} in a kernel body")

    def location(self) -> Loc:
        p = self.p
        line = p.line()
        index, row, column = p.integer(), p.integer(), p.integer()
        if index not in self.files:
            p.at -= 1
            raise p.error(f".loc names file {index}, expected one of {sorted(self.files)}")
        p.skip_line(line)
        return Loc(self.files[index], row, column)

    def declare_registers(self) -> None:
        p = self.p
        type_name = p.name()
        cls = _class_of(type_name)
        if cls is None:
            p.at -= 1
            raise p.error(f"register of type {type_name!r}, expected .pred or a type of 8 to 64 bits")
        scope = self.scopes[-1]
        while True:
            name = p.name()
            if p.accept("<"):
                count = p.integer()
                p.expect(">")
                own = name == cls.prefix and len(self.scopes) == 1
                scope.ranges[name] = (cls, 0 if own else self.counts[cls], count)
                self.counts[cls] += 0 if own else count
            else:
                scope.regs[name] = Reg(cls, self.counts[cls])
                self.counts[cls] += 1
            if not p.accept(","):
                break
        p.expect(";")

    def register(self, name: str) -> Reg | None:
        for scope in reversed(self.scopes):
            reg = scope.regs.get(name)
            if reg is not None:
                return reg
            stem = name.rstrip("0123456789")
            declared = scope.ranges.get(stem)
            if declared is not None and len(stem) < len(name) and int(name[len(stem) :]) < declared[2]:
                cls, base, _ = declared
                scope.regs[name] = Reg(cls, base + int(name[len(stem) :]))
                return scope.regs[name]
        return None

    def instruction(self) -> None:
        p = self.p
        line, guard = p.line(), None
        if p.accept("@"):
            negated = p.accept("!")
            guard = Guard(self.predicate(), negated)
        opcode = p.name()
        operands: list[Operand] = []
        if not p.accept(";"):
            branch = opcode.partition(".")[0] == "bra"
            operands.append(self.operand(branch))
            while p.accept(","):
                operands.append(self.operand(branch))
            p.expect(";")
        self.lines.append(line)
        self.items.append(Instr(opcode, tuple(operands), guard, self.loc))

    def predicate(self) -> Reg:
        p = self.p
        reg = self.register(p.name())
        if reg is None or reg.cls is not RegClass.PRED:
            p.at -= 1
            raise p.error(f"expected a declared predicate register, found {p.words[p.at]!r}")
        return reg

    def operand(self, branch: bool) -> Operand:
        p = self.p
        kind, word = p.kinds[p.at], p.words[p.at]
        if kind == "name":
            p.at += 1
            if branch:
                return LabelRef(word)
            operand = self.named(word)
            if p.words[p.at] != "|":
                return operand
            p.at += 1
            second = self.named(p.name())
            if not isinstance(operand, Reg | Special) or not isinstance(second, Reg | Special):
                raise p.error(f"expected registers around '|', found {word!r} and {p.words[p.at - 1]!r}")
            return Pair(operand, second)
        if kind == "int" or kind == "float" or word == "-":
            return self.number()
        if word == "[":
            p.at += 1
            return self.address()
        if word == "{":
            p.at += 1
            return self.vector()
        if word == "!":
            p.at += 1
            return Guard(self.predicate(), negated=True)
        raise p.error(f"expected an operand, found {word!r}")

    def named(self, word: str) -> Reg | Special | Symbol:
        reg = self.register(word)
        if reg is not None:
            return reg
        if word == "_" or _SPECIALS.match(word):
            return Special(word)
        if word.startswith("%"):
            self.p.at -= 1
            raise self.p.error(f"register {word!r} is not declared")
        self.symbols.add(word)
        return Symbol(word)

    def number(self) -> Imm | FloatImm:
        p = self.p
        sign = -1 if p.accept("-") else 1
        if p.kinds[p.at] == "int":
            return Imm(sign * p.integer())
        if p.kinds[p.at] != "float":
            raise p.error(f"expected a number, found {p.words[p.at]!r}")
        word = p.next()
        prefix = word[:2].lower()
        if prefix == "0f" or prefix == "0d":
            nbits = 32 if prefix == "0f" else 64
            return FloatImm(int(word[2:], 16) ^ (1 << (nbits - 1) if sign < 0 else 0), nbits)
        return FloatImm(struct.unpack("<Q", struct.pack("<d", sign * float(word)))[0], 64)

    def address(self) -> Address | TensorAddress:
        p = self.p
        if p.kinds[p.at] != "name":
            raise p.error(f"expected a register or a variable in an address, found {p.words[p.at]!r}")
        base = self.named(p.name())
        if isinstance(base, Special):
            raise p.error(f"expected a register or a variable in an address, found {base.name!r}")
        if p.accept(","):
            p.expect("{")
            coordinates = self.vector()
            p.expect("]")
            return TensorAddress(base, coordinates)
        offset = 0
        if p.accept("+") or p.words[p.at] == "-":
            offset = p.integer()
        p.expect("]")
        return Address(base, offset)

    def vector(self) -> Vector:
        p = self.p
        elements: list[Reg | Imm | FloatImm | Special] = []
        while True:
            if p.kinds[p.at] == "name":
                element = self.named(p.name())
                if isinstance(element, Symbol):
                    raise p.error(f"expected a register in a vector, found {element.name!r}")
                elements.append(element)
            else:
                elements.append(self.number())
            if not p.accept(","):
                p.expect("}")
                return Vector(tuple(elements))
