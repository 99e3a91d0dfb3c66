"""The server's life: choose a device, bind the port, build the engine, answer until told to stop."""

from __future__ import annotations

import gc
import json
import shlex
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack

import torch
import uvicorn

from serving.api import create_app
from serving.async_engine import AsyncEngine
from serving.build import build_engine, open_model, rank_runner
from serving.config import ServerConfig
from serving.engine import Engine
from serving.execution import Execution, choose_execution
from serving.http_protocol import HttpProtocol
from serving.kernels import Kernels, default_kernels
from serving.progress import progress, say
from serving.shards import check_shares
from serving.tensor_parallel import ranks
from serving.warm_up import measure_steps, warm_up
from tilus.config import api_key
from tilus.errors import TilusError


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def serve(config: ServerConfig, kernels: Callable[[], Kernels] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. kernels: another library than `tilus.kernels`.

    Raises: TilusError when the port is taken, the model is not supported or does not fit, the device is not there.
    """
    execution = choose_execution(config.device)
    library = kernels() if kernels is not None else default_kernels(config.batch_invariant)
    if execution.device.type == "cpu":
        torch.set_num_threads(1)  # what torch does here is small; its threads would only take the kernels' cores away
    with ExitStack() as stack:
        listener = stack.enter_context(_bind(config.host, config.port))  # before minutes of loading, not after
        path, checkpoint = open_model(config)
        name = config.model_name or checkpoint.name
        check_shares(checkpoint, config.tp)  # before processes start that could only say the same
        others = stack.enter_context(ranks(config, execution.device, rank_runner)) if config.tp > 1 else None
        engine = build_engine(config, path, checkpoint, library, execution, others)
        on_gpu = execution.way == "cuda"
        with progress("warming up", "step") as show:
            warm_up(engine, show)
        if on_gpu and not engine.cost.is_fitted and config.itl_slo is not None:
            measure_steps(engine)
        origins = config.allowed_origins.split(",") if config.allowed_origins else ()
        asynchronous, key = AsyncEngine(engine, config.max_waiting), config.api_key or api_key()
        app = create_app(asynchronous, checkpoint.tokenizer, name, key, origins)
        port = int(listener.getsockname()[1])
        server = _Server(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                log_level="warning",
                timeout_graceful_shutdown=max(1, round(config.drain_timeout)),
            ),
            ready=lambda: _ready(config.host, port, name, engine, execution),
        )
        # uvicorn drains on these signals, then raises them again for whoever was there before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        server.run(sockets=[listener])
        engine.cost.save()
        if engine.trace is not None:
            engine.trace.write()
    say("stopped")


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise TilusError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="choose another with --port, or let the system choose with --port 0",
        ) from error
    return listener


def _ready(host: str, port: int, name: str, engine: Engine, execution: Execution) -> None:
    gc.freeze()  # what was loaded stays: collections need not look at it
    gc.enable()
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    message = {"role": "user", "content": "What is the capital of France?"}
    body = json.dumps({"model": name, "messages": [message], "temperature": 0})
    say(
        f"ready: {name} on {execution.device.type} at {url}\n"
        f"  context {engine.max_model_len} tokens, {engine.config.num_pages} pages, "
        f"up to {engine.config.max_batch} requests at once; stop with Ctrl-C\n"
        f"  a page to chat: {url}/\n"
        f"try:\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
