"""PTX text as tokens, with a cursor that a recursive descent moves along (PTX ISA, chapter 4)."""

from __future__ import annotations

import bisect
import re

from tilus.errors import TilusError

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


class Cursor:
    """The tokens of a text and a position in them. kinds: space-free token classes; starts: offsets into the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.kinds: list[str] = []
        self.words: list[str] = []
        self.starts: list[int] = []
        self.at = 0
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self._split()

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
