"""What the endpoints answer, as the OpenAPI document at /openapi.json has it. The tests hold answers against that document."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_Reason = Literal["stop", "length", "tool_calls"]


@with_config(ConfigDict(extra="forbid"))
class _Closed(TypedDict):
    """Has no other fields."""


class Error(_Closed):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Closed):
    error: Error


class PromptTokens(_Closed):
    cached_tokens: int


class Usage(_Closed):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class CompletionLogprobs(_Closed):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Closed):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: _Reason


class _Answer(_Closed):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class Completion(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class FunctionOfCall(_Closed):
    name: str
    arguments: str


class CallOfTool(_Closed):
    id: str
    type: Literal["function"]
    function: FunctionOfCall


class AnswerMessage(_Closed):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[CallOfTool]]


class TopLogprob(_Closed):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Closed):
    content: list[TokenLogprob]
    refusal: None


class ChatChoice(_Closed):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: _Reason


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelCard(_Closed):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(_Closed):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(_Closed):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Closed):
    prompt: str


class Health(_Closed):
    status: Literal["ok", "failed"]
    reason: NotRequired[str]


class Version(_Closed):
    version: str


def responses(answer: type, *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of an endpoint: its own, as JSON or also as server-sent events, and errors."""
    events: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}} if stream else {}
    error = {"model": ErrorBody, "description": "OpenAI's error body"}
    return {200: {"model": answer} | events, "4XX": error, "5XX": error}
