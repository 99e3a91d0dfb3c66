"""PTX text -> the objects of `tilus.ptx.module`.

Reads what the printer writes (`print_module(parse(text)) == text`) and the PTX of other compilers: registers of any
declared name, nested scopes, directives for debuggers, hexadecimal and float immediates. A regular expression splits
the whole text into tokens; a recursive descent over them builds the module. Syntax: PTX ISA, chapters 4 and 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tilus.ptx.body_parser import Body, shared_array, type_nbytes
from tilus.ptx.lexer import Cursor
from tilus.ptx.module import Kernel, Module, Param, SharedArray
from tilus.target import TARGETS, Target


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


class _Parser(Cursor):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.files = self._files()
        self.target: Target | None = None
        self.version = (7, 0)
        self.module_shared: dict[str, SharedArray] = {}
        self.fresh_shared: list[str] = []
        self.kernels: list[Kernel] = []
        self.lines: dict[str, tuple[int, ...]] = {}

    def _files(self) -> dict[int, str]:
        """The names of all `.file` directives: other compilers put them at the end of the text."""
        kinds, words = self.kinds, self.words
        places = [
            at for at, word in enumerate(words) if word == ".file" and kinds[at + 1 : at + 3] == ["int", "string"]
        ]
        return {int(words[at + 1]): words[at + 2].strip('"') for at in places}

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
                array = shared_array(self)
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

    def entry(self) -> None:
        name = self.name()
        params = self.params() if self.accept("(") else ()
        limits = self.limits()
        self.expect("{")
        body = Body(self, self.files)
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
                cluster=limits.get(".reqnctapercluster", 1),
                explicit_cluster=".explicitcluster" in limits,
            )
        )
        self.lines[name] = tuple(body.lines)

    def params(self) -> tuple[Param, ...]:
        params: list[Param] = []
        while not self.accept(")"):
            self.expect(".param")
            align = self.integer() if self.accept(".align") else None
            type_name = self.name()
            type_nbytes(self, type_name)
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
            elif word == ".reqnctapercluster" and any(value != 1 for value in values[1:]):
                raise self.error(f"{word} {values}: expected a cluster of blocks along x")
            elif values or word == ".explicitcluster":
                limits[word] = values[0] if values else 1
        return limits
