"""What clients of the real server see who stream at once: `python benchmarks/serving_http.py [--out FILE] [-- SERVER'S OPTIONS]`.

Starts `python -m serving` with random weights in the shape of --config (Llama-3-8B by default). Each of some clients sends a
prompt of its own of --context tokens, and gets --tokens greedy tokens as server-sent events. The clients are one process that
only takes bytes from sockets and notes when, so that what is measured is the server.

Output, as JSON:
    device, cpus, model, context, tokens, options
    rows    list of {case, metric, value, unit, baseline, limit}, of the time in which all clients stream: `time a token` of a
            client, in the mean; `gap between pieces` of the same stream, p50 and p99 over all; `tokens a piece`, above 1 where
            the server puts several together. baseline and limit are null
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from serving_start import device

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
BYTES = 256  # tokens of a prompt are some of the first so many
PIECE = b"data: {"
NAME = "random"
STALLED = 120.0  # seconds in which nothing comes


@dataclass(eq=False)
class Stream:
    """A client. head: what came first. times: when its pieces came."""

    socket: socket.socket
    head: bytes = b""
    times: list[float] = field(default_factory=list[float])
    rest: bytes = b""

    def take(self) -> bool:
        """Whether the server goes on."""
        data = self.socket.recv(1 << 18)
        self.head = self.head or data
        pieces = (self.rest + data).count(PIECE) - self.rest.count(PIECE)
        self.times += [time.monotonic()] * pieces
        self.rest = data[1 - len(PIECE) :]
        return bool(data)


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[int]:
    """Its port, when it is ready."""
    command = [sys.executable, "-m", "serving", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"ready: .*:(\d+)$", line.rstrip()):
                yield int(found[1])
                return
        raise SystemExit(f"the server ended before it was ready:\n{''.join(said)}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def request(number: int, options: argparse.Namespace) -> bytes:
    prompt = [number // BYTES % BYTES, number % BYTES] + [7] * (options.context - 2)
    body = json.dumps(
        {
            "model": NAME,
            "prompt": prompt,
            "max_tokens": options.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}"
    return f"{head}\r\ncontent-type: application/json\r\n\r\n{body}".encode()


def streams(port: int, first: int, clients: int, options: argparse.Namespace) -> list[Stream]:
    """So many at once, to their end."""
    found = [Stream(socket.create_connection(("127.0.0.1", port))) for _ in range(clients)]
    with selectors.DefaultSelector() as selector:
        for number, stream in enumerate(found):
            stream.socket.sendall(request(first + number, options))
            selector.register(stream.socket, selectors.EVENT_READ, stream)
        while selector.get_map():
            events = selector.select(STALLED)
            if not events:
                raise SystemExit(f"nothing came for {STALLED:g} seconds")
            for key, _ in events:
                if not key.data.take():
                    selector.unregister(key.data.socket)
                    key.data.socket.close()
    return found


def rows_of(clients: int, found: Sequence[Stream], tokens: int) -> Iterator[dict[str, Any]]:
    if any(len(stream.times) < 2 for stream in found):
        raise SystemExit(f"streams without pieces, of which one began:\n{found[0].head.decode()}")
    begin, end = max(stream.times[0] for stream in found), min(stream.times[-1] for stream in found)
    if begin >= end:
        raise SystemExit(f"{clients} clients never streamed at once: more --tokens are needed")
    times = [[time for time in stream.times if begin <= time <= end] for stream in found]
    each = [tokens / len(stream.times) for stream in found]  # tokens a piece
    rate = sum(len(t) * n for t, n in zip(times, each)) / (end - begin)
    gaps = sorted(1e3 * (after - before) for stream in times for before, after in pairwise(stream))
    for metric, value, unit in (
        ("time a token", 1e3 * clients / rate, "ms"),
        ("gap between pieces, p50", gaps[len(gaps) // 2], "ms"),
        ("gap between pieces, p99", gaps[len(gaps) * 99 // 100], "ms"),
        ("tokens a piece", statistics.fmean(each), "tokens"),
    ):
        print(f"{clients:4} clients  {metric:26} {value:10.3f} {unit}", flush=True)
        row = {"case": f"{clients} clients", "metric": metric, "value": round(value, 3), "unit": unit}
        yield row | {"baseline": None, "limit": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a config.json; default: that of Llama-3-8B")
    parser.add_argument("--clients", default="1,16,64", help="at once, separated by commas (default %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="of an answer (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("arguments", nargs="*", help="behind --: options of the server")
    options = parser.parse_args()
    numbers = [int(number) for number in options.clients.split(",")]
    settings = LLAMA_3_8B if options.config is None else json.loads(options.config.read_text())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.json"
        config.write_text(json.dumps(settings))
        given = [
            "--model",
            str(config),
            "--model-name",
            NAME,
            "--dummy",
            "--max-batch",
            str(max(numbers)),
            *options.arguments,
        ]
        with server(given) as port:
            for index, clients in enumerate(numbers):
                for turn in range(2):  # the first one for what comes first
                    found = streams(port, 1000 * (2 * index + turn), clients, options)
                rows += rows_of(clients, found, options.tokens)
    report = {
        "device": device(), "cpus": len(os.sched_getaffinity(0)),
        "model": options.config.stem if options.config else "Llama-3-8B",
        "context": options.context, "tokens": options.tokens, "options": " ".join(options.arguments), "rows": rows,
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
