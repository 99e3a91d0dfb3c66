"""PTX text -> the objects of `tilus.ptx.module`.

Reads what the printer writes (`print_module(parse(text)) == text`) and the PTX of other compilers: registers of any
declared name, nested scopes, directives for debuggers, hexadecimal and float immediates. A regular expression splits
the whole text into tokens; a recursive descent over them builds the module. Syntax: PTX ISA, chapters 4 and 5.
"""

from __future__ import annotations

import bisect
import re
import struct
from dataclasses import dataclass, field, replace

from tilus.errors import Loc, TilusError
from tilus.ptx.module import (
    Address,
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
    Vector,
)
from tilus.target import TARGETS, Target

_TOKEN = re.compile(
    r"""(?P<space>\s+|/\*.*?\*/)
    |(?P<comment>//[^\n]*)
    |(?P<string>"[^"\n]*")
    |(?P<float>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
    |(?P<int>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?)
    |(?P<name>[A-Za-z_$%.](?:[\w$.]|::)*)
    |(?P<punct>[{}()\[\];,:@!|+<>=-])""",
    re.VERBOSE | re.DOTALL,
)

_NBYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
_SPECIALS = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]|cluster_ctarank"
    r"|cluster_nctarank|is_explicit_cluster|laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64"
    r"|lanemask_(?:eq|le|lt|ge|gt)|globaltimer(?:_lo|_hi)?|(?:total|aggr|dynamic)_smem_size|current_graph_exec)$"
)


@dataclass(frozen=True)
class Source:
    """A parsed module with the text it came from; `lines[kernel][i]` is the line (from 1) of body item i."""

    module: Module
    text: str
    lines: dict[str, tuple[int, ...]]

    def line_text(self, line: int) -> str:
        return self.text.split("\n")[line - 1].strip()


def parse(text: str) -> Module:
    """The module that a PTX text describes.

    Raises: TilusError with the PTX line for what is not PTX, or not supported.
    """
    return parse_source(text).module


def parse_source(text: str) -> Source:
    """As `parse`, with the line of every instruction."""
    return _Parser(text).source()


@dataclass
class _Scope:
    """Names of one kernel body or of a nested `{ }` in it."""

    regs: dict[str, Reg] = field(default_factory=dict[str, Reg])
    ranges: dict[str, tuple[RegClass, int, int]] = field(default_factory=dict[str, tuple[RegClass, int, int]])


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.kinds: list[str] = []
        self.words: list[str] = []
        self.starts: list[int] = []
        self.at = 0
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self._split()
        self.files = self._files()
        self.target: Target | None = None
        self.version = (7, 0)
        self.module_shared: dict[str, SharedArray] = {}
        self.fresh_shared: list[str] = []
        self.kernels: list[Kernel] = []
        self.lines: dict[str, tuple[int, ...]] = {}

    def _split(self) -> None:
        position, text = 0, self.text
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                self.starts.append(position)
                self.at = len(self.starts) - 1
                raise self.error(f"unexpected character {text[position]!r}")
            position = match.end()
            kind = match.lastgroup
            if kind is not None and kind != "space":
                self.kinds.append(kind)
                self.words.append(match.group())
                self.starts.append(match.start())
        self.kinds.append("end")
        self.words.append("end of text")
        self.starts.append(len(text))

    def _files(self) -> dict[int, str]:
        """The names of all `.file` directives: other compilers put them at the end of the text."""
        kinds, words = self.kinds, self.words
        places = [at for at, word in enumerate(words) if word == ".file" and kinds[at + 1 : at + 3] == ["int", "string"]]
        return {int(words[at + 1]): words[at + 2].strip('"') for at in places}

    # Cursor.
    def line(self) -> int:
        return bisect.bisect_left(self.newlines, self.starts[min(self.at, len(self.starts) - 1)]) + 1

    def error(self, message: str, hint: str | None = None) -> TilusError:
        line = self.line()
        return TilusError(f"PTX line {line}: {message}\n  {line:>5} | {self.text.split(chr(10))[line - 1]}", hint=hint)

    def next(self) -> str:
        word = self.words[self.at]
        self.at += 1
        return word

    def accept(self, word: str) -> bool:
        if self.words[self.at] == word and self.kinds[self.at] != "end":
            self.at += 1
            return True
        return False

    def expect(self, word: str) -> None:
        if not self.accept(word):
            raise self.error(f"expected {word!r}, found {self.words[self.at]!r}")

    def name(self) -> str:
        if self.kinds[self.at] != "name":
            raise self.error(f"expected a name, found {self.words[self.at]!r}")
        return self.next()

    def integer(self) -> int:
        negative = self.accept("-")
        if self.kinds[self.at] != "int":
            raise self.error(f"expected an integer, found {self.words[self.at]!r}")
        value = int(self.next().rstrip("U"), 0)
        return -value if negative else value

    def skip_to(self, word: str) -> None:
        while not self.accept(word):
            if self.kinds[self.at] == "end":
                raise self.error(f"expected {word!r}, found the end of the text")
            self.at += 1

    def skip_line(self, line: int) -> None:
        """Drop what is left of a line."""
        while self.kinds[self.at] != "end" and self.line() == line:
            self.at += 1

    # Module level.
    def source(self) -> Source:
        while self.kinds[self.at] != "end":
            if self.kinds[self.at] == "comment":
                self.at += 1
            else:
                self.directive()
        if self.target is None:
            raise self.error("expected a `.target` directive, found none")
        return Source(Module(self.target, tuple(self.kernels)), self.text, self.lines)

    def directive(self) -> None:
        match self.name():
            case ".version":
                major, _, minor = self.next().partition(".")
                self.version = (int(major), int(minor or 0))
            case ".target":
                self.target = self.read_target()
            case ".address_size":
                if (nbits := self.integer()) != 64:
                    self.at -= 1
                    raise self.error(f"address size {nbits}, expected 64")
            case ".file":
                self.skip_line(self.line())
            case ".visible" | ".weak" | ".extern":
                pass
            case ".shared":
                array = self.shared_array()
                self.module_shared[array.name] = array
                self.fresh_shared.append(array.name)
            case ".entry":
                self.entry()
            case ".section":
                self.skip_to("{")
                self.skip_to("}")
            case word:
                self.at -= 1
                raise self.error(
                    f"unsupported directive {word!r}", hint="kernels, shared arrays, .file and .loc are supported"
                )

    def read_target(self) -> Target:
        name = self.name()
        while self.accept(","):
            self.name()
        if name in TARGETS:
            return TARGETS[name]
        match = re.fullmatch(r"sm_(\d+)[af]?", name)
        if match is None:
            raise self.error(f"target {name!r}, expected sm_NN")
        return Target(name, int(match.group(1)), self.version, TARGETS["sm_90a"].max_shared_nbytes)

    def shared_array(self) -> SharedArray:
        """After `.shared`: `.align 16 .b8 name[1024];` or a scalar; `[]` is the launch-sized array."""
        align = self.integer() if self.accept(".align") else None
        size = self.nbytes_of(self.name())
        name, count, dynamic = self.name(), 1, False
        while self.accept("["):
            if self.accept("]"):
                dynamic = True
            else:
                count *= self.integer()
                self.expect("]")
        self.expect(";")
        return SharedArray(name, 0 if dynamic else count * size, align or size, dynamic)

    def nbytes_of(self, type_name: str) -> int:
        size = _NBYTES.get(re.sub(r"^\.[a-z]+", "", type_name))
        if size is None:
            self.at -= 1
            raise self.error(f"expected a type such as .b32, found {type_name!r}")
        return size

    def entry(self) -> None:
        name = self.name()
        params = self.params() if self.accept("(") else ()
        limits = self.limits()
        self.expect("{")
        body = _Body(self)
        body.parse()
        shared = dict.fromkeys(self.fresh_shared)
        shared.update((symbol, None) for symbol in body.symbols if symbol in self.module_shared)
        module_level = [self.module_shared[symbol] for symbol in shared]
        self.fresh_shared = []
        self.kernels.append(
            Kernel(
                name,
                params,
                tuple(body.items),
                (*module_level, *body.shared),
                limits.get("threads", 0),
                limits.get(".minnctapersm"),
                limits.get(".maxnreg"),
            )
        )
        self.lines[name] = tuple(body.lines)

    def params(self) -> tuple[Param, ...]:
        params: list[Param] = []
        while not self.accept(")"):
            self.expect(".param")
            align = self.integer() if self.accept(".align") else None
            type_name = self.name()
            self.nbytes_of(type_name)
            if self.accept(".ptr"):
                while self.words[self.at] in (".global", ".shared", ".const", ".local"):
                    self.at += 1
                if self.accept(".align"):
                    self.integer()
            name, count = self.name(), None
            if self.accept("["):
                count = self.integer()
                self.expect("]")
            params.append(Param(name, type_name[1:], count, align))
            if not self.accept(","):
                self.expect(")")
                break
        return tuple(params)

    def limits(self) -> dict[str, int]:
        """The tuning directives between the parameters and the body."""
        limits: dict[str, int] = {}
        while self.words[self.at].startswith("."):
            word = self.next()
            values = [self.integer()] if self.kinds[self.at] == "int" else []
            while values and self.accept(","):
                values.append(self.integer())
            if word in (".reqntid", ".maxntid"):
                if any(value != 1 for value in values[1:]):
                    raise self.error(f"{word} {values}: expected a one-dimensional block")
                limits["threads"] = values[0]
            elif values:
                limits[word] = values[0]
        return limits


class _Body:
    """The body of one kernel."""

    def __init__(self, parser: _Parser) -> None:
        self.p = parser
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
                self.shared.append(p.shared_array())
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
        if index not in p.files:
            p.at -= 1
            raise p.error(f".loc names file {index}, expected one of {sorted(p.files)}")
        p.skip_line(line)
        return Loc(p.files[index], row, column)

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

    def address(self) -> Address:
        p = self.p
        if p.kinds[p.at] != "name":
            raise p.error(f"expected a register or a variable in an address, found {p.words[p.at]!r}")
        base = self.named(p.name())
        if isinstance(base, Special):
            raise p.error(f"expected a register or a variable in an address, found {base.name!r}")
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


_CLASSES = {"8": RegClass.B16, "16": RegClass.B16, "16x2": RegClass.B32, "32": RegClass.B32, "64": RegClass.B64}


def _class_of(type_name: str) -> RegClass | None:
    """The register class of a declared type such as `.f32`; None for a type that no register can have."""
    return RegClass.PRED if type_name == ".pred" else _CLASSES.get(re.sub(r"^\.[a-z]+", "", type_name))
