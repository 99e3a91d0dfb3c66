"""The server's engine on the CPU: `python benchmarks/cpu_serving.py --out FILE [--peer PYTHON]`.

The default model (SmolLM2-135M, Q4_1) decodes for one and for eight requests after prompts of 128 tokens, and reads a prompt of
512. Times are those of whole engine steps: scheduling, model, sampling. With --peer, llama.cpp runs the same file on as many
threads in the same run, through the package llama-cpp-python of that interpreter; rounds alternate.

Output, as JSON:
    processor, compiler, threads, lanes, rounds     of this machine and run
    cases       list of {case, unit, ours, peer, ratio}: medians; peer and ratio are null without --peer
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import tilus
from serving.build import build_engine
from serving.config import ServerConfig
from serving.core import Request, SamplingParams
from serving.engine import Engine
from serving.execution import Execution
from serving.kernels import default_kernels
from serving.loader import default_model, open_checkpoint
from tilus.runtime.cpu import features, threads, toolchain

PROMPT, LONG_PROMPT, ANSWER, STREAMS, ROUNDS = 128, 512, 65, 8, 3
CASES = ("decode, 1 request", "decode, 8 requests", "prefill, 512 tokens")

# Runs in the peer's interpreter: tokens a second of one request's decoding, and of reading a prompt.
PEER = """
import json, statistics, sys, time
from llama_cpp import Llama
path, threads, prompt, decoded = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
model = Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
def timed(tokens):
    start = time.perf_counter()
    model.eval(tokens)
    return time.perf_counter() - start
timed(prompt)
model.reset(); model.eval(prompt[:128])
decode = statistics.median(timed([token]) for token in prompt[:decoded])
model.reset()
print(json.dumps([1 / decode, len(prompt) / timed(prompt)]))
"""

_number = itertools.count()


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(100, 40000, count))


def step_seconds(engine: Engine, requests: int, prompt: int, answer: int) -> list[float]:
    """The time of every step of some requests that come at once."""
    params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    for seed in range(requests):
        engine.add(Request(f"request {next(_number)}", tokens(prompt, seed), params))
    times: list[float] = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return times


def rates(engine: Engine) -> list[float]:
    """Tokens a second in each of CASES."""
    one = step_seconds(engine, 1, PROMPT, ANSWER)[1:]
    eight = step_seconds(engine, STREAMS, PROMPT, ANSWER)[-ANSWER // 2 :]
    prefill = step_seconds(engine, 1, LONG_PROMPT, 1)
    return [1 / statistics.median(one), STREAMS / statistics.median(eight), LONG_PROMPT / sum(prefill)]


def peer_rates(python: Path, model: Path, num_threads: int) -> list[float]:
    prompt = json.dumps(tokens(LONG_PROMPT, 0))
    command = [str(python), "-c", PEER, str(model), str(num_threads), prompt, str(ANSWER - 1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(case: str, ours: list[float], peer: list[float]) -> dict[str, Any]:
    mine, other = statistics.median(ours), statistics.median(peer) if peer else None
    return {
        "case": case, "unit": "tokens/s", "ours": round(mine, 1), "peer": other and round(other, 1),
        "ratio": other and round(mine / other, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="The server's engine on the CPU.")
    parser.add_argument("--out", type=Path, required=True, help="write the JSON here")
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="an interpreter that has llama-cpp-python")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path, num_threads = default_model(), threads.num_threads()
    config = ServerConfig(max_batch=STREAMS, num_pages=600)
    checkpoint = open_checkpoint(path, tilus.int8)
    engine = build_engine(config, path, checkpoint, default_kernels(), Execution(torch.device("cpu"), "cpu"))
    rates(engine)  # compiles
    ours: list[list[float]] = []
    peer: list[list[float]] = []
    with click.progressbar(range(ROUNDS), label="rounds") as bar:
        for _ in bar:
            ours.append(rates(engine))
            if arguments.peer is not None:
                single, prefill = peer_rates(arguments.peer, path, num_threads)
                peer.append([single, float("nan"), prefill])
    host = dataclasses.asdict(features.host_target())
    cases = []
    for index, case in enumerate(CASES):
        theirs = [] if index == 1 else [rate[index] for rate in peer]
        cases.append(row(case, [rate[index] for rate in ours], theirs))
    result = {
        "processor": host["arch"], "lanes": host["lanes"], "compiler": toolchain.find_compiler().version,
        "threads": num_threads, "rounds": ROUNDS, "cases": cases,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for case in cases:
        print(case)


if __name__ == "__main__":
    main()
