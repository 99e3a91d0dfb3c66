"""OpenAI's HTTP interface: completions and chats, whole or as server-sent events; models, health, version."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from serving.async_engine import AsyncEngine, Generation
from serving.core import Request, RequestOutput
from serving.errors import RequestError
from serving.metrics import CONTENT_TYPE, Metrics
from serving.middleware import BodyLimit, KeyCheck, error_response
from serving.protocol import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from serving.responses import ChatFormat, Choice, CompletionFormat, Format, Header, Json, usage
from serving.schemas import (
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    ModelList,
    Tokenized,
    Version,
    responses,
)
from serving.tokenizer import Tokenizer
from serving.tools import CallParser, call_grammar, style_of

_LOG = logging.getLogger("serving")
_MAX_BODY_NBYTES = 16 * 2**20
_MAX_BODY_SECONDS = 60.0
_MAX_SEND_SECONDS = 60.0
_PAGE = Path(__file__).parent / "page.html"
# The page talks to this server and nobody else, whatever a model may write into it.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


def create_app(engine: AsyncEngine, tokenizer: Tokenizer, model_name: str, api_key: str | None = None) -> FastAPI:
    """The web application. It starts the engine's thread when it starts, and stops it when it stops.

    api_key: what requests must have in their header; None lets everyone in.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(title="tilus", lifespan=lifespan)
    service = _Service(engine, tokenizer, model_name)
    app.add_middleware(BodyLimit, max_nbytes=_MAX_BODY_NBYTES, seconds=_MAX_BODY_SECONDS)
    if api_key is not None:
        app.add_middleware(KeyCheck, key=api_key)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(Exception, _internal_error)
    app.add_api_route("/", service.page, methods=["GET"], include_in_schema=False)
    for path, endpoint, method, answers in (
        ("/v1/completions", service.completions, "POST", responses(Completion, stream=True)),
        ("/v1/chat/completions", service.chat_completions, "POST", responses(ChatCompletion, stream=True)),
        ("/v1/models", service.models, "GET", responses(ModelList)),
        ("/tokenize", service.tokenize, "POST", responses(Tokenized)),
        ("/detokenize", service.detokenize, "POST", responses(Detokenized)),
        ("/health", service.health, "GET", responses(Health) | {503: {"model": Health}}),
        ("/version", service.version, "GET", responses(Version)),
    ):
        app.add_api_route(path, endpoint, methods=[method], responses=answers, response_model=None)
    app.add_api_route("/metrics", service.metrics, methods=["GET"], response_class=PlainTextResponse)
    return app


class _StalledClient(Exception):
    """A client has not read for too long."""


class EventStream(StreamingResponse):
    """Server-sent events of a generation, which is given up when the client leaves, at whatever point, or reads no more."""

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(_MAX_SEND_SECONDS):
                    await send(message)
            except TimeoutError as error:
                raise _StalledClient from error

        async with _abandoned_with(receive, self._generation):
            try:
                await super().__call__(scope, receive, send_in_time)
            except _StalledClient:  # returning before the end closes the connection
                _LOG.warning("a client has read nothing for %g seconds and is given up", _MAX_SEND_SECONDS)


class _Service:
    """The endpoints, over one engine with one model."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, model_name: str) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._created = int(time.time())
        self._compiler = ThreadPoolExecutor(1, "grammars")  # apart from what all requests wait for
        self._metrics = Metrics(engine.engine, model_name)

    async def completions(self, body: CompletionBody, http: HTTPRequest) -> Response:
        self._check(body)
        prompts = [await self._prompt_ids(prompt) for prompt in body.prompts()]
        header = self._header("cmpl")
        requests = [
            body.request(f"{header.id}-{i * body.num_choices + choice}", prompt, choice, body.grammar())
            for i, prompt in enumerate(prompts)
            for choice in range(body.num_choices)
        ]
        num_prompt = sum(len(prompt) for prompt in prompts)
        return await self._respond(
            body, http, header, requests, num_prompt, CompletionFormat(self._tokenizer.token_text)
        )

    async def chat_completions(self, body: ChatBody, http: HTTPRequest) -> Response:
        self._check(body)
        messages = [message.for_template() for message in body.messages]
        tools, style = body.offered_tools(), style_of(self._tokenizer.chat_template)
        prompt = await asyncio.to_thread(self._tokenizer.encode_chat, messages, tools)
        header, grammar = self._header("chatcmpl"), body.grammar()
        if functions := body.required_functions():
            grammar = call_grammar(functions, style, several=body.parallel_tool_calls is not False)
        requests = [
            body.request(f"{header.id}-{choice}", prompt, choice, grammar) for choice in range(body.num_choices)
        ]
        names = frozenset(tool["function"]["name"] for tool in tools)
        format = ChatFormat(self._tokenizer.token_text, (lambda: CallParser(style, names)) if tools else None)
        return await self._respond(body, http, header, requests, len(prompt), format)

    async def models(self) -> Json:
        limit = self._engine.engine.max_model_len
        model = {"id": self._model_name, "object": "model", "created": self._created, "owned_by": "tilus"}
        return {"object": "list", "data": [model | {"max_model_len": limit}]}

    async def tokenize(self, body: TokenizeBody) -> Json:
        self._check_model(body.model)
        if body.messages is not None:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
            messages = [message.for_template() for message in body.messages]
            tokens = await asyncio.to_thread(self._tokenizer.encode_chat, messages, tools)
        else:
            tokens = await asyncio.to_thread(self._tokenizer.encode, body.text(), body.add_special_tokens)
        texts = [self._tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        limit = self._engine.engine.max_model_len
        return {"count": len(tokens), "max_model_len": limit, "tokens": list(tokens), "token_strs": texts}

    async def detokenize(self, body: DetokenizeBody) -> Json:
        self._check_model(body.model)
        bad = next((token for token in body.tokens if not 0 <= token < self._tokenizer.vocab_size), None)
        if bad is not None:
            limit = self._tokenizer.vocab_size - 1
            raise RequestError(f"tokens contains {bad}, but token ids go from 0 to {limit}", param="tokens")
        return {"prompt": await asyncio.to_thread(self._tokenizer.decode, body.tokens, skip_special=False)}

    async def page(self) -> FileResponse:
        return FileResponse(_PAGE, media_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})

    async def metrics(self) -> Response:
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE)

    async def health(self) -> Response:
        failure = self._engine.failure
        if failure is not None:
            return JSONResponse({"status": "failed", "reason": failure.message}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def version(self) -> Json:
        try:
            return {"version": importlib.metadata.version("tilus")}
        except importlib.metadata.PackageNotFoundError:
            return {"version": "unknown: running from a checkout that is not installed"}

    def _check(self, body: GenerationBody) -> None:
        body.check()
        self._check_model(body.model)

    def _check_model(self, name: str | None) -> None:
        """None, where a field may be left out, is the only model."""
        if name not in (None, self._model_name):
            raise RequestError(
                f"the model {name!r} does not exist; this server has {self._model_name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def _prompt_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await asyncio.to_thread(self._tokenizer.encode, prompt)
        return tuple(prompt)

    def _header(self, prefix: str) -> Header:
        return Header(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), self._model_name)

    async def _respond(
        self,
        body: GenerationBody,
        http: HTTPRequest,
        header: Header,
        requests: Sequence[Request],
        num_prompt: int,
        format: Format,
    ) -> Response:
        if (grammar := requests[0].params.grammar) is not None:
            await asyncio.get_running_loop().run_in_executor(self._compiler, self._engine.engine.new_matcher, grammar)
        generation = self._engine.submit(requests)
        choices = {request.id: Choice(index) for index, request in enumerate(requests)}
        if body.stream:
            events = _events(header, generation, choices, num_prompt, format, include_usage=body.include_usage)
            return EventStream(generation, events)
        async with _abandoned_with(http.receive, generation):
            async for output in generation:
                _raise_failure(output)
                choices[output.request_id].extend(output)
        num_output = sum(len(choice.tokens) for choice in choices.values())
        answer = header.body(format.kind, [format.choice(choice) for choice in choices.values()])
        return JSONResponse(answer | {"usage": usage(num_prompt, num_output)})


async def _events(
    header: Header,
    generation: Generation,
    choices: dict[str, Choice],
    num_prompt: int,
    format: Format,
    *,
    include_usage: bool,
) -> AsyncIterator[str]:
    """The stream's events. An error after the start can only be told inside the stream."""
    no_usage: Json = {"usage": None} if include_usage else {}
    num_output = 0

    def chunk(choice: Json) -> str:
        return _event(header.body(format.chunk_kind, [choice]) | no_usage)

    try:
        for choice in choices.values():
            if (opening := format.opening(choice.index)) is not None:
                yield chunk(opening)
        async for output in generation:
            _raise_failure(output)
            num_output += len(output.tokens)
            delta = format.delta(choices[output.request_id], output)
            if delta is not None:
                yield chunk(delta)
    except RequestError as error:
        yield _event(error.body())
        return
    if include_usage:
        yield _event(header.body(format.chunk_kind, []) | {"usage": usage(num_prompt, num_output)})
    yield "data: [DONE]\n\n"


def _event(body: Json) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _raise_failure(output: RequestOutput) -> None:
    """Turn the finish reasons that are no answer into errors."""
    if output.finish_reason == "timeout":
        raise RequestError("the request took longer than the server allows", status=504, kind="timeout_error")
    if output.finish_reason == "error":
        raise RequestError("the model computed no valid numbers for this request", status=500, kind="server_error")
    if output.finish_reason == "grammar":
        raise RequestError(
            "the grammar that the answer must match became too complex on the way", param="response_format"
        )


@asynccontextmanager
async def _abandoned_with(receive: Receive, generation: Generation) -> AsyncGenerator[None]:
    """Give the generation up when the client disconnects, or when the block is left before its end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        generation.close()


# FastAPI types every handler as taking Exception; each gets only what it was registered for.


async def _request_error(_: HTTPRequest, error: Exception) -> Response:
    return error_response(cast(RequestError, error))


async def _invalid_body(_: HTTPRequest, error: Exception) -> Response:
    """Malformed JSON and fields of wrong types: the first mistake, where it is, and what was found."""
    first = cast(RequestValidationError, error).errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {first['ctx']['error']} at character {where}"
        return error_response(RequestError(message))
    if isinstance(first["input"], bytes):
        return error_response(RequestError("the body must be JSON, sent with Content-Type: application/json"))
    found = "" if first["type"] == "missing" else f", but found {first['input']!r:.200}"
    message = f"{where or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}{found}"
    return error_response(RequestError(message, param=where or None))


async def _http_error(http: HTTPRequest, error: Exception) -> Response:
    cause = cast(HTTPException, error)
    return error_response(RequestError(f"{http.method} {http.url.path}: {cause.detail}", status=cause.status_code))


async def _internal_error(http: HTTPRequest, error: Exception) -> Response:
    _LOG.error("%s %s failed", http.method, http.url.path, exc_info=error)
    return error_response(RequestError("internal error", status=500, kind="server_error"))
