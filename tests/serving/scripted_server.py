"""A server in the same process that answers each request by a script, with exact delays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from serving.bench.load import Load, Observations
from serving.bench.prompts import PromptWriter, TokenCost
from serving.bench.target import Target
from serving.bench.workload import PlannedRequest

END = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
STREAM = {"content-type": "text/event-stream"}


def token(text: str = "x") -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}]}


def used(inputs: int, outputs: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": inputs, "completion_tokens": outputs}}


@dataclass(frozen=True)
class Answer:
    """steps: (seconds to wait, what to send), an event's object, its raw data as str, raw bytes, or an error to raise."""

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


class ScriptedServer(httpx.AsyncBaseTransport):
    """answer: from the number of the request and its body. in_flight and most count answers that are on their way."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Answer]) -> None:
        self._answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.most = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        answer = self._answer(len(self.bodies) - 1, body)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(answer.delay)
        except asyncio.CancelledError:
            self.in_flight -= 1
            raise
        return httpx.Response(answer.status, headers=answer.headers, stream=_Steps(self, answer.steps))


class _Steps(httpx.AsyncByteStream):
    def __init__(self, server: ScriptedServer, steps: tuple[tuple[float, Any], ...]) -> None:
        self._server = server
        self._steps = steps

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for pause, step in self._steps:
            await asyncio.sleep(pause)
            if isinstance(step, Exception):
                raise step
            yield step if isinstance(step, bytes) else _event(step)

    async def aclose(self) -> None:
        self._server.in_flight -= 1


def _event(data: Any) -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


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
    async with httpx.AsyncClient(transport=server, base_url="http://scripted") as http:
        show = (lambda done, total: None) if shown is None else (lambda done, total: shown.append((done, total)))
        return await Load(http, target or Target("m", "completions"), writer, plan, users, show).run(stop)


def constant_plan(count: int, gap: float = 1.0) -> list[PlannedRequest]:
    return [PlannedRequest(i * gap, 5, 3) for i in range(count)]
