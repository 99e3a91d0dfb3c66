"""The bodies of OpenAI's completion responses, whole and as chunks of a stream, for both endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.core import FinishReason, RequestOutput, SampledToken
from serving.tokenizer import Tokenizer
from serving.tools import CallParser, CallStart

Json = dict[str, Any]


@dataclass(eq=False)
class Choice:
    """One continuation as it grows. num_prompt: tokens of its prompt, 0 where a choice before it has the same. num_cached: those
    of them that were in the cache. shown: characters that its tokens have begun so far, the next `text_offset`. prompt: of
    `RequestOutput`.
    """

    index: int
    num_prompt: int
    num_cached: int = 0
    num_tokens: int = 0
    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list[SampledToken])
    finish_reason: FinishReason | None = None
    shown: int = 0
    prompt: tuple[SampledToken, ...] = ()

    def count(self, output: RequestOutput) -> None:
        self.num_cached = min(output.num_cached, self.num_prompt)
        self.num_tokens += len(output.tokens)
        self.finish_reason = output.finish_reason

    def extend(self, output: RequestOutput) -> None:
        self.prompt += output.prompt
        self.text += output.text
        self.tokens += output.tokens


@dataclass(frozen=True)
class Header:
    """What all chunks of a response share. fingerprint: another one where another server may answer."""

    id: str
    created: int
    model: str
    fingerprint: str

    def body(self, kind: str, choices: list[Json]) -> Json:
        own = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return own | {"system_fingerprint": self.fingerprint, "choices": choices}


def usage(choices: Iterable[Choice]) -> Json:
    """Of all choices, so far."""
    num_prompt, num_cached, num_output = map(sum, zip(*((c.num_prompt, c.num_cached, c.num_tokens) for c in choices)))
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


class _CallStream:
    """The text of an answer and its calls, in OpenAI's form and counted, as they are found. several: all, else the first."""

    def __init__(self, parser: CallParser, *, several: bool) -> None:
        self._parser = parser
        self._several = several
        self._num_calls = 0

    def push(self, text: str, *, ended: bool) -> tuple[str, list[Json]]:
        """What a piece adds: text, and of each call that it has a part of, that part."""
        content, calls = "", dict[int, Json]()
        for event in self._parser.push(text) + (self._parser.flush() if ended else []):
            self._num_calls += isinstance(event, CallStart)
            index = self._num_calls - 1
            if isinstance(event, str):
                content += event
            elif index and not self._several:
                continue
            elif isinstance(event, CallStart):
                own = {"id": self._parser.style.new_id(), "type": "function"}
                calls[index] = {"index": index, **own, "function": {"name": event.name, "arguments": ""}}
            else:
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
        return content, [*calls.values()]

    def reason(self, reason: FinishReason | None) -> str | None:
        return "tool_calls" if self._num_calls and reason == "stop" else reason


class ChatFormat:
    """parser: makes what finds tool calls in an answer; None where there are no tools. several: tell all of them."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, parser: Callable[[], CallParser] | None, *, several: bool) -> None:
        self._tokenizer = tokenizer
        self._parser = parser
        self._several = several
        self._streams: dict[int, _CallStream] = {}

    def opening(self, index: int) -> Json | None:
        """The first chunk's choice, if there is one before any text."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def choice(self, choice: Choice) -> Json:
        part, logprobs, reason = self._part(choice.index, choice.text, choice.tokens, choice.finish_reason)
        calls = [
            {name: value for name, value in call.items() if name != "index"} for call in part.pop("tool_calls", ())
        ]
        message: Json = {"role": "assistant", "content": None if calls else "", "refusal": None} | part
        message |= {"tool_calls": calls} if calls else {}
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, choice: Choice, output: RequestOutput) -> Json | None:
        """The next chunk's choice, if there is anything to tell."""
        part, logprobs, reason = self._part(choice.index, output.text, output.tokens, output.finish_reason)
        return self._delta(choice.index, part, logprobs, reason) if part or logprobs or reason else None

    def _part(
        self, index: int, text: str, tokens: Sequence[SampledToken], ended: FinishReason | None
    ) -> tuple[Json, Json | None, str | None]:
        """What a piece of an answer, or all of it, adds to its message; its log-probabilities, and why it ends there."""
        calls, reason = list[Json](), ended
        if self._parser is not None:
            stream = self._streams.setdefault(index, _CallStream(self._parser(), several=self._several))
            text, calls = stream.push(text, ended=ended is not None)
            reason = stream.reason(ended)
        part = ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})
        return part, self._logprobs(tokens), reason

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
        text, data = self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(data)}


class CompletionFormat:
    """echoes: for each choice the prompt with which its text begins; none where none are wanted. scored: whether prompts have
    log-probabilities, and come with the first token."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, tokenizer: Tokenizer, echoes: Sequence[str | list[int]], *, scored: bool) -> None:
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._scored = scored

    def opening(self, index: int) -> Json | None:
        text = "" if self._scored else self._echo(index)
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None} if text else None

    def choice(self, choice: Choice) -> Json:
        text = self._echo(choice.index) + choice.text
        return self._choice(choice, text, (*choice.prompt, *choice.tokens), choice.finish_reason)

    def delta(self, choice: Choice, output: RequestOutput) -> Json | None:
        text = (self._echo(choice.index) if output.prompt else "") + output.text
        chunk = self._choice(choice, text, (*output.prompt, *output.tokens), output.finish_reason)
        return chunk if text or chunk["logprobs"] or output.finish_reason else None

    def _echo(self, index: int) -> str:
        prompt = self._echoes[index] if self._echoes else ""
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, skip_special=False)

    def _choice(
        self, choice: Choice, text: str, tokens: Sequence[SampledToken], finish_reason: FinishReason | None
    ) -> Json:
        logprobs = self._logprobs(choice, tokens)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, choice: Choice, tokens: Sequence[SampledToken]) -> Json | None:
        if not tokens or not (self._scored or tokens[-1].logprobs):
            return None
        text_of = self._tokenizer.token_text
        texts = [text_of(token.token_id) for token in tokens]
        offsets: list[int] = []
        for token in tokens:  # counted by first bytes of characters, which may be cut between tokens
            offsets.append(choice.shown)
            choice.shown += sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token.token_id))
        found = [(token.token_id, token.logprobs) for token in tokens]  # of a prompt's first token there are none
        return {
            "tokens": texts,
            "token_logprobs": [known and known.logprob for _, known in found],
            # The chosen token is always among them, also where it is not one of the best.
            "top_logprobs": [
                known and {text_of(t): value for t, value in ((token_id, known.logprob), *known.top)}
                for token_id, known in found
            ],
            "text_offset": offsets,
        }


Format = ChatFormat | CompletionFormat  # how an endpoint words its answers
