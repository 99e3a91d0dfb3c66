"""The bodies of OpenAI's completion responses, whole and as chunks of a stream, for both endpoints."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.core import FinishReason, RequestOutput, SampledToken
from serving.tools import CallParser, ToolCall

Json = dict[str, Any]
TokenText = Callable[[int], str]


@dataclass(eq=False)
class Choice:
    """One continuation as it grows. shown: length of the token texts so far, the next `text_offset`."""

    index: int
    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list[SampledToken])
    finish_reason: FinishReason | None = None
    shown: int = 0

    def extend(self, output: RequestOutput) -> None:
        self.text += output.text
        self.tokens += output.tokens
        self.finish_reason = output.finish_reason


@dataclass(frozen=True)
class Header:
    """What all chunks of a response share."""

    id: str
    created: int
    model: str

    def body(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(num_prompt: int, num_output: int) -> Json:
    return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}


class _CallStream:
    """The text of an answer and its calls, in OpenAI's form and counted, as they are found. A call comes whole."""

    def __init__(self, parser: CallParser) -> None:
        self._parser = parser
        self._num_calls = 0

    def push(self, text: str, *, ended: bool) -> tuple[str, list[Json]]:
        events = self._parser.push(text) + (self._parser.flush() if ended else [])
        calls: list[Json] = []
        for event in events:
            if isinstance(event, ToolCall):
                function = {"name": event.name, "arguments": event.arguments}
                calls.append(
                    {
                        "index": self._num_calls,
                        "id": f"call_{uuid.uuid4().hex}",
                        "type": "function",
                        "function": function,
                    }
                )
                self._num_calls += 1
        return "".join(event for event in events if isinstance(event, str)), calls

    def reason(self, reason: FinishReason | None) -> str | None:
        return "tool_calls" if self._num_calls and reason == "stop" else reason


class Format(Protocol):
    """How an endpoint words its answers."""

    kind: str
    chunk_kind: str

    def opening(self, index: int) -> Json | None:
        """The first chunk's choice, if there is one before any text."""
        ...

    def choice(self, choice: Choice) -> Json: ...
    def delta(self, choice: Choice, output: RequestOutput) -> Json | None:
        """The next chunk's choice, if there is anything to tell."""
        ...


class ChatFormat:
    """parser: makes what finds tool calls in an answer; None where there are no tools."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, token_text: TokenText, parser: Callable[[], CallParser] | None = None) -> None:
        self._token_text = token_text
        self._parser = parser
        self._streams: dict[int, _CallStream] = {}

    def opening(self, index: int) -> Json | None:
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def choice(self, choice: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        reason = choice.finish_reason
        if self._parser is not None:
            stream = _CallStream(self._parser())
            content, calls = stream.push(choice.text, ended=True)
            reason = stream.reason(reason)
            message["content"] = content
            if calls:
                message["content"] = content or None
                message["tool_calls"] = [
                    {name: value for name, value in call.items() if name != "index"} for call in calls
                ]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": reason,
        }

    def delta(self, choice: Choice, output: RequestOutput) -> Json | None:
        content, calls, reason = output.text, list[Json](), output.finish_reason
        if self._parser is not None:
            stream = self._streams.get(choice.index) or _CallStream(self._parser())
            self._streams[choice.index] = stream
            content, calls = stream.push(output.text, ended=reason is not None)
            reason = stream.reason(reason)
        delta = ({"content": content} if content else {}) | ({"tool_calls": calls} if calls else {})
        logprobs = self._logprobs(output.tokens)
        return self._delta(choice.index, delta, logprobs, reason) if delta or logprobs or reason else None

    @staticmethod
    def _delta(index: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[SampledToken]) -> Json | None:
        content = [
            self._entry(token.token_id, found.logprob) | {"top_logprobs": [self._entry(*pair) for pair in found.top]}
            for token in tokens
            if (found := token.logprobs) is not None
        ]
        return {"content": content, "refusal": None} if content else None

    def _entry(self, token_id: int, logprob: float) -> Json:
        text = self._token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionFormat:
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text

    def opening(self, index: int) -> Json | None:
        return None

    def choice(self, choice: Choice) -> Json:
        return self._choice(choice, choice.text, choice.tokens, choice.finish_reason)

    def delta(self, choice: Choice, output: RequestOutput) -> Json | None:
        chunk = self._choice(choice, output.text, output.tokens, output.finish_reason)
        return chunk if output.text or chunk["logprobs"] or output.finish_reason else None

    def _choice(
        self, choice: Choice, text: str, tokens: Sequence[SampledToken], finish_reason: FinishReason | None
    ) -> Json:
        logprobs = self._logprobs(choice, tokens)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, choice: Choice, tokens: Sequence[SampledToken]) -> Json | None:
        pairs = [(token.token_id, found) for token in tokens if (found := token.logprobs) is not None]
        if not pairs:
            return None
        texts = [self._token_text(token_id) for token_id, _ in pairs]
        offsets: list[int] = []
        for text in texts:
            offsets.append(choice.shown)
            choice.shown += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [found.logprob for _, found in pairs],
            "top_logprobs": [{self._token_text(t): value for t, value in found.top} for _, found in pairs],
            "text_offset": offsets,
        }
