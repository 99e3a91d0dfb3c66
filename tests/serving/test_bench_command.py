"""`python -m serving bench` as users run it, against this project's own server; and what it says when things go wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import MODEL, LiveServer, serve, wait_until
from scripted_server import Answer, ScriptedServer, client_of
from tiny_llama import CPU
from virtual_time import run_virtually

from serving.__main__ import main
from serving.bench.command import make_plan
from serving.bench.options import BenchOptions, build_parser, parse_args
from serving.bench.prompts import SAMPLES, PromptWriter, TokenCost
from serving.bench.target import Endpoint, Target, find_model, token_cost
from serving.bench.workload import LengthRange, mean_rate
from serving.config import EngineConfig
from serving.loader import Checkpoint
from serving.model import Model
from serving.runner import TorchRunner
from tilus.errors import TilusError

ROOT = Path(__file__).parents[2]
CONFIG = EngineConfig(num_pages=60, max_model_len=200, page_size=4, max_batch=4, max_step_tokens=200)


@pytest.fixture(scope="module")
def server(tiny_model: Model, tiny_checkpoint: Checkpoint) -> Iterator[LiveServer]:
    runner = TorchRunner(tiny_model, CONFIG.num_pages, CONFIG.page_size, CPU)
    with serve(runner, tiny_checkpoint, CONFIG, max_waiting=2) as live:
        yield live


@pytest.fixture(autouse=True)
def _no_delay(server: LiveServer) -> Iterator[None]:
    yield
    server.runner.delay = 0.0


def bench(server: LiveServer, *arguments: str) -> int:
    return main(["bench", "--url", server.url, *arguments])


def test_a_run_against_our_own_server(server: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step takes at least 20 ms and gives each request a token: none is faster, however the machine is."""
    server.runner.delay = 0.02
    files = ["--json", str(tmp_path / "run.json"), "--raw", "--plot", str(tmp_path / "run.svg")]
    arguments = ["--limit", "6", "--rate", "20", "--input-tokens", "64", "--output-tokens", "8", "--ignore-eos"]
    assert bench(server, *arguments, *files, "--slo", "ttft=30", "--slo", "e2e=0.15") == 0
    server.check_idle()
    found = json.loads((tmp_path / "run.json").read_text())
    summary = found["summary"]
    assert (summary["sent"], summary["finished"], summary["unsent"]) == (6, 6, 0)
    assert summary["input_tokens"] == 64 and summary["output_tokens"] == 8
    for request in found["requests"]:
        assert request["token_times"][0] - request["arrival"] >= 0.02
        assert request["end"] - request["arrival"] >= 8 * 0.02
        assert request["output_tokens"] == 8
    assert 0.02 <= summary["ttft"]["p50"] <= summary["e2e"]["p50"] <= 10
    assert summary["goodput"]["count"] == 0
    assert found["options"]["model"] == MODEL and found["options"]["body"] == {"temperature": 0, "ignore_eos": True}
    ElementTree.fromstring((tmp_path / "run.svg").read_text())
    out, err = capsys.readouterr()
    assert "  requests    6 sent = 6 finished + 0 failed + 0 cancelled\n" in out
    assert "tiny at " in out and "poisson, " in out
    assert "a word has 5 tokens, a prompt -1 more (by " in err and "sending: request 6 of 6\n" in err


def test_chats_of_users(server: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    arguments = ["--users", "2", "--endpoint", "chat", "--limit", "5", "--input-tokens", "80", "--output-tokens", "4"]
    assert bench(server, *arguments, "--ignore-eos", "--json", str(path)) == 0
    summary = json.loads(path.read_text())["summary"]
    assert summary["finished"] == 5 and summary["output_tokens"] == 4
    assert abs(summary["input_tokens"] - 80) <= 2.5  # words of five tokens
    assert "closed loop of 2 users" in capsys.readouterr().out


def test_a_trace_with_shared_beginnings(server: LiveServer, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 100 * i, "input_length": 1000 + i, "output_length": 40, "hash_ids": [7, i]} for i in range(4)
    ]
    trace, path = tmp_path / "trace", tmp_path / "run.json"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--trace", str(trace), "--scale", "2", "--length-scale", "0.1", "--ignore-eos"]
    assert bench(server, *arguments, "--limit", "3", "--json", str(path), "--raw") == 0
    requests = json.loads(path.read_text())["requests"]
    assert [request["arrival"] for request in requests] == pytest.approx([0, 0.05, 0.1])
    assert [request["asked_input_tokens"] for request in requests] == [100, 100, 100]
    assert [request["input_tokens"] for request in requests] == [99, 99, 99]  # 20 words of five, less the first space
    assert [request["output_tokens"] for request in requests] == [4, 4, 4]


def test_refused_requests_are_counted_and_the_others_reported(
    server: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too long for the model: 400 at once. The report has what there is, and the process fails as nothing finished."""
    path = tmp_path / "run.json"
    assert bench(server, "--limit", "3", "--rate", "50", "--input-tokens", "500", "--json", str(path)) == 1
    summary = json.loads(path.read_text())["summary"]
    assert (summary["sent"], summary["failed"]) == (3, 3)
    (error,) = summary["errors"]
    assert error["kind"] == "http 400" and "200" in error["example"]
    assert "error: 3 x http 400: " in capsys.readouterr().out


def test_a_full_queue_is_come_back_to(server: LiveServer, tmp_path: Path) -> None:
    server.runner.delay = 0.01
    path = tmp_path / "run.json"
    arguments = ["--limit", "12", "--rate", "500", "--input-tokens", "10", "--output-tokens", "20", "--ignore-eos"]
    assert bench(server, *arguments, "--json", str(path)) == 0
    summary = json.loads(path.read_text())["summary"]
    assert summary["finished"] == 12 and summary["retries"] >= 1  # four run, two wait


def test_ctrl_c_reports_what_there_is(server: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.runner.delay = 0.05
    path = tmp_path / "run.json"

    def interrupt() -> None:
        wait_until(lambda: len(server.engine._live) >= 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    arguments = ["--arrivals", "constant", "--rate", "10", "--input-tokens", "10", "--output-tokens", "100"]
    status = bench(server, *arguments, "--ignore-eos", "--json", str(path))
    thread.join()
    assert status == 130
    summary = json.loads(path.read_text())["summary"]
    assert summary["interrupted"] and summary["cancelled"] >= 2 and summary["unsent"] > 0
    assert summary["planned"] == 100 == summary["sent"] + summary["unsent"]
    assert "(interrupted)\n" in capsys.readouterr().out
    server.check_idle()  # the server was left properly


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--url", "http://127.0.0.1:1"],
            "error: no answer from http://127.0.0.1:1: Connect call failed ('127.0.0.1', 1)\n"
            "  hint: start a server with `python -m serving`, or name another with --url\n",
        ),
        (
            ["--url", "http://a:b"],
            "error: 'http://a:b' is no address: Port could not be cast to integer value as 'b'\n"
            "  hint: it is like http://127.0.0.1:8000\n",
        ),
        (
            ["--model", "other"],
            "error: the model 'other' is not there; it has 'tiny'\n  hint: choose one with --model\n",
        ),
        (["--trace", "/nowhere"], "error: cannot read the trace /nowhere: No such file or directory\n"),
        (
            ["--json", "/nowhere/run.json"],
            "error: cannot write /nowhere/run.json: /nowhere is not a directory that can be written\n",
        ),
    ],
)
def test_what_cannot_start_says_why(
    server: LiveServer, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(server, *arguments) == 1
    assert capsys.readouterr() == ("", message)


# What servers answer before the first request


def said(status: int, content: object) -> Answer:
    text = content if isinstance(content, str) else json.dumps(content)
    return Answer(((0.0, text.encode()),), status, {})


def models(*names: str) -> Answer:
    return said(200, {"data": [{"id": name} for name in names]})


def found_model(answer: Answer, model: str | None) -> str:
    async def ask() -> str:
        async with client_of(ScriptedServer(lambda index, body: answer)) as http:
            return await find_model(http, model)

    return run_virtually(ask())


def test_the_model_is_found() -> None:
    assert found_model(models("one"), None) == "one"
    assert found_model(models("one", "two"), "two") == "two"
    assert found_model(said(404, ""), "any") == "any"


@pytest.mark.parametrize(
    ("answer", "model", "message"),
    [
        (models("a", "b"), None, "the server does not have just one model; it has 'a', 'b'"),
        (models(), None, "the server does not have just one model; it has none"),
        (models("a"), "b", "the model 'b' is not there; it has 'a'"),
        (
            said(401, {"error": {"message": "no key"}}),
            None,
            "GET /v1/models was answered with status 401: no key",
        ),
        (
            said(503, "loading"),
            "a",
            "GET /v1/models was answered with status 503: loading",
        ),
        (
            said(200, "<html>"),
            None,
            "GET /v1/models was answered with '<html>', which is no list of models",
        ),
    ],
)
def test_a_server_without_the_model(answer: Answer, model: str | None, message: str) -> None:
    with pytest.raises(TilusError) as error:
        found_model(answer, model)
    assert error.value.message == message
    assert (error.value.hint is None) == ("status 503" in message or "<html>" in message)


def test_a_server_that_stays_silent_is_given_up() -> None:
    with pytest.raises(TilusError) as error:
        found_model(Answer(delay=1000.0), None)
    assert error.value.message == "no answer from http://scripted: none came in 30 s"


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize(
    ("tokenizes", "counts", "expected"),
    [
        (True, True, (TokenCost(3, 2), "/tokenize")),
        (False, True, (TokenCost(9, 4), "usage")),
        (False, False, (TokenCost(0, 1), "words")),
    ],
)
def test_tokens_are_counted_by_tokenize_else_by_usage_else_taken_for_words(
    endpoint: Endpoint, tokenizes: bool, counts: bool, expected: tuple[TokenCost, str]
) -> None:
    def answer(index: int, body: dict[str, Any]) -> Answer:
        text = body["prompt"] if endpoint == "completions" else body["messages"][0]["content"]
        num_words = len(text.split())
        assert num_words in SAMPLES
        if server.requests[-1] == "POST /tokenize":
            return said(200, {"count": 2 * num_words + 3}) if tokenizes else said(404, "")
        assert server.requests[-1] == "POST " + Target("m", endpoint).path and body["max_tokens"] == 1
        return said(200, {"usage": {"prompt_tokens": 4 * num_words + 9} if counts else None})

    async def ask() -> tuple[TokenCost, str]:
        async with client_of(server) as http:
            return await token_cost(http, Target("m", endpoint), PromptWriter(0, TokenCost(0, 1)))

    server = ScriptedServer(answer)
    assert run_virtually(ask()) == expected


# The command line


def plan_of(*arguments: str) -> list:
    return make_plan(parse_args(arguments))


def test_plans() -> None:
    plan = plan_of("--rate", "4", "--arrivals", "constant", "--limit", "9", "--input-tokens", "5:6", "--seed", "1")
    assert len(plan) == 9 and mean_rate(plan) == pytest.approx(4)
    assert {planned.input_tokens for planned in plan} == {5, 6} and {planned.output_tokens for planned in plan} == {64}
    assert len(plan_of()) == 100 and plan_of() == plan_of("--arrivals", "poisson", "--rate", "1") != plan_of(
        "--seed", "1"
    )
    bursts = plan_of("--burstgpt", "--limit", "50", "--rate", "5")
    assert mean_rate(bursts) == pytest.approx(5)
    assert plan_of("--burstgpt", "--limit", "50", "--scale", "10")[-1].arrival == pytest.approx(
        plan_of("--burstgpt", "--limit", "50")[-1].arrival / 10
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--trace f --burstgpt", "--trace and --burstgpt are both workloads"),
        ("--scale 2", "--scale is for --trace and --burstgpt; synthetic arrivals have --rate"),
        ("--burstgpt --rate 1 --scale 2", "--rate and --scale both say how fast a trace goes"),
        ("--trace f --arrivals gamma", "--arrivals is not for a trace, which has its own"),
        ("--trace f --input-tokens 3", "--input-tokens and --output-tokens are not for a trace, which has its own"),
        ("--cv 2", "--cv is for --arrivals gamma"),
        ("--users 2 --rate 1", "--users wait for answers, so --arrivals, --rate and --scale mean nothing to them"),
        ("--raw", "--raw adds to the file of --json"),
        ("--rate 0", "argument --rate: '0' must be a number above 0"),
        ("--users 0", "argument --users: '0' must be a whole number of at least 1"),
        ("--input-tokens 5:3", "argument --input-tokens: '5:3' must be N or LOW:HIGH, at least 1"),
        ("--slo ttft", "argument --slo: 'ttft' must be one of ttft, tpot, itl, e2e, then = and seconds"),
        ("--slo speed=1", "argument --slo: 'speed=1' must be one of ttft, tpot, itl, e2e, then = and seconds"),
        ("--body [1]", "argument --body: '[1]' must be a JSON object"),
    ],
)
def test_wrong_options_are_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments.split()])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m serving bench: error: {message}"


def test_every_option_is_documented() -> None:
    documented = (ROOT / "docs" / "serving_bench.md").read_text()
    help = build_parser().format_help()
    for option in dataclasses.fields(BenchOptions):
        flag = "--" + option.name.replace("_", "-")
        assert flag in help
        assert f"| `{flag}" in documented


def test_options_are_parsed_as_declared() -> None:
    options = parse_args(["--input-tokens", "3:4", "--body", '{"top_k": 3}', "--slo", "itl=0.5", "--trace", "f"][:6])
    assert options.input_tokens == LengthRange(3, 4) and options.body == {"top_k": 3}
    assert [(slo.metric, slo.limit) for slo in options.slo] == [("itl", 0.5)]


def test_as_a_process_of_its_own() -> None:
    """It needs neither torch nor the server's libraries nor what draws, and takes as many connections as it may have."""
    program = (
        "import resource, sys; from serving.__main__ import main\n"
        "_, most = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))\n"
        "assert main(['bench', '--url', 'http://127.0.0.1:1']) == 1\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(most, 65536), most)\n"
        "print({'torch', 'fastapi', 'transformers', 'httpx', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("aiohttp", [], "measuring needs the package aiohttp"),
        ("matplotlib", ["--plot", "run.svg"], "--plot needs the package matplotlib"),
    ],
)
def test_what_is_not_installed_is_named_before_anything_is_sent(
    package: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from serving.__main__ import main\n"
        f"sys.exit(main(['bench', '--url', 'http://127.0.0.1:1', *{arguments}]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {message}\n  hint: pip install 'tilus[bench]'\n"
