"""A server in the same process that answers each request by a script, with exact delays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from serving.bench.client import HttpClient
from serving.bench.load import Load, Observations
from serving.bench.prompts import PromptWriter, TokenCost
from serving.bench.target import Target
from serving.bench.workload import PlannedRequest

END = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
BREAK = object()  # the connection
STREAM = {"content-type": "text/event-stream"}


def token(text: str = "x") -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}]}


def used(inputs: int, outputs: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": inputs, "completion_tokens": outputs}}


@dataclass(frozen=True)
class Answer:
    """steps: (seconds to wait, what to send), an event's object, its raw data as str, raw bytes, or BREAK."""

    steps: tuple[tuple[float, Any], ...] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: STREAM)
    delay: float = 0.0

    @classmethod
    def stream(cls, times: list[float], *, inputs: int = 7, outputs: int | None = None) -> Answer:
        """One token after each of these pauses, then the usage."""
        events = [(pause, token()) for pause in times]
        count = len(times) if outputs is None else outputs
        return cls((*events, (0.0, END), (0.0, used(inputs, count)), (0.0, "[DONE]")))

    @classmethod
    def error(cls, status: int, message: str, **headers: str) -> Answer:
        return cls(((0.0, json.dumps({"error": {"message": message}}).encode()),), status, headers)


class ScriptedServer:
    """Speaks HTTP/1.1 over a Unix socket, which passes data on at once: nothing takes time but what the script says.

    answer: from the number of the request and its body. most: the most answers that were on their way at a time.
    """

    def __init__(self, answer: Callable[[int, dict[str, Any]], Answer]) -> None:
        self._answer = answer
        self.requests: list[str] = []  # method and path
        self.headers: list[list[str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.num_connections = self.most = self._in_flight = 0
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def listen(self, path: str) -> None:
        self._listener = await asyncio.start_unix_server(self._serve, path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while await self.serve_one(reader, writer):
                    pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection can go on."""
        first, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        length = sum(int(line.split(":")[1]) for line in headers if line.startswith("Content-Length"))
        body = json.loads(await reader.readexactly(length) or b"{}")
        self.requests.append(first.removesuffix(" HTTP/1.1"))
        self.headers.append(headers)
        self.bodies.append(body)
        answer = self._answer(len(self.bodies) - 1, body)
        self._in_flight += 1
        self.most = max(self.most, self._in_flight)
        try:
            await asyncio.sleep(answer.delay)
            lines = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
            writer.write(f"HTTP/1.1 {answer.status} So\r\n{lines}Transfer-Encoding: chunked\r\n\r\n".encode())
            for pause, step in answer.steps:
                await asyncio.sleep(pause)
                if step is BREAK:
                    return False
                data = step if isinstance(step, bytes) else _event(step)
                if data:  # a chunk of nothing is the end
                    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            writer.write(b"0\r\n\r\n")
            return True
        finally:
            self._in_flight -= 1

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)
        await asyncio.sleep(0)  # closed transports say so in the loop's next round


def _event(data: Any) -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


@contextlib.asynccontextmanager
async def client_of(
    server: ScriptedServer, url: str = "http://scripted", api_key: str | None = None
) -> AsyncIterator[HttpClient]:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        await server.listen(path)
        http = HttpClient(url, api_key, aiohttp.UnixConnector(path, limit=0))
        try:
            yield http
        finally:
            await http.close()
            await server.close()


async def observe(
    server: ScriptedServer,
    plan: list[PlannedRequest],
    *,
    users: int | None = None,
    stop_at: float | None = None,
    writer: PromptWriter | None = None,
    target: Target | None = None,
    shown: list[tuple[int, int]] | None = None,
) -> Observations:
    """A run of the load generator against the server, stopped at that time if any."""
    stop = asyncio.Event()
    if stop_at is not None:
        asyncio.get_running_loop().call_later(stop_at, stop.set)
    writer = writer or PromptWriter(0, TokenCost(0.0, 1.0))
    async with client_of(server) as http:
        show = (lambda done, total: None) if shown is None else (lambda done, total: shown.append((done, total)))
        return await Load(http, target or Target("m", "completions"), writer, plan, users, show).run(stop)


def constant_plan(count: int, gap: float = 1.0) -> list[PlannedRequest]:
    return [PlannedRequest(i * gap, 5, 3) for i in range(count)]
