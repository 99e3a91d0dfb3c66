"""What the endpoints answer, as the OpenAPI document at /openapi.json has it. The tests hold answers against that document."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_CLOSED = ConfigDict(extra="forbid")
_Reason = Literal["stop", "length", "tool_calls"]


@with_config(_CLOSED)
class Error(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


@with_config(_CLOSED)
class ErrorBody(TypedDict):
    error: Error


@with_config(_CLOSED)
class PromptTokens(TypedDict):
    cached_tokens: int


@with_config(_CLOSED)
class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


@with_config(_CLOSED)
class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


@with_config(_CLOSED)
class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: _Reason


@with_config(_CLOSED)
class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


@with_config(_CLOSED)
class FunctionOfCall(TypedDict):
    name: str
    arguments: str


@with_config(_CLOSED)
class CallOfTool(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionOfCall


@with_config(_CLOSED)
class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[CallOfTool]]


@with_config(_CLOSED)
class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


@with_config(_CLOSED)
class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


@with_config(_CLOSED)
class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


@with_config(_CLOSED)
class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: _Reason


@with_config(_CLOSED)
class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


@with_config(_CLOSED)
class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


@with_config(_CLOSED)
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


@with_config(_CLOSED)
class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@with_config(_CLOSED)
class Detokenized(TypedDict):
    prompt: str


@with_config(_CLOSED)
class Health(TypedDict):
    status: Literal["ok", "failed"]
    reason: NotRequired[str]


@with_config(_CLOSED)
class Version(TypedDict):
    version: str


def responses(answer: type, *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of an endpoint: its own, as JSON or also as server-sent events, and errors."""
    events: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}} if stream else {}
    error = {"model": ErrorBody, "description": "OpenAI's error body"}
    return {200: {"model": answer} | events, "4XX": error, "5XX": error}
