"""The server's engine on a GPU, offline and with cached prompts: `python benchmarks/serving_throughput.py [--out FILE]`.

Random weights in the shape of --config (Qwen3-0.6B by default), no HTTP. Every case is of this run:

- offline: --requests requests at once, prompts and answers of random lengths (uniform in 100 to 1024), for every --weights
  (`fp16:fp16` are weights of 16 bits and a cache of 16 bits); with --peer, transformers' own continuous batching (bfloat16) on
  the same requests beside them.
- second turn: a chat whose first --prefix tokens an earlier turn has left in the cache, and one that has nothing there.

Output, as JSON:
    device, torch, transformers, python, model
    rows    list of {case, metric, value, unit, baseline, limit}: baseline is the other side of the comparison, limit what was
            wanted at least (of times, at most); null where there is none
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from serving.build import build_engine
from serving.config import ServerConfig
from serving.core import Request, SamplingParams
from serving.dummy import open_dummy
from serving.engine import Engine
from serving.execution import choose_execution
from serving.kernels import default_kernels
from serving.quantize import weight_type
from serving.warm_up import warm_up

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "attention_bias": False, "hidden_act": "silu",
}  # fmt: skip
SHORTEST, LONGEST = 100, 1024
WANTED_TOKENS_A_SECOND, WANTED_OVER_PEER, WANTED_SECOND_TURN = 18_000, 4.0, 5.0
TOKENS = 256  # of the dummy's vocabulary

Row = dict[str, Any]


def row(
    case: str, metric: str, value: float, unit: str, baseline: float | None = None, limit: float | None = None
) -> Row:
    found = {
        "case": case,
        "metric": metric,
        "value": round(value, 4),
        "unit": unit,
        "baseline": baseline,
        "limit": limit,
    }
    print(f"{case:32} {metric:28} {value:12.2f} {unit:10} baseline {baseline}, wanted {limit}", flush=True)
    return found


def workload(count: int) -> list[tuple[list[int], int]]:
    """Prompts, and the tokens of their answers."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST + 1, (count, 2))
    return [([int(t) for t in rng.integers(0, TOKENS, prompt)], int(answer)) for prompt, answer in lengths]


def build(options: argparse.Namespace, config: Path, weights: str, kv: str) -> Engine:
    server = ServerConfig(
        model=str(config), device=options.device, dummy=True, weight_dtype=weights, kv_dtype=kv,
        max_batch=options.max_batch, max_step_tokens=options.max_step_tokens, max_model_len=8192,
    )  # fmt: skip
    execution = choose_execution(options.device)
    checkpoint = open_dummy(config, weight_type(weights))
    engine = build_engine(server, config, checkpoint, default_kernels(), execution)
    warm_up(engine, lambda done, total: None)
    gc.freeze()  # as the server does
    return engine


def offline(engine: Engine, requests: list[tuple[list[int], int]]) -> float:
    """Output tokens a second."""
    start, tokens = time.perf_counter(), 0
    for index, (prompt, answer) in enumerate(requests):
        params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
        engine.add(Request(f"offline {index}", tuple(prompt), params))
    while engine.has_work:
        tokens += sum(len(output.tokens) for output in engine.step())
    return tokens / (time.perf_counter() - start)


def peer(config: dict[str, Any], requests: list[tuple[list[int], int]]) -> float:
    """Output tokens a second of transformers' continuous batching, after its warm-up."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings = AutoConfig.for_model(**{name: value for name, value in config.items() if name != "architectures"})
    model = (
        AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16, attn_implementation="sdpa").to("cuda").eval()
    )
    generation = GenerationConfig(max_new_tokens=LONGEST, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(generation_config=generation) as manager:
        for name, some in (("warm-up", [(prompt, 8) for prompt, _ in requests[:32]]), ("measured", requests)):
            start = time.perf_counter()
            for index, (prompt, answer) in enumerate(some):
                manager.add_request(list(prompt), request_id=f"{name} {index}", max_new_tokens=answer, eos_token_id=-1)
            tokens, finished = 0, 0
            while finished < len(some):
                result = manager.get_result(timeout=60)
                if result is None:
                    raise SystemExit(f"transformers gave nothing for a minute: {finished} of {len(some)} finished")
                if result.is_finished():
                    finished += 1
                    tokens += len(result.generated_tokens)
            seconds = time.perf_counter() - start
    expected = sum(answer for _, answer in requests)
    if tokens != expected:
        raise SystemExit(f"transformers generated {tokens} tokens, expected {expected}")
    return tokens / seconds


def second_turn(engine: Engine, prefix: int, rounds: int = 5) -> tuple[float, float]:
    """Seconds to the first token of a prompt that begins with `prefix` tokens in the cache, and of one that does not."""
    rng, times = np.random.default_rng(1), ([], [])
    for index in range(rounds):
        first = tuple(int(t) for t in rng.integers(0, TOKENS, prefix))
        for turn, prompt in enumerate((first, (*first, *range(32)))):
            start = time.perf_counter()
            params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
            engine.add(Request(f"turn {index} {turn}", prompt, params))
            while not any(output.tokens for output in engine.step()):
                pass
            times[turn].append(time.perf_counter() - start)
            while engine.has_work:
                engine.step()
    return statistics.median(times[1][1:]), statistics.median(times[0][1:])


def measure(options: argparse.Namespace, settings: dict[str, Any], config: Path) -> list[Row]:
    requests, rows = workload(options.requests), []
    wanted = WANTED_TOKENS_A_SECOND if options.config is None and options.requests == 256 else None
    for weights, kv in options.weights:
        engine = build(options, config, weights, kv)
        rate = offline(engine, requests)
        case = f"offline {weights} weights, {kv} cache"
        rows.append(row(case, "output_tokens_per_second", rate, "tokens/s", None, wanted))
        again, first = second_turn(engine, options.prefix)
        rows.append(row(case, "second_turn_ttft", 1e3 * again, "ms", 1e3 * first, 1e3 * first / WANTED_SECOND_TURN))
        del engine
        torch.cuda.empty_cache()
        if options.peer and (weights, kv) == ("fp16", "fp16"):
            theirs = peer(settings, requests)
            rows.append(row("offline transformers", "output_tokens_per_second", theirs, "tokens/s"))
            rows.append(row(case, "times_transformers", rate / theirs, "ratio", 1.0, WANTED_OVER_PEER))
    return rows


def combinations(text: str) -> list[tuple[str, str]]:
    return [(weights, kv) for weights, _, kv in (part.partition(":") for part in text.split(","))]


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a config.json; default: that of Qwen3-0.6B")
    parser.add_argument("--device", default="cuda", help="where the engine runs (default cuda)")
    parser.add_argument("--weights", type=combinations, default=combinations("fp16:fp16,int8:fp16,int4:fp8"))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--max-step-tokens", type=int, default=2048)
    parser.add_argument("--prefix", type=int, default=4096, help="tokens of a chat's first turn (default 4096)")
    parser.add_argument("--peer", action="store_true", help="transformers' continuous batching in the same run")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    import transformers

    settings: dict[str, Any] = QWEN3_0_6B if options.config is None else json.loads(options.config.read_text())
    with TemporaryDirectory() as directory:
        config = Path(directory) / "config.json"
        config.write_text(json.dumps(settings))
        rows = measure(options, settings, config)
    report = {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "model": options.config.stem if options.config else "Qwen3-0.6B", "rows": rows,
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
