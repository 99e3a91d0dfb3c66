"""Lines of C, indented, with names that are used once."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

INDENT = "    "


class Writer:
    """Collects the lines of one function."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 1
        self._count = 0

    def line(self, text: str) -> None:
        self.lines.append(INDENT * self.depth + text)

    def name(self, hint: str) -> str:
        """A new identifier that starts like `hint`."""
        self._count += 1
        letters = "".join(c if c.isalnum() and c.isascii() else "_" for c in hint)
        return f"{letters}_{self._count}"

    @contextmanager
    def block(self, header: str = "") -> Generator[None]:
        """`header { ... }`."""
        self.line(f"{header} {{" if header else "{")
        self.depth += 1
        yield
        self.depth -= 1
        self.line("}")

    @contextmanager
    def loops(self, sizes: Sequence[int]) -> Generator[list[str]]:
        """Nested loops from 0 to the sizes; gives the counters. A loop of one trip is the constant 0."""
        counters: list[str] = []
        opened = 0
        for size in sizes:
            if size == 1:
                counters.append("0")
                continue
            name = self.name("i")
            counters.append(name)
            self.line(f"for (int64_t {name} = 0; {name} < {size}; {name}++) {{")
            self.depth += 1
            opened += 1
        yield counters
        for _ in range(opened):
            self.depth -= 1
            self.line("}")
