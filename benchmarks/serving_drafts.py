"""What drafts from the prompt are worth: `python benchmarks/serving_drafts.py [--device cpu] [--out FILE]`.

SmolLM2-135M-Instruct repeats and summarises texts, greedily, for one request and for several at once, without drafts and with as
many as --drafts says, in turns. Each case is run once before it is timed, and then --repeats times, of which the median counts;
nothing is found in the cache. Where texts are summarised, little can be guessed.

Output, as JSON: device, torch, model, and rows, a list of {case, metric, value, unit, baseline: the value without drafts,
limit: null}. Answers may differ from those without drafts, as other numbers of rows are summed in other orders.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from serving.build import build_engine, open_model
from serving.config import ServerConfig
from serving.core import Batch, Request, SamplingParams
from serving.engine import Engine
from serving.execution import choose_execution
from serving.kernels import default_kernels
from serving.observer import Observer

TEXTS = (
    "The keeper lit the lamp every evening and watched the ships. One night it went out, and he rang the bell until morning.",
    "A reservoir stores water for dry months. Rain fills it, and gates are opened a little every day to water the fields.",
    "The committee met on Tuesday. One plan had a garden, one a reading hall. The committee chose the plan with the garden.",
    "Bread needs flour, water, salt and time. The dough rests for an hour, is folded, and rests for another hour in a bowl.",
)
TASKS = {"repeats a text": "Repeat the following text word for word:", "summarises": "Summarise in one sentence:"}
MAX_TOKENS = 96
COUNTS = (1, 4, 16)  # requests, of which those with the same text have the same answers


class Counted(Observer):
    num_drafts = 0

    def scheduled(self, batch: Batch, now: float) -> None:
        self.num_drafts += sum(item.num_drafts for item in batch.items)


@dataclass(frozen=True)
class Run:
    answers: dict[str, list[int]]
    seconds: float
    outputs: int  # steps, summed over requests
    drafts: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers.values()))


def run(engine: Engine, prompts: list[tuple[int, ...]]) -> Run:
    counted, start, outputs = Counted(), time.perf_counter(), 0
    engine.observers[:] = [counted]
    answers: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), prompt, SamplingParams(temperature=0, max_tokens=MAX_TOKENS)))
    while engine.has_work:
        for output in engine.step():
            outputs += bool(output.tokens)
            answers.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
    return Run(answers, time.perf_counter() - start, outputs, counted.num_drafts)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    config = ServerConfig(device=options.device, no_prefix_cache=True, max_model_len=512, max_batch=max(COUNTS))
    path, checkpoint = open_model(config)
    execution = choose_execution(options.device)
    engines = {
        drafts: build_engine(replace(config, drafts=drafts), path, checkpoint, default_kernels(), execution)
        for drafts in (0, options.drafts)
    }
    rows: list[dict[str, Any]] = []
    for task, words in TASKS.items():
        chats = [[{"role": "user", "content": f"{words}\n\n{text}"}] for text in TEXTS]
        prompts = [checkpoint.tokenizer.encode_chat(messages) for messages in chats]
        for count in COUNTS:
            asked = [prompts[index % len(prompts)] for index in range(count)]
            turns = [
                {drafts: run(engine, asked) for drafts, engine in engines.items()} for _ in range(1 + options.repeats)
            ]
            without, with_drafts = (
                sorted((turn[drafts] for turn in turns[1:]), key=lambda found: found.seconds)[options.repeats // 2]
                for drafts in engines
            )
            rows += rows_of(f"{task}, requests: {count}, drafts: {options.drafts}", with_drafts, without)
    return rows


def rows_of(case: str, with_drafts: Run, without: Run) -> list[dict[str, Any]]:
    equal = sum(with_drafts.answers[name] == answer for name, answer in without.answers.items())
    values = (
        ("tokens a second", with_drafts.tokens / with_drafts.seconds, without.tokens / without.seconds),
        ("tokens a step", with_drafts.tokens / with_drafts.outputs, without.tokens / without.outputs),
        ("drafts that are right", (with_drafts.tokens - with_drafts.outputs) / max(1, with_drafts.drafts), None),
        ("answers that are equal", equal / len(without.answers), None),
    )
    names = ("case", "metric", "value", "unit", "baseline", "limit")
    return [
        dict(zip(names, (case, metric, round(value, 3), "", baseline and round(baseline, 3), None)))
        for metric, value, baseline in values
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where the model runs (default cuda)")
    parser.add_argument("--drafts", type=int, default=4, help="guesses of a step (default 4)")
    parser.add_argument("--repeats", type=int, default=15, help="runs of a case that are timed (default 15)")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    for row in (rows := measure(options)):
        print(*row.values(), sep="  ", flush=True)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    report = {"device": device, "torch": torch.__version__, "model": "SmolLM2-135M-Instruct", "rows": rows}
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
