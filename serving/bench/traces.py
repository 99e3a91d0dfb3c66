"""Readers of published traces: BurstGPT (CSV), Azure LLM inference 2023 (CSV) and Mooncake (JSON lines).

Sources: github.com/HPMLL/BurstGPT, github.com/Azure/AzurePublicDataset (AzureLLMInferenceDataset2023) and
github.com/kvcache-ai/Mooncake (FAST25-release/traces).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TextIO, cast

from serving.bench.workload import PlannedRequest
from tilus.errors import Loc, TilusError

MOONCAKE_BLOCK = 512
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
_SCHEMAS = (
    f"Azure's columns {', '.join(_AZURE)}; BurstGPT's columns {', '.join(_BURSTGPT)} (and others); or Mooncake's JSON lines "
    "with timestamp, input_length, output_length and hash_ids"
)
Row = Mapping[str, object]


def read_trace(path: Path, limit: int | None = None) -> list[PlannedRequest]:
    """The first `limit` requests of a trace in order of time, the first at 0 s. Its first line tells which trace it is.

    BurstGPT's failed requests, those with no response tokens, are left out.
    Raises: TilusError with the line when it is not what the schema says.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            plan = sorted(_requests(path, file), key=lambda planned: planned.arrival)[:limit]
    except OSError as error:
        raise TilusError(f"cannot read the trace {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TilusError(f"the trace {path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    if not plan:
        raise TilusError(f"the trace {path} holds no requests")
    start = plan[0].arrival
    return [replace(planned, arrival=planned.arrival - start) for planned in plan]


def _requests(path: Path, file: TextIO) -> Iterator[PlannedRequest]:
    first = file.readline()
    if first.lstrip().startswith("{"):
        file.seek(0)
        yield from _read_mooncake(path, file)
        return
    columns = [column.strip() for column in next(csv.reader([first.removeprefix("\ufeff")]), [])]
    for wanted, parse in ((_AZURE, _parse_azure), (_BURSTGPT, _parse_burstgpt)):
        if set(wanted) <= set(columns):
            yield from _read_csv(path, file, columns, parse)
            return
    raise TilusError(
        f"the first line of {path} is of no known trace: {first.strip()[:100]!r}",
        loc=Loc(str(path), 1),
        hint=f"expected {_SCHEMAS}",
    )


@dataclass(frozen=True)
class _Line:
    """A row and where it stands: its fields, checked, or an error that shows the line."""

    row: Row
    loc: Loc

    def error(self, message: str) -> TilusError:
        return TilusError(message, loc=self.loc)

    def number(self, name: str) -> float:
        """A field that is a finite number of at least 0."""
        if name not in self.row:
            raise self.error(f"the field {name} is missing; found {', '.join(self.row) or 'nothing'}")
        value = self.row[name]
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            found = float(value)
        except ValueError:
            raise self.error(f"{name} is {value!r}, but must be a number") from None
        if not 0 <= found < math.inf:
            raise self.error(f"{name} is {value!r}, but must be at least 0 and finite")
        return found

    def count(self, name: str, least: int = 1) -> int:
        """A field that is a whole number of at least `least`."""
        found = self.number(name)
        if found != int(found) or found < least:
            raise self.error(f"{name} is {self.row[name]!r}, but must be a whole number of at least {least}")
        return int(found)


Parse = Callable[[_Line], PlannedRequest | None]


def _read_csv(path: Path, file: TextIO, columns: list[str], parse: Parse) -> Iterator[PlannedRequest]:
    reader = csv.reader(file)
    for values in reader:
        loc = Loc(str(path), reader.line_num + 1)  # the header was read before
        if not values:
            continue
        if len(values) != len(columns):
            raise TilusError(f"found {len(values)} columns, but the header names {len(columns)}", loc=loc)
        planned = parse(_Line(dict(zip(columns, values)), loc))
        if planned is not None:
            yield planned


def _parse_azure(line: _Line) -> PlannedRequest:
    text = str(line.row["TIMESTAMP"])
    try:
        time = datetime.fromisoformat(text[:26])  # the trace has seven digits after the point, datetime takes six
    except ValueError:
        raise line.error(f"TIMESTAMP is {text!r}, but must be like 2023-11-16 18:15:46.6805900") from None
    seconds = (time.replace(tzinfo=None) - datetime(2023, 1, 1)).total_seconds()
    return PlannedRequest(seconds, line.count("ContextTokens"), line.count("GeneratedTokens"))


def _parse_burstgpt(line: _Line) -> PlannedRequest | None:
    outputs = line.count("Response tokens", 0)
    inputs = line.count("Request tokens", 0 if outputs == 0 else 1)
    return PlannedRequest(line.number("Timestamp"), inputs, outputs) if outputs else None


def _read_mooncake(path: Path, file: TextIO) -> Iterator[PlannedRequest]:
    for number, text in enumerate(file, 1):
        loc = Loc(str(path), number)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise TilusError(f"the line is not JSON: {error}", loc=loc) from None
        if not isinstance(row, dict):
            raise TilusError(f"the line is {type(row).__name__}, but must be a JSON object", loc=loc)
        yield _parse_mooncake(_Line(cast(Row, row), loc))


def _parse_mooncake(line: _Line) -> PlannedRequest:
    """`timestamp` is in milliseconds; each of `hash_ids` names 512 tokens of the prompt, the last what is left of it."""
    inputs = line.count("input_length")
    blocks = line.row.get("hash_ids")
    if not isinstance(blocks, list) or not all(type(name) is int and name >= 0 for name in cast(list[object], blocks)):
        raise line.error(
            f"hash_ids is {str(cast(object, blocks))[:80]}, but must be a list of whole numbers of at least 0"
        )
    num_blocks = math.ceil(inputs / MOONCAKE_BLOCK)
    names = tuple(cast(list[int], blocks))
    if len(names) != num_blocks:
        raise line.error(
            f"hash_ids has {len(names)} entries, but input_length {inputs} has {num_blocks} blocks of {MOONCAKE_BLOCK} tokens"
        )
    return PlannedRequest(
        line.number("timestamp") / 1000, inputs, line.count("output_length"), names, float(MOONCAKE_BLOCK)
    )
