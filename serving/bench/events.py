"""Server-sent events, and what the events of OpenAI's streams say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

Json = dict[str, Any]
DONE = "[DONE]"


class EventReader:
    """Cuts a stream of bytes into the data of its events, however the bytes are cut into chunks.

    Fields other than `data` and comments are left out: https://html.spec.whatwg.org/multipage/server-sent-events.html.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[str] = []
        self._after_return = False

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that end in this chunk. Raises UnicodeDecodeError on what is not UTF-8."""
        events: list[str] = []
        for line in self._lines(chunk):
            if not line:
                if self._data:
                    events.append("\n".join(self._data))
                    self._data = []
            elif line == "data" or line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
        return events

    def _lines(self, chunk: bytes) -> list[str]:
        """The lines that end in this chunk, by a line feed, a carriage return or both."""
        if self._after_return and chunk:
            chunk = chunk.removeprefix(b"\n")  # of a pair that was cut in two
            self._after_return = False
        self._line += chunk
        if not (b"\n" in chunk or b"\r" in chunk):
            return []
        self._after_return = self._line.endswith(b"\r")
        *whole, rest = bytes(self._line).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._line = bytearray(rest)
        return [line.decode() for line in whole]


@dataclass(frozen=True)
class StreamEvent:
    """One event: whether it brought a token, the usage if it told any, and the error if it was one."""

    is_token: bool = False
    is_final: bool = False
    input_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None

    @classmethod
    def parse(cls, data: str) -> StreamEvent:
        """Raises ValueError when the data is not an object as OpenAI's streams have it."""
        try:
            event: Json = json.loads(data)
            if event.get("error"):
                return cls(error=error_message(event) or data[:200])
            usage: Json = event.get("usage") or {}
            choices: list[Json] = event.get("choices") or []
            return cls(
                is_token=any(_is_token(choice) for choice in choices),
                is_final=any(choice.get("finish_reason") for choice in choices),
                input_tokens=usage.get("prompt_tokens"),
                output_tokens=usage.get("completion_tokens"),
            )
        except (ValueError, AttributeError, TypeError):
            raise ValueError(f"found {data[:80]!r}, but expected a JSON object with choices, usage or error") from None


def _is_token(choice: Json) -> bool:
    """Whether a chunk's choice has something of the answer, as against the opening with the role and the end with the reason.

    An empty text without a reason is a token that shows nothing yet, like half a character.
    """
    delta = cast(Json, choice.get("delta") or {})
    parts = (choice.get("text"), *(value for name, value in delta.items() if name != "role"))
    return any(parts) or not (choice.get("finish_reason") or "role" in delta)


def message_of(text: str) -> str:
    """What the body of an error says, in one of the usual shapes of JSON or in any other text."""
    try:
        return error_message(json.loads(text)) or text[:200]
    except ValueError:
        return text[:200]


def error_message(body: object) -> str | None:
    """The message of an error's body in one of the usual shapes."""
    if not isinstance(body, dict):
        return None
    fields = cast(Json, body)
    error = fields.get("error", fields)
    message = cast(Json, error).get("message") or cast(Json, error).get("detail") if isinstance(error, dict) else error
    return str(message) if message else None
