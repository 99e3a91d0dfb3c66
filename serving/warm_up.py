"""Running an engine before the first client comes, so that its model and kernels are known to work."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from serving.core import Request, SamplingParams
from serving.engine import Engine

_QUESTION = 40  # tokens of a short question in a chat's template
_LEAST_MEASURED = 16  # tokens of a prompt
_EACH_NUMBER = 2  # steps with about so many answers
_TOKENS = 60  # of the vocabulary, which every one has


def warm_up(engine: Engine, progress: Callable[[int, int], None]) -> None:
    """Give one short answer to a question. progress is called with (steps done, steps in all).

    Raises what the kernels raise.
    """
    prompt = max(1, min(_QUESTION, engine.config.max_step_tokens, engine.max_model_len - 1))
    total, done = min(2, engine.max_model_len - prompt), 0
    engine.add(_request(0, prompt, total))
    progress(done, total)
    while engine.has_work:
        engine.step()
        done = min(done + 1, total)  # with overlap the last token takes another step
        progress(done, total)
    engine.check()
    engine.cost.forget()
    engine.scheduler.forget_past()


def _request(index: int, prompt: int, answer: int) -> Request:
    """Its prompt begins as no other one does, so that nothing of it is in the cache."""
    tokens = (*divmod(index, _TOKENS),) * -(-prompt // 2)
    params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    return Request(f"warm-up {index}", tokens[:prompt], params)


def measure_steps(engine: Engine) -> None:
    """Teach the engine's cost model what steps take, once kernels are compiled: fewer and fewer answers, behind short prompts and
    long ones, then prompts of many lengths, one or a few in a step, beside some answers.
    """
    chunk, number, most = engine.config.max_step_tokens, itertools.count(), engine.config.max_batch
    sizes = [int(_LEAST_MEASURED * 1.5**power) for power in range(30) if _LEAST_MEASURED * 1.5**power < chunk] + [chunk]
    shapes = [(size, parts) for size in sizes for parts in (1, 4) if size >= parts]

    def add(prompt: int, answer: int) -> None:
        engine.add(_request(next(number), max(1, min(engine.max_model_len - answer, prompt)), answer))

    def end() -> None:
        while engine.has_work:
            engine.step()

    for prompt in (_LEAST_MEASURED, chunk // 2):
        for index in range(most):  # steps until all have begun, and some of each number
            add(prompt, min(most * prompt // chunk + 1 + _EACH_NUMBER * (index // 4 + 1), engine.max_model_len - 1))
        end()
    for width in sorted({min(width, most - 1) for width in (1, 4, 16, 64, 256)}):
        for index in range(width):
            add(4 * chunk // (index + 1), min(2 * len(shapes), engine.max_model_len - 1))
        while engine.scheduler.waiting or any(seq.num_pending > 1 for seq in engine.scheduler.running):
            engine.step()
        for size, parts in shapes:
            for _ in range(parts):
                add(size // parts, 1)
            engine.step()
            engine.step()
        end()
    engine.cost.fit()
    engine.cost.save()
    engine.scheduler.forget_past()
