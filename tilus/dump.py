"""The stages of one compilation as files: the IR as translated and after each pass, and the PTX."""

from __future__ import annotations

from pathlib import Path

from tilus.errors import TilusError
from tilus.ir.function import Function


class Dump:
    """Numbered files in a directory, which is made when needed.

    Raises: TilusError when it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0

    def function(self, stage: str, function: Function) -> None:
        """The IR in its text form; `stage` is the name of the pass."""
        from tilus.ir.printer import print_function

        self.write(f"{self._count:02}_{stage}.tilus", print_function(function, remarks=True))
        self._count += 1

    def write(self, name: str, content: str | bytes) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            data = content.encode() if isinstance(content, str) else content
            (self.directory / name).write_bytes(data)
        except OSError as error:
            raise TilusError(f"cannot write {self.directory / name}: {error.strerror}") from error
