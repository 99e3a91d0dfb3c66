"""The server under test: its model, how it counts tokens, and the bodies of requests to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import httpx

from serving.bench.events import Json, error_message
from serving.bench.prompts import SAMPLES, PromptWriter, TokenCost
from tilus.errors import TilusError

Endpoint = Literal["completions", "chat"]
ENDPOINTS: tuple[str, ...] = get_args(Endpoint)
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


def new_client(url: str, api_key: str | None, timeout: float) -> httpx.AsyncClient:
    """Connections without limit: a request that waited for one would be late by the client's fault.

    They are dropped before servers do so (uvicorn after 5 s), lest a request meets a closing one; environment variables that
    name proxies do not count, as a proxy would be measured too.
    """
    return httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"Content-Type": "application/json", "Accept-Encoding": "identity"}
        | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        timeout=timeout,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        trust_env=False,
    )


async def find_model(http: httpx.AsyncClient, wanted: str | None) -> str:
    """The name of the model to ask for: the wanted one, or the only one that the server has.

    Raises: TilusError when nothing answers, or when the server has no such model, or none or several and none is wanted.
    """
    reply = await _ask(http, "GET", "/v1/models")
    if reply.status_code == 404 and wanted:  # not all servers list their models
        return wanted
    if reply.status_code != 200:
        raise TilusError(
            f"GET {reply.url} was answered with status {reply.status_code}: {_said(reply)}",
            hint="set OPENAI_API_KEY to the server's key" if reply.status_code in (401, 403) else None,
        )
    try:
        names = [str(model["id"]) for model in cast(Json, reply.json())["data"]]
    except (ValueError, KeyError, TypeError):
        raise TilusError(
            f"GET {reply.url} was answered with {reply.text[:200]!r}, which is no list of models"
        ) from None
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        found = ", ".join(map(repr, names)) or "none"
        message = f"the model {wanted!r} is not there" if wanted else "the server does not have just one model"
        raise TilusError(f"{message}; it has {found}", hint="choose one with --model")
    return wanted


async def token_cost(http: httpx.AsyncClient, target: Target, writer: PromptWriter) -> tuple[TokenCost, str]:
    """What words cost in this model's tokens, and where that is from.

    Asked of `POST /tokenize` (vLLM's) where it is, else of the usage of two requests for one token.
    """
    for source, count in (("/tokenize", _tokenize), ("usage", _usage)):
        counts = [await count(http, target, writer.sample(num_words)) for num_words in SAMPLES]
        few, many = counts
        if few is not None and many is not None and few < many:
            return TokenCost.fit(few, many), source
    return TokenCost(0.0, 1.0), "words"


async def _tokenize(http: httpx.AsyncClient, target: Target, text: str) -> int | None:
    reply = await _ask(http, "POST", "/tokenize", {"model": target.model} | target.prompt(text))
    return _integer(reply, "count")


async def _usage(http: httpx.AsyncClient, target: Target, text: str) -> int | None:
    body = {"model": target.model, "max_tokens": 1} | target.prompt(text) | target.fields
    reply = await _ask(http, "POST", target.path, body)
    return _integer(reply, "usage", "prompt_tokens")


def _integer(reply: httpx.Response, *names: str) -> int | None:
    """A number inside of an answer of JSON; None when it is not there."""
    if reply.status_code != 200:
        return None
    try:
        value: Any = reply.json()
        for name in names:
            value = value[name]
    except (ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) else None


async def _ask(http: httpx.AsyncClient, method: str, path: str, body: Json | None = None) -> httpx.Response:
    try:
        return await http.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise TilusError(
            f"no answer from {http.base_url}: {error or type(error).__name__}",
            hint="start a server with `python -m serving`, or name another with --url",
        ) from error


def _said(reply: httpx.Response) -> str:
    try:
        return error_message(reply.json()) or reply.text[:200]
    except ValueError:
        return reply.text[:200]
