"""A real server on loopback in a thread, on the tiny model, with the integrity check after every step."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import uvicorn
from openai import OpenAI

from serving.api import create_app
from serving.async_engine import AsyncEngine
from serving.config import EngineConfig
from serving.core import Batch, Runner, StepOutput
from serving.engine import Engine
from serving.grammar import Grammars
from serving.http_protocol import HttpProtocol
from serving.loader import Checkpoint

MODEL = "tiny"
CONFIG = EngineConfig(num_pages=60, max_model_len=200, page_size=4, max_batch=4, max_step_tokens=24)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)


class CheckedEngine(Engine):
    def step(self):
        outputs = super().step()
        self.check()
        return outputs


class ThrottledRunner:
    """Lets tests slow steps down, hold them, or make them fail."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.delay = 0.0
        self.error: Exception | None = None
        self.open = threading.Event()
        self.open.set()

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        self.open.wait(30)
        time.sleep(self.delay)
        if self.error is not None:
            raise self.error
        return self._runner.launch(batch)


@dataclass(frozen=True)
class LiveServer:
    url: str
    async_engine: AsyncEngine
    engine: Engine
    runner: ThrottledRunner

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def check_idle(self) -> None:
        """Wait until nothing runs; then every page must be free and everything must agree."""
        wait_until(lambda: not self.engine.has_work and not self.engine._live)
        self.engine.check()
        assert self.engine.pages.num_free == self.engine.pages.num_pages


@contextlib.contextmanager
def serve(
    runner: Runner,
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_waiting: int = 64,
    api_key: str | None = None,
    origins: Sequence[str] = (),
) -> Iterator[LiveServer]:
    throttled = ThrottledRunner(runner)
    engine = CheckedEngine(
        throttled, checkpoint.tokenizer, config, time.monotonic, Grammars(checkpoint.tokenizer).matcher
    )
    async_engine = AsyncEngine(engine, max_waiting)
    app = create_app(async_engine, checkpoint.tokenizer, MODEL, api_key, origins)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, 8192
    )  # small, so that it shows when a client does not read
    server = uvicorn.Server(uvicorn.Config(app, http=HttpProtocol, log_level="critical", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield LiveServer(f"http://127.0.0.1:{listener.getsockname()[1]}", async_engine, engine, throttled)
    finally:
        throttled.open.set()
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
