"""Rows as a table on the terminal, and in a JSON file that is whole at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Report:
    """All results of a run. The file is written anew after each row, by renaming: a run that is cut off keeps its rows."""

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self._path = path
        self.data: dict[str, Any] = {**facts, "suites": {}}

    def suite(
        self,
        name: str,
        rows: Iterable[Row],
        columns: Mapping[str, int],
        cells: Callable[[Row], Sequence[Any]],
        summary: Callable[[Sequence[Row]], list[Row]] | None = None,
        facts: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Take, print and write the rows of a suite. columns: of the table, with their widths. summary: of the rows so far.
        facts: about the run, asked for after each row."""
        found: list[Row] = []
        entry: dict[str, Any] = {"rows": found}
        print(f"\n{name}\n{line(columns, columns.values())}", flush=True)
        for row in rows:
            found.append(row)
            self.data["suites"][name] = entry
            self.data |= facts()
            if summary is not None:
                entry["summary"] = summary(found)
            self.write()
            verdict = {True: "  met", False: "  missed", None: ""}[row.get("met")]
            print(line(cells(row), columns.values()) + verdict)
            for key, message in row["failures"].items():
                print(f"    no {key}: {message}")
            print(end="", flush=True)
        if entry.get("summary"):
            print(summary_table(entry["summary"]), flush=True)

    def write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f"{self._path.name}.part")
        unfinished.write_text(json.dumps(self.data, indent=2) + "\n")
        os.replace(unfinished, self._path)


def line(cells: Iterable[Any], widths: Iterable[int]) -> str:
    return "".join(f"{text(cell):>{width}}" for cell, width in zip(cells, widths, strict=True))


def text(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"


def summary_table(summary: Sequence[Row]) -> str:
    """Geometric means by tokens, with the bars."""
    columns = {"M": 6, "speed-up": 10, "plain": 10, "Triton": 10, "possible": 10, "bar": 8}
    keys = ("M", "speedup", "speedup_plain", "speedup_triton", "speedup_limit", "bar")
    lines = ["geometric means over the shapes, of the speed-up over the faster cuBLAS", line(columns, columns.values())]
    for entry in summary:
        verdict = {True: "  met", False: "  missed", None: ""}[entry["met"]]
        lines.append(line([entry[key] for key in keys], columns.values()) + verdict)
    return "\n".join(lines)
