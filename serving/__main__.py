"""`python -m serving`: load a model, serve it, and finish what is running when told to stop."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from serving.api import create_app
from serving.async_engine import AsyncEngine
from serving.config import EngineConfig, ModelConfig, ServerConfig, parse_args
from serving.core import MonotonicClock, Request, SamplingParams
from serving.engine import Engine
from serving.kernels import Kernels, default_kernels
from serving.loader import Checkpoint, default_model, open_checkpoint
from serving.model import load_model
from serving.runner import TorchRunner
from tilus.dtypes import dtype
from tilus.errors import TilusError

_PAGE_SIZE = 16
_CPU_CACHE_NBYTES = 2**30
_GPU_CACHE_SHARE = 0.9


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def main(arguments: Sequence[str] | None = None, kernels: Callable[[], Kernels] = default_kernels) -> int:
    """Serve until SIGTERM or SIGINT; the process's exit status."""
    config = parse_args(arguments)
    try:
        _serve(config, kernels)
    except TilusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(config: ServerConfig, kernels: Callable[[], Kernels]) -> None:
    device, library = _device(config.device), kernels()
    with _bind(config.host, config.port) as listener:  # before minutes of loading, not after
        path = Path(config.model) if config.model else default_model()
        checkpoint = open_checkpoint(path, dtype(config.weight_dtype))
        name = config.model_name or checkpoint.name
        engine = _build_engine(config, checkpoint, library, device)
        _warm_up(engine)
        app = create_app(AsyncEngine(engine, config.max_waiting), checkpoint.tokenizer, name)
        port = int(listener.getsockname()[1])
        server = _Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=max(1, round(config.drain_timeout))),
            ready=lambda: _say_ready(config.host, port, name, engine, device),
        )
        # uvicorn drains on these signals, then raises them again for whoever was there before: that is us, satisfied.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _satisfied)
        server.run(sockets=[listener])
    _say("stopped")


def _satisfied(number: int, frame: FrameType | None) -> None:
    """A signal handler that has nothing left to do."""


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


def _device(choice: str) -> torch.device:
    if choice == "cuda" and not torch.cuda.is_available():
        raise TilusError(
            f"--device cuda was asked for, but torch {torch.__version__} finds no GPU",
            hint="check nvidia-smi and that torch is a CUDA build, or use --device cpu",
        )
    return torch.device("cpu" if choice == "cpu" or not torch.cuda.is_available() else "cuda")


def _build_engine(config: ServerConfig, checkpoint: Checkpoint, kernels: Kernels, device: torch.device) -> Engine:
    model_limit = checkpoint.config.max_positions
    max_model_len = config.max_model_len or model_limit
    if max_model_len > model_limit:
        raise TilusError(f"--max-model-len is {max_model_len}, but the model was made for at most {model_limit} tokens")
    _say(f"loading {checkpoint.name} on {device.type}")
    model = load_model(checkpoint, kernels, device, _progress)
    limits = EngineConfig(
        num_pages=config.num_pages or _num_pages(checkpoint.config, config.max_batch, max_model_len, device),
        max_model_len=max_model_len,
        page_size=_PAGE_SIZE,
        max_batch=config.max_batch,
        max_step_tokens=config.max_step_tokens,
        request_timeout=config.request_timeout,
    )
    runner = TorchRunner(model, limits.num_pages, limits.page_size, device)
    return Engine(runner, checkpoint.tokenizer, limits, MonotonicClock())


def _num_pages(model: ModelConfig, max_batch: int, max_model_len: int, device: torch.device) -> int:
    """Pages for every request at full length, as far as the memory goes."""
    page_nbytes = _PAGE_SIZE * model.kv_values_per_token * 2
    if device.type == "cuda":
        available = int(torch.cuda.mem_get_info(device)[0] * _GPU_CACHE_SHARE)
    else:
        available = _CPU_CACHE_NBYTES
    return max(1, min(max_batch * -(-max_model_len // _PAGE_SIZE), available // page_nbytes))


def _warm_up(engine: Engine) -> None:
    """One short answer, so that kernels are compiled, and known to work, before the first client comes."""
    _say("warming up")
    engine.add(Request("warm-up", (0, 0), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    engine.check()


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r  layer {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done and done * 4 // total != (done - 1) * 4 // total:  # in a log, a line for each quarter
        _say(f"  layer {done} of {total}")


def _say_ready(host: str, port: int, name: str, engine: Engine, device: torch.device) -> None:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    message = {"role": "user", "content": "What is the capital of France?"}
    body = json.dumps({"model": name, "messages": [message], "temperature": 0})
    _say(
        f"ready: {name} on {device.type} at {url}\n"
        f"  context {engine.max_model_len} tokens, {engine.config.num_pages} pages, "
        f"up to {engine.config.max_batch} requests at once; stop with Ctrl-C\n"
        f"try:\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
