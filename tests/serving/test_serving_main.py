"""`python -m serving` as a process: its options, its mistakes, its readiness and its end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
import torch

from serving.__main__ import main
from serving.config import ServerConfig, build_parser, parse_args

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ORACLE = (str(Path(__file__).parent / "serve_with_torch.py"),)
REAL = ("-m", "serving")


class Process:
    """The server, on oracle kernels unless another program is named; stderr is collected while it runs."""

    def __init__(self, *arguments: str, program: tuple[str, ...] = ORACLE, **variables: str) -> None:
        paths = (str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
        environment = os.environ | {"PYTHONPATH": ":".join(filter(None, paths)), "PYTHONWARNINGS": "error"}
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=environment | variables,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)  # at once: others read along

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end and self.process.poll() is None, self.text
            time.sleep(0.02)
        return found

    def finish(self, seconds: float = 30) -> int:
        status = self.process.wait(seconds)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@pytest.fixture
def ready(tiny_directory: Path, tmp_path: Path) -> Iterator[tuple[Process, str]]:
    traced = ("--log-requests", "--trace", str(tmp_path / "trace.json"))
    server = Process("--model", str(tiny_directory), "--port", "0", "--device", "cpu", "--max-batch", "4", *traced)
    url = server.wait_for(r"ready: tiny on cpu at (http://127\.0\.0\.1:\d+)\n").group(1)
    server.wait_for("curl .*\n")
    yield server, url
    if server.process.poll() is None:
        server.process.terminate()
        server.finish()


def test_the_printed_curl_line_works(ready: tuple[Process, str]) -> None:
    server, url = ready
    assert "loading tiny on cpu\n" in server.text
    assert "packing weights: layer 2 of 2\n" in server.text
    assert "context 256 tokens, 64 pages, up to 4 requests at once" in server.text
    command = shlex.split(server.wait_for(r"  (curl .*)\n").group(1))
    assert command[:2] == ["curl", f"{url}/v1/chat/completions"]
    header, body = command[command.index("-H") + 1], command[command.index("-d") + 1]
    name, _, value = header.partition(": ")
    reply = httpx.post(command[1], content=body, headers={name: value}, timeout=60)
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_finish_after_a_signal(
    ready: tuple[Process, str], number: signal.Signals, tmp_path: Path
) -> None:
    server, url = ready
    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.process.send_signal(number)
        rest = list(lines)
    assert "data: [DONE]" in rest
    assert '"finish_reason":"length"' in rest[-4]
    assert server.process.wait(30) == 0
    server.finish()
    assert server.text.endswith("stopped\n")
    phases = r"queued [\d.]+ ms, prefill [\d.]+ ms, decode [\d.]+ ms \([\d.]+ a token\)"
    assert re.search(rf"\nrequest cmpl-\w+-0 length: 1 tokens in, 200 out; {phases}\n", server.text)
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("commit") >= 200 and names[0] == "thread_name"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.exhaustive
def test_a_server_that_is_killed_starts_again(tiny_directory: Path, tmp_path: Path) -> None:
    """While it loads, and in the middle of an answer: the next one serves, on the same port and files. Its key is a variable."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer secret"}
    body = {"model": "tiny", "prompt": "a", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
    answers = []
    for kill_at in ("loading tiny", "packing weights", "ready", "ready", ""):
        arguments = ("--model", str(tiny_directory), "--port", str(port), "--device", "reference", "--max-batch", "2")
        server = Process(*arguments, program=REAL, TILUS_CACHE_DIR=str(tmp_path), TILUS_API_KEY="secret")
        server.wait_for(kill_at or "ready")
        if kill_at in ("ready", ""):
            server.wait_for("curl .*\n")
            assert httpx.get(f"{url}/v1/models").status_code == 401
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=body | {"stream": True}, headers=headers, timeout=60
            ) as reply:
                next(reply.iter_lines())
                if kill_at:
                    server.process.kill()
        if kill_at:
            server.process.kill()
            assert server.finish() == -signal.SIGKILL
            continue
        for _ in range(2):
            reply = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
            answers.append(reply.json()["choices"][0]["text"])
        server.process.terminate()
        assert server.finish() == 0
    assert len(answers) == 2 and len(set(answers)) == 1


def test_a_port_in_use_is_said_before_loading(tiny_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--model", str(tiny_directory), "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"
        "  hint: choose another with --port, or let the system choose with --port 0\n"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["--model", "/nowhere"],
            1,
            "error: the model /nowhere does not exist\n  hint: --model takes a directory or a .gguf file\n",
        ),
        (["--max-batch", "0"], 2, "error: argument --max-batch: 0 is not positive\n"),
        (["--port", "99999"], 2, "error: argument --port: 99999 is not between 0 and 65535\n"),
        (["--itl-slo", "nan"], 2, "error: argument --itl-slo: nan is not positive\n"),
        (["--drain-timeout", "-1"], 2, "error: argument --drain-timeout: -1.0 is not finite and not negative\n"),
        (["--swap-space", "inf"], 2, "error: argument --swap-space: inf is not finite and not negative\n"),
        (["--drafts", "9"], 2, "error: argument --drafts: 9 is not between 0 and 8\n"),
        (["--num-pages", "x"], 2, "error: argument --num-pages: invalid int value: 'x'\n"),
        (["--draft-model", "m"], 2, "error: argument --draft-model: nothing is guessed without --drafts\n"),
        (["--device", "tpu"], 2, "error: argument --device: invalid choice: 'tpu' (choose from "),
        (["--weight-dtype", "int9"], 2, "error: argument --weight-dtype: invalid choice: 'int9' (choose from "),
    ],
)
def test_wrong_options_are_named(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["--port", "0", *arguments])
    except SystemExit as ended:
        found = ended.code
    assert found == status
    assert message in capsys.readouterr().err


def test_a_wrong_option_ends_the_process() -> None:
    server = Process("--port", "0", "--device", "tpu")
    assert server.finish() == 2
    assert "error: argument --device: invalid choice: 'tpu'" in server.text and "Traceback" not in server.text


def test_limits_that_contradict_the_model(tiny_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "0", "--model", str(tiny_directory), "--max-model-len", "300"]) == 1
    assert capsys.readouterr().err == "error: --max-model-len is 300, but the model was made for at most 256 tokens\n"


def start_and_stop(model: Path, cache: Path, device: str = "reference") -> str:
    """What the real server says until it is ready."""
    arguments = ("--model", str(model), "--port", "0", "--device", device, "--max-batch", "2")
    server = Process(*arguments, program=REAL, TILUS_CACHE_DIR=str(cache))
    server.wait_for("curl .*\n")
    server.process.terminate()
    assert server.finish() == 0
    return server.text


def test_the_second_start_finds_the_weights(tiny_directory: Path, tmp_path: Path) -> None:
    first, second = (start_and_stop(tiny_directory, tmp_path / "cache") for _ in range(2))
    assert "packing weights" in first and "packing weights" not in second
    assert [line for line in first.splitlines() if line.startswith("  weights")] == [
        line for line in second.splitlines() if line.startswith("  weights")
    ]
    assert "kernels are interpreted (reference), which is slow\n" in first
    assert "warming up: step 2 of 2\n" in second


@pytest.mark.exhaustive
def test_a_start_that_was_killed_leaves_nothing_in_the_way(tiny_directory: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(tiny_directory), "--port", "0", "--device", "cpu", "--max-batch", "2")
    killed = Process(*arguments, program=REAL, TILUS_CACHE_DIR=str(tmp_path))
    killed.wait_for("compiling kernels: kernel", 200)
    killed.process.kill()
    killed.process.wait()
    kept = len(list((tmp_path / "kernels").iterdir()))
    second = Process(*arguments, program=REAL, TILUS_CACHE_DIR=str(tmp_path))
    total = int(second.wait_for(r"compiling kernels: kernel \d+ of (\d+)", 200).group(1))
    second.wait_for("curl .*\n", 200)
    second.process.terminate()
    assert second.finish() == 0
    third = start_and_stop(tiny_directory, tmp_path, "cpu")
    assert kept and "compiling kernels" not in third
    assert (
        total <= len(list((tmp_path / "kernels").iterdir())) - kept
    )  # what was compiled when it was killed is not again
    assert killed.finish() == -signal.SIGKILL


def test_a_cache_directory_that_is_none_costs_one_warning(tiny_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = start_and_stop(tiny_directory, tmp_path / "file")
    assert text.count("cannot keep the weights in ") == 1
    assert "Traceback" not in text


def test_a_model_that_does_not_fit_is_refused(tiny_directory: Path) -> None:
    server = Process("--port", "0", "--model", str(tiny_directory), "--device", "cpu", "--num-pages", str(2**40))
    assert server.finish() == 1
    assert re.search(r"\nerror: the model needs \d+ MiB, but \d+ MiB are available\nmemory in MiB\n", server.text)
    assert "Traceback" not in server.text


def test_every_option_is_explained() -> None:
    text = build_parser().format_help()
    documented = (ROOT / "docs" / "serving.md").read_text()
    for option in fields(ServerConfig):
        flag = "--" + option.name.replace("_", "-")
        assert flag in text
        row = next(line for line in documented.splitlines() if line.startswith(f"| `{flag}"))
        assert option.metadata["help"] in row
        if option.default is not None:
            assert f"`{option.default}`" in row


def test_options_are_parsed_as_declared() -> None:
    config = parse_args(["--model", "m", "--port", "0", "--max-model-len", "9", "--request-timeout", "1.5"])
    assert config == ServerConfig(model="m", port=0, max_model_len=9, request_timeout=1.5)
    assert parse_args([]) == ServerConfig()


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=[pytest.mark.exhaustive, pytest.mark.timeout(300)]),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.timeout(280)]),
    ],
)
def test_a_server_of_two_processes_stops(tiny_directory: Path, tmp_path: Path, device: str) -> None:
    """With the library's kernels, whose steps are captured; answers in between."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    server = Process(
        "--model", str(tiny_directory), "--port", "0", "--device", device, "--max-batch", "2", "--tp", "2",
        program=("-m", "serving"), PYTHONWARNINGS="default", TILUS_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    url = server.wait_for(r"ready: tiny on \w+ at (http://127\.0\.0\.1:\d+)\n", 240).group(1)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert reply.json()["usage"]["completion_tokens"] == 20
    server.process.terminate()
    assert server.finish() == 0
    assert server.text.endswith("stopped\n")
