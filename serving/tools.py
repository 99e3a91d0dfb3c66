"""Tool calls: how models are told of tools, made to call one, and how calls are found in what they write.

Two ways to write a call are in use, each by the models that were trained on it: JSON between tags (Hermes, Qwen, and most since),
and an answer that is JSON as a whole (Llama 3). A model's chat template shows which one is its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serving.core import Grammar

Style = Literal["tags", "json"]
Json = dict[str, Any]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_ARGUMENTS: Mapping[str, str] = {"tags": "arguments", "json": "parameters"}
_NO_PARAMETERS: Json = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolCall:
    """arguments: a JSON object as text."""

    name: str
    arguments: str


def style_of(chat_template: str | None) -> Style:
    """How a model with this template writes its calls; tags where the template says nothing about them."""
    template = chat_template or ""
    return "json" if '"parameters":' in template and _OPEN not in template else "tags"


def call_grammar(functions: Sequence[Json], style: Style, *, several: bool) -> Grammar:
    """What an answer matches that is nothing but calls of these functions (OpenAI's name and parameters, a JSON schema): one, or
    with `several` at least one. Answers that are JSON as a whole are one call.
    """
    begin, end = (f"{_OPEN}\n", f"\n{_CLOSE}") if style == "tags" else ("", "")
    more = f" ({_literal(chr(10))} call)*" if several and style == "tags" else ""
    rules = [f"start: call{more}", "call: " + " | ".join(f"call_{index}" for index in range(len(functions)))]
    for index, function in enumerate(functions):
        # Each schema is a root of its own: its references point into it.
        head = f'{begin}{{"name": {json.dumps(function["name"])}, "{_ARGUMENTS[style]}": '
        schema = json.dumps(function.get("parameters") or _NO_PARAMETERS)
        rules.append(f"call_{index}: {_literal(head)} args_{index} {_literal('}' + end)}")
        rules.append(f"args_{index}: %json {schema}")
    return Grammar("lark", "\n".join(rules))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class CallParser:
    """Cuts an answer that comes in pieces into text and calls of known tools. What may be the beginning of a call waits.

    Law: however the text is cut into pieces, all events together are the same but for where texts are cut. What looks like a call
    and is none (no JSON, a tool that does not exist) stays text; blanks around calls are dropped.
    """

    def __init__(self, style: Style, names: frozenset[str]) -> None:
        self._style = style
        self._names = names
        self._held = ""
        self._calls = 0  # so far
        self._at_start = True  # of the answer, or behind a call

    def push(self, piece: str) -> list[str | ToolCall]:
        self._held += piece
        events: list[str | ToolCall] = []
        while self._style == "tags" and (end := self._end_of_call()) is not None:
            start = self._held.index(_OPEN)
            events += self._cut(self._held[:start], self._held[start:end])
            self._held = self._held[end:]
        text = self._held[: self._certain()]
        self._held = self._held[len(text) :]
        return events + self._text(text)

    def flush(self) -> list[str | ToolCall]:
        """What still waits, when the answer ends. A call whose end is missing, but is complete otherwise, is one."""
        held, self._held = self._held, ""
        start = held.find(_OPEN) if self._style == "tags" else 0
        if start < 0 or not held:
            return self._text(held.rstrip() if self._calls else held)
        return self._cut(held[:start], held[start:])

    def _end_of_call(self) -> int | None:
        start = self._held.find(_OPEN)
        end = self._held.find(_CLOSE, start) if start >= 0 else -1
        return end + len(_CLOSE) if end >= 0 else None

    def _certain(self) -> int:
        """How much of what is held is text for certain: all before a call, its possible beginning, and blanks in front of it."""
        if self._style == "json":
            return 0 if self._at_start and self._held.lstrip()[:1] in ("", "{") else len(self._held)
        start = self._held.find(_OPEN)
        if start < 0:
            overlaps = (size for size in range(len(_OPEN) - 1, 0, -1) if self._held.endswith(_OPEN[:size]))
            start = len(self._held) - next(overlaps, 0)
        return len(self._held[:start].rstrip())

    def _text(self, text: str) -> list[str | ToolCall]:
        if self._calls and self._at_start:
            text = text.lstrip()
        if not text:
            return []
        self._at_start = False
        return [text]

    def _cut(self, before: str, candidate: str) -> list[str | ToolCall]:
        """Text and what may be a call from its start on, or from a later tag in it: the ones before are then text."""
        start = 0
        while (call := self._parsed(candidate[start:])) is None:
            start = candidate.find(_OPEN, start + 1) if self._style == "tags" else -1
            if start < 0:
                return self._text(before + candidate)
        events = self._text((before + candidate[:start]).rstrip())
        self._calls += 1
        self._at_start = True
        return [*events, call]

    def _parsed(self, text: str) -> ToolCall | None:
        try:
            found = json.loads(text.removeprefix(_OPEN).removesuffix(_CLOSE))
        except (ValueError, RecursionError):
            return None
        name, arguments = (
            (found.get("name"), found.get(_ARGUMENTS[self._style])) if isinstance(found, dict) else (None, None)
        )
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def told_in_words(messages: Sequence[Json], tools: Sequence[Json]) -> list[Json]:
    """A conversation with tools, for a template that knows nothing of them: the tools as part of the system's message, calls and
    results as text between tags.
    """
    plain = [_in_words(message) for message in messages]
    if not tools:
        return plain
    system = plain.pop(0)["content"] + "\n\n" if plain and plain[0]["role"] == "system" else ""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = '{"name": "the function\'s name", "arguments": {"an argument\'s name": "its value"}}'
    words = (
        f"{system}You can call these functions, described in JSON, where they help to answer:\n<tools>\n{listed}\n</tools>\n"
        f"To call one, answer with nothing but its name and arguments:\n{_OPEN}\n{example}\n{_CLOSE}"
    )
    return [{"role": "system", "content": words}, *plain]


def _in_words(message: Json) -> Json:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [call["function"] for call in message.get("tool_calls", ())]
    parts = [message["content"]] if message["content"] or not calls else []
    parts += [f"{_OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{_CLOSE}" for call in calls]
    return {"role": message["role"], "content": "\n".join(parts)}
