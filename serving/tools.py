"""Tool calls: how models are told of tools, made to call one, and how calls are found in what they write.

Three ways to write a call are in use, each by models that were trained on it: JSON between tags (Hermes, Qwen and most since), an
answer that is JSON as a whole (Llama 3), and a list of JSON behind a special token (Mistral). A model's chat template shows
which one is its own.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving.core import Grammar

Json = dict[str, Any]
_NO_PARAMETERS: Json = {"type": "object", "properties": {}, "additionalProperties": False}
# A call up to its arguments, as models write it nearly always: from here on it can be told piece by piece.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class CallStyle:
    """How calls are written: `open`, a JSON object with "name" and, under the name `arguments`, an object, then `close`.

    open: "" where an answer is a call as a whole. separator: where one pair of open and close holds a list, what is between its
    calls; `open` is then a special token, which texts do not show unless asked.
    """

    open: str
    close: str
    arguments: str = "arguments"
    separator: str = ""

    def new_id(self) -> str:
        """Of a call. Mistral's templates want nine letters or digits."""
        return uuid.uuid4().hex[:9] if self.separator else f"call_{uuid.uuid4().hex}"


TAGS = CallStyle("<tool_call>", "</tool_call>")
WHOLE = CallStyle("", "", arguments="parameters")
LIST = CallStyle("[TOOL_CALLS]", "]", separator=",")


class CallStart(NamedTuple):
    name: str


class CallArguments(NamedTuple):
    """The next piece of the arguments of the call that started last."""

    text: str


Event = str | CallStart | CallArguments


def style_of(chat_template: str | None) -> CallStyle:
    """How a model with this template writes its calls; in tags where the template says nothing about them."""
    template = chat_template or ""
    if LIST.open in template:
        return LIST
    return WHOLE if '"parameters":' in template and TAGS.open not in template else TAGS


def call_grammar(
    functions: Sequence[Json], style: CallStyle, *, several: bool, text: bool = False, open_id: int | None = None
) -> Grammar:
    """What an answer matches that is nothing but calls of these functions (OpenAI's name and parameters, a JSON schema): one, or
    with `several` at least one; with `text` any answer, in which what begins like a call is one. Answers that are JSON as a whole
    are one call. open_id: the token that a list begins with.
    """
    is_token = style is LIST and open_id is not None
    opening = f"<[{open_id}]>" if is_token else _literal(style.open)
    begin, end, calls = "", "", "call"
    if style is LIST:
        calls = 'open " [" call' + ' (", " call)*' * several + ' "]"'
    elif style is TAGS:
        begin, end, calls = "\n", f"\n{style.close}", "open call" + ' ("\\n" open call)*' * (several and not text)
    rules = [f"start: {calls}", f"open: {opening}"]
    if text and style is WHOLE:
        rules = ["start: call | rest", r"rest: /\s*([^{\s](.|\n)*)?/"]
    elif text:  # what stands before a call belongs to `open`
        rules = [f"start: ({calls})* rest", r"rest: /(.|\n)*/"]
        rules.append(f"open: rest {opening}" if is_token else rf"open[suffix={opening}]: /(.|\n)*/")
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, function in enumerate(functions):
        # Each schema is a root of its own: its references point into it.
        head = f'{begin}{{"name": {json.dumps(function["name"])}, "{style.arguments}": '
        schema = json.dumps(function.get("parameters") or _NO_PARAMETERS)
        rules.append(f"call_{index}: {_literal(head)} args_{index} {_literal('}' + end)}")
        rules.append(f"args_{index}: %json {schema}")
    return Grammar("lark", "\n".join(rules))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _ObjectEnd:
    """Finds where a JSON object ends that comes in pieces: where all brackets outside of strings are closed."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._read = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int:
        """The place behind the object that `text` begins with, or in which it begins; -1 before it is there. From one call to the
        next, the text may only grow.
        """
        for place in range(self._read, len(text)):
            character = text[place]
            if self._in_string:
                self._in_string = character != '"' or self._escaped
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        self._read = len(text)
        return -1


class CallParser:
    """Cuts an answer that comes in pieces into text and calls of known tools. What may be the beginning of a call waits; once its
    name is known, its arguments pass as the model writes them, valid or not.

    Law: however the answer is cut into pieces, all events together are the same but for where texts and arguments are cut. What
    looks like a call and is none (no JSON, a tool that does not exist) stays text; blanks around calls are dropped.
    """

    def __init__(self, style: CallStyle, names: frozenset[str]) -> None:
        self.style = style
        self._names = names
        self._held = ""
        self._ended = False
        self._is_behind_call = False
        self._opened = ""  # what stood before a possible call: text, if it is none
        self._end = _ObjectEnd()
        self._num_sent = 0  # characters of the arguments
        # Reads on in what is held; None where it needs more.
        self._state: Callable[[], list[Event] | None] = self._text if style.open else self._head

    def push(self, piece: str) -> list[Event]:
        self._held += piece
        events: list[Event] = []
        while (found := self._state()) is not None:
            events += found
        return events

    def flush(self) -> list[Event]:
        """What still waits, when the answer ends."""
        self._ended = True
        return self.push("")

    def _text(self) -> list[Event] | None:
        held, tag = self._held, self.style.open
        start = held.find(tag) if tag else -1
        if start >= 0:
            size = len(held[:start].rstrip())
            self._opened, self._held = held[size : start + len(tag)], held[start + len(tag) :]
            self._state, self._end = self._head, _ObjectEnd()
            return self._shown(held[:size])
        size = len(held)
        if not self._ended:  # the tag's beginning waits, and so do blanks in front of it
            size -= next((n for n in range(len(tag) - 1, 0, -1) if held.endswith(tag[:n])), 0)
            size = len(held[:size].rstrip())
        self._held = held[size:]
        return self._shown(held[:size]) if size else None

    def _shown(self, text: str) -> list[Event]:
        text = text.lstrip() if self._is_behind_call else text
        self._is_behind_call = self._is_behind_call and not text
        return [text] if text else []

    def _head(self) -> list[Event] | None:
        """A call up to its arguments; or all of it, where the arguments come first or other fields stand between."""
        held = self._held.lstrip(" \t\r\n[" if self.style is LIST else None)
        self._opened += self._held[: len(self._held) - len(held)]
        self._held = held
        if (match := _HEAD.match(held)) is not None and match["name"] in self._names:
            self._held = held[match.end() :]
            self._state, self._end, self._num_sent = self._arguments, _ObjectEnd(), 0
            self._is_behind_call = True
            return [CallStart(match["name"])]
        may_be_call = held[:1] in ("", "{") and match is None
        end = len(held) if may_be_call else 0
        if may_be_call and not self._ended:
            end = held.find(self.style.close) if self.style is TAGS else self._end.find(held)
        if end < 0:
            return None
        self._state = self._text
        call = self._parsed(held[:end]) if end > 0 else None
        if call is None:
            return self._shown(self._opened)
        self._held = held[end:]
        self._state, self._is_behind_call = self._behind, True
        return [*call]

    def _arguments(self) -> list[Event] | None:
        end = self._end.find(self._held)
        size = len(self._held) if end < 0 else end
        piece, self._num_sent = self._held[self._num_sent : size], size
        if end >= 0:
            self._held = self._held[end:]
            self._state, self._end = self._rest, _ObjectEnd(depth=1)
        return [CallArguments(piece)] if piece else None

    def _rest(self) -> list[Event] | None:
        """What the call's object still has, such as an id, is not wanted. Its last bracket may have been forgotten."""
        ends = [self._end.find(self._held), self._held.find(self.style.close) if self.style.close else -1]
        end = min((end for end in ends if end >= 0), default=len(self._held) if self._ended else -1)
        if end < 0:
            return None
        self._held = self._held[end:]
        self._state = self._behind
        return []

    def _behind(self) -> list[Event] | None:
        """Another call of a list, or the end of it or of a call."""
        self._held = self._held.lstrip()
        marks = [mark for mark in (self.style.separator, self.style.close) if mark]
        if not self._ended and any(mark != self._held and mark.startswith(self._held) for mark in marks):
            return None
        found = next((mark for mark in marks if self._held.startswith(mark)), "")
        self._held = self._held[len(found) :]
        self._state = self._text
        if found and found == self.style.separator:
            self._state, self._opened, self._end = self._head, found, _ObjectEnd()
        return []

    def _parsed(self, text: str) -> tuple[CallStart, CallArguments] | None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict):
            return None
        name, arguments = found.get("name"), found.get("arguments", found.get("parameters"))
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return CallStart(name), CallArguments(json.dumps(arguments, ensure_ascii=False))


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
        f"To call one, answer with nothing but its name and arguments:\n{TAGS.open}\n{example}\n{TAGS.close}"
    )
    return [{"role": "system", "content": words}, *plain]


def _in_words(message: Json) -> Json:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [call["function"] for call in message.get("tool_calls", ())]
    parts = [message["content"]] if message["content"] or not calls else []
    parts += [f"{TAGS.open}\n{json.dumps(call, ensure_ascii=False)}\n{TAGS.close}" for call in calls]
    return {"role": message["role"], "content": "\n".join(parts)}
