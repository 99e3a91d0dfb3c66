"""OpenAI's HTTP interface: completions and chats, whole or as server-sent events; models, health, version."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Message, Receive, Scope, Send

from serving import schemas
from serving.async_engine import AsyncEngine, Generation
from serving.config import version
from serving.core import Request, RequestOutput
from serving.errors import RequestError
from serving.metrics import CONTENT_TYPE, Metrics
from serving.middleware import BodyLimit, KeyCheck, error_response
from serving.protocol import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, StreamOptions, TokenizeBody
from serving.responses import ChatFormat, Choice, CompletionFormat, Format, Header, Json, usage
from serving.tokenizer import Tokenizer
from serving.tools import LIST, CallParser, call_grammar, style_of

_LOG = logging.getLogger("serving")
_MAX_BODY_NBYTES = 16 * 2**20
_MAX_BODY_SECONDS = 60.0
_MAX_SEND_SECONDS = 60.0
_Outputs = AsyncIterator[tuple[Choice, RequestOutput]]
_PAGE = Path(__file__).parent / "page.html"
# The page talks to this server and nobody else, whatever a model may write into it.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


def create_app(
    engine: AsyncEngine, tokenizer: Tokenizer, model_name: str, api_key: str | None = None, origins: Sequence[str] = ()
) -> FastAPI:
    """The web application. It starts the engine's thread when it starts, and stops it when it stops.

    api_key: what requests must have in their header; None lets everyone in. origins: of pages elsewhere whose scripts may ask.
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
    if origins:  # outermost: what browsers ask ahead has no key
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    for kind in (RequestError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _told)
    app.add_api_route("/", service.page, methods=["GET"], include_in_schema=False)
    answers = schemas.responses
    health = answers(schemas.Health) | {503: {"model": schemas.Health}}
    for path, endpoint, method, responses in (
        ("/v1/completions", service.completions, "POST", answers(schemas.Completion, stream=True)),
        ("/v1/chat/completions", service.chat_completions, "POST", answers(schemas.ChatCompletion, stream=True)),
        ("/v1/models", service.models, "GET", answers(schemas.ModelList)),
        ("/v1/models/{name:path}", service.model, "GET", answers(schemas.ModelCard)),
        ("/tokenize", service.tokenize, "POST", answers(schemas.Tokenized)),
        ("/detokenize", service.detokenize, "POST", answers(schemas.Detokenized)),
        ("/health", service.health, "GET", health),
        ("/ping", service.health, "GET", health),
        ("/version", service.version, "GET", answers(schemas.Version)),
    ):
        app.add_api_route(path, endpoint, methods=[method], responses=responses, response_model=None)
    app.add_api_route("/metrics", service.metrics, methods=["GET"], response_class=PlainTextResponse)
    return app


class EventStream(StreamingResponse):
    """Server-sent events of a generation, which is given up when the client leaves, at whatever point, or reads no more."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, since = asyncio.get_running_loop(), None

        async def watched(message: Message) -> None:
            nonlocal since
            since = loop.time()
            await send(message)
            since = None

        async def stall() -> None:
            """Until a message has not been taken for too long. A timeout around each would take as long as most of them do."""
            while since is None or loop.time() < since + _MAX_SEND_SECONDS:
                await asyncio.sleep(_MAX_SEND_SECONDS / 8)

        async with _abandoned_with(receive, self._generation):
            sending = asyncio.ensure_future(super().__call__(scope, receive, watched))
            stalled = asyncio.ensure_future(stall())
            try:
                await asyncio.wait((sending, stalled), return_when=asyncio.FIRST_COMPLETED)
                if stalled.done():  # returning before the end closes the connection
                    _LOG.warning("a client has read nothing for %g seconds and is given up", _MAX_SEND_SECONDS)
                else:
                    sending.result()
            finally:
                sending.cancel()
                stalled.cancel()


class _Service:
    """The endpoints, over one engine with one model."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, model_name: str) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._created = int(time.time())
        self._compiler = ThreadPoolExecutor(1, "grammars")  # apart from what all requests wait for
        self._metrics = Metrics(engine.engine, model_name)
        state = f"{version()} {model_name} {engine.engine.config}"
        self._fingerprint = f"fp_{hashlib.sha256(state.encode()).hexdigest()[:10]}"

    async def completions(self, body: CompletionBody, http: HTTPRequest) -> Response:
        self._check(body)
        prompts = [await self._prompt_ids(prompt, body.add_special_tokens) for prompt in body.prompts()]
        echoes = [prompt for prompt in body.prompts() if body.echo for _ in range(body.num_choices)]
        header = self._header("cmpl")
        requests = [
            body.request(f"{header.id}-{i * body.num_choices + choice}", prompt, choice, body.grammar())
            for i, prompt in enumerate(prompts)
            for choice in range(body.num_choices)
        ]
        format = CompletionFormat(self._tokenizer, echoes, scored=requests[0].params.prompt_logprobs is not None)
        return await self._respond(body, http, header, requests, format, body.is_only_prompt)

    async def chat_completions(self, body: ChatBody, http: HTTPRequest) -> Response:
        self._check(body)
        tools, style = body.offered_tools(), style_of(self._tokenizer.chat_template)
        several = body.parallel_tool_calls is not False
        prompt = await self._chat_ids(body)
        if tools and style is LIST:
            body.skip_special_tokens = False
        header, grammar = self._header("chatcmpl"), body.grammar()
        required = body.required_functions()
        if functions := required or body.strict_functions():
            open_id = self._tokenizer.fast.token_to_id(style.open)
            grammar = call_grammar(functions, style, several=several, text=not required, open_id=open_id)
        requests = [
            body.request(f"{header.id}-{choice}", prompt, choice, grammar) for choice in range(body.num_choices)
        ]
        names = frozenset(tool["function"]["name"] for tool in tools)
        parser = (lambda: CallParser(style, names)) if tools else None
        return await self._respond(body, http, header, requests, ChatFormat(self._tokenizer, parser, several=several))

    async def models(self) -> Json:
        return {"object": "list", "data": [await self.model(self._model_name)]}

    async def model(self, name: str) -> Json:
        self._check_model(name)
        own = {"id": name, "object": "model", "created": self._created, "owned_by": "tilus"}
        return own | {"root": name, "parent": None, "max_model_len": self._engine.engine.max_model_len}

    async def tokenize(self, body: TokenizeBody) -> Json:
        self._check_model(body.model)
        text = body.text()
        tokens = await (self._chat_ids(body) if text is None else self._prompt_ids(text, body.add_special_tokens))
        texts = [self._tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        own = {"count": len(tokens), "max_model_len": self._engine.engine.max_model_len, "tokens": list(tokens)}
        return own | {"token_strs": texts}

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
        return {"version": version()}

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

    async def _prompt_ids(self, prompt: str | list[int], add_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await asyncio.to_thread(self._tokenizer.encode, prompt, add_special_tokens)
        return tuple(prompt)

    async def _chat_ids(self, body: ChatBody | TokenizeBody) -> tuple[int, ...]:
        messages = body.messages or []
        rendered, options = [message.for_template() for message in messages], body.template_options(messages)
        return await asyncio.to_thread(self._tokenizer.encode_chat, rendered, body.offered_tools(), options)

    def _header(self, prefix: str) -> Header:
        return Header(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), self._model_name, self._fingerprint)

    async def _respond(
        self, body: GenerationBody, http: HTTPRequest, header: Header, requests: Sequence[Request], format: Format,
        is_only_prompt: bool = False,
    ) -> Response:  # fmt: skip
        if (grammar := requests[0].params.grammar) is not None:
            await asyncio.get_running_loop().run_in_executor(self._compiler, self._engine.engine.new_matcher, grammar)
        generation = self._engine.submit(requests)
        n = body.num_choices
        choices = {r.id: Choice(index, 0 if index % n else len(r.prompt)) for index, r in enumerate(requests)}
        outputs = self._counted(generation, choices, n, is_only_prompt)
        if body.stream:
            events = _events(header, outputs, [*choices.values()], format, body.stream_options or StreamOptions())
            return EventStream(generation, events)
        async with _abandoned_with(http.receive, generation):
            async for choice, output in outputs:
                choice.extend(output)
        answer = header.body(format.kind, [format.choice(choice) for choice in choices.values()])
        return JSONResponse(answer | {"usage": usage(choices.values())})

    async def _counted(
        self, generation: Generation, choices: Mapping[str, Choice], num_choices: int, is_only_prompt: bool
    ) -> _Outputs:
        """What the choices get, of which `num_choices` belong to each prompt, and what metrics tell of those that end."""
        async for output in generation:
            _raise_failure(output)
            if is_only_prompt:
                output = output._replace(text="", tokens=(), finish_reason="length")
            choices[output.request_id].count(output)
            yield choices[output.request_id], output
        counts = [choice.num_tokens for choice in choices.values() if choice.finish_reason is not None]
        for start in range(0, len(counts), num_choices) if len(counts) == len(choices) else ():
            self._metrics.answered(num_choices, max(counts[start : start + num_choices]))


async def _events(
    header: Header, outputs: _Outputs, choices: Sequence[Choice], format: Format, options: StreamOptions
) -> AsyncIterator[bytes]:
    """The stream's events. An error after the start can only be told inside the stream."""

    def chunk(choice: Json) -> bytes:
        told = usage(choices) if options.continuous_usage_stats else None
        return _event(header.body(format.chunk_kind, [choice]) | ({"usage": told} if options.include_usage else {}))

    try:
        for choice in choices:
            if (opening := format.opening(choice.index)) is not None:
                yield chunk(opening)
        async for choice, output in outputs:
            if (delta := format.delta(choice, output)) is not None:
                yield chunk(delta)
    except RequestError as error:
        yield _event(error.body())
        return
    if options.include_usage:
        yield _event(header.body(format.chunk_kind, []) | {"usage": usage(choices)})
    yield b"data: [DONE]\n\n"


def _event(body: Json) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(body)


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


async def _told(http: HTTPRequest, error: Exception) -> Response:
    """Whatever went wrong, as OpenAI's clients expect it."""
    match error:
        case RequestError():
            found = error
        case RequestValidationError():
            found = _invalid_body(error)
        case HTTPException():
            found = RequestError(f"{http.method} {http.url.path}: {error.detail}", status=error.status_code)
        case _:
            _LOG.error("%s %s failed", http.method, http.url.path, exc_info=error)
            found = RequestError("internal error", status=500, kind="server_error")
    return error_response(found)


def _invalid_body(error: RequestValidationError) -> RequestError:
    """Malformed JSON and fields of wrong types: the first mistake, where it is, and what was found."""
    errors = error.errors()
    # Where several types are allowed, that one is meant which fits the farthest; types are no part of the place.
    first = max((e for e in errors if e["loc"][:2] == errors[0]["loc"][:2]), key=lambda found: len(found["loc"]))
    where = ".".join(
        str(part) for part in first["loc"][1:] if part not in ("str", "NamedTool") and "[" not in str(part)
    )
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['ctx']['error']} at character {where}")
    if isinstance(first["input"], bytes):
        return RequestError("the body must be JSON, sent with Content-Type: application/json")
    found = "" if first["type"] == "missing" else f", but found {first['input']!r:.200}"
    message = f"{where or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}{found}"
    return RequestError(message, param=where or None)
