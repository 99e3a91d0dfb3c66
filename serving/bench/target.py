"""The server under test: its model, how it counts tokens, and the bodies of requests to it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from serving.bench.client import ConnectionFailed, HttpClient
from serving.bench.events import Json, message_of
from serving.bench.prompts import SAMPLES, PromptWriter, TokenCost
from tilus.errors import TilusError

Endpoint = Literal["completions", "chat"]
ENDPOINTS: tuple[str, ...] = get_args(Endpoint)
_PATIENCE = 30.0  # seconds for the list of models, which takes no time
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Target:
    """model: its name there. fields: what is added to every body. timeout: seconds for a request, retries included."""

    model: str
    endpoint: Endpoint
    fields: Json = field(default_factory=dict[str, Any])
    timeout: float = 600.0
    retries: int = 5

    @property
    def path(self) -> str:
        return _PATHS[self.endpoint]

    def prompt(self, text: str) -> Json:
        return {"prompt": text} if self.endpoint == "completions" else {"messages": [{"role": "user", "content": text}]}

    def body(self, text: str, max_tokens: int) -> bytes:
        """Of a request for a stream of at most `max_tokens` tokens with usage at its end."""
        stream = {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({"model": self.model} | self.prompt(text) | stream | self.fields).encode()


async def find_model(http: HttpClient, wanted: str | None) -> str:
    """The name of the model to ask for: the wanted one, or the only one that the server has.

    Raises: TilusError when nothing answers, or when the server has no such model, or none or several and none is wanted.
    """
    status, text = await _ask(http, "GET", "/v1/models", None, _PATIENCE)
    if status == 404 and wanted:  # not all servers list their models
        return wanted
    if status != 200:
        raise TilusError(
            f"GET /v1/models was answered with status {status}: {message_of(text)}",
            hint="set OPENAI_API_KEY to the server's key" if status in (401, 403) else None,
        )
    try:
        names = [str(model["id"]) for model in cast(Json, json.loads(text))["data"]]
    except (ValueError, KeyError, TypeError):
        raise TilusError(f"GET /v1/models was answered with {text[:200]!r}, which is no list of models") from None
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        found = ", ".join(map(repr, names)) or "none"
        message = f"the model {wanted!r} is not there" if wanted else "the server does not have just one model"
        raise TilusError(f"{message}; it has {found}", hint="choose one with --model")
    return wanted


async def token_cost(http: HttpClient, target: Target, writer: PromptWriter) -> tuple[TokenCost, str]:
    """What words cost in this model's tokens, and where that is from.

    Asked of `POST /tokenize` (vLLM's) where it is, else of the usage of two requests for one token.
    """
    for source, count in (("/tokenize", _tokenize), ("usage", _usage)):
        counts = [await count(http, target, writer.sample(num_words)) for num_words in SAMPLES]
        few, many = counts
        if few is not None and many is not None and few < many:
            return TokenCost.fit(few, many), source
    return TokenCost(0.0, 1.0), "words"


async def _tokenize(http: HttpClient, target: Target, text: str) -> int | None:
    body = {"model": target.model} | target.prompt(text)
    return _integer(await _ask(http, "POST", "/tokenize", body, target.timeout), "count")


async def _usage(http: HttpClient, target: Target, text: str) -> int | None:
    body = {"model": target.model, "max_tokens": 1} | target.prompt(text) | target.fields
    return _integer(await _ask(http, "POST", target.path, body, target.timeout), "usage", "prompt_tokens")


def _integer(reply: tuple[int, str], *names: str) -> int | None:
    """A number inside of an answer of JSON; None when it is not there."""
    status, text = reply
    if status != 200:
        return None
    try:
        value: Any = json.loads(text)
        for name in names:
            value = value[name]
    except (ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) else None


async def _ask(http: HttpClient, method: str, path: str, body: Json | None, timeout: float) -> tuple[int, str]:
    """Status and body of an answer. Raises TilusError when there is none."""
    try:
        async with (
            asyncio.timeout(timeout),
            http.request(method, path, None if body is None else json.dumps(body).encode()) as reply,
        ):
            return reply.status, await reply.text(errors="replace")
    except (ConnectionFailed, TimeoutError) as error:
        reason = str(error) or f"none came in {timeout:g} s"
        raise TilusError(
            f"no answer from {http.url}: {reason}",
            hint="start a server with `python -m serving`, or name another with --url",
        ) from error
