"""Running every shape that will occur before the first client comes, so that kernels are compiled and known to work."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from serving.core import Request, SamplingParams
from serving.engine import Engine

_QUESTION = 40  # tokens of a short question in a chat's template
_LEAST_MEASURED = 16  # tokens of a prompt
_TOKENS = 60  # of the vocabulary, which every one has


def warm_up(engine: Engine, thoroughly: bool, progress: Callable[[int, int], None], widest: int = 8) -> None:
    """Answer a few requests. thoroughly: batches of `widest`, ..., 2, 1 decoding sequences, then a chunk of a prompt that is as
    large as they come; else one short answer to a question. progress is called with (steps done, steps in all).

    Raises what the kernels raise.
    """
    width = min(widest, engine.config.max_batch, engine.max_model_len - 1)
    chunk = min(engine.config.max_step_tokens, engine.max_model_len - 1)
    if thoroughly:
        total = width + 1
        # The first step has all of them; one finishes in each step.
        rounds = [[_request(index, 1, index + 1) for index in range(width)], [_request(width, chunk, 1)]]
    else:
        total = 2
        question = max(1, min(_QUESTION, chunk - 1))
        rounds = [[_request(0, question, min(2, engine.max_model_len - question))]]
    done = 0
    progress(done, total)
    for requests in rounds:
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
            done = min(done + 1, total)  # a small cache makes requests wait, which takes more steps
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
    """Teach the engine's cost model what steps take, once kernels are compiled: prompts of many lengths, one or a few in a step,
    beside more and more answers.
    """
    chunk, number = engine.config.max_step_tokens, itertools.count()
    sizes = [int(_LEAST_MEASURED * 1.5**power) for power in range(30) if _LEAST_MEASURED * 1.5**power < chunk] + [chunk]
    shapes = [(size, parts) for size in sizes for parts in (1, 4) if size >= parts]

    def add(prompt: int, answer: int) -> None:
        longest = engine.max_model_len - answer
        engine.add(_request(next(number), max(1, min(longest, prompt)), answer))

    for width in sorted({min(width, engine.config.max_batch - 1) for width in (1, 4, 16, 64, 256)}):
        for index in range(width):
            add(4 * chunk // (index + 1), min(2 * len(shapes), engine.max_model_len - 1))
        while engine.scheduler.waiting or any(seq.num_pending > 1 for seq in engine.scheduler.running):
            engine.step()
        for size, parts in shapes:
            for _ in range(parts):
                add(size // parts, 1)
            engine.step()
            engine.step()
        while engine.has_work:
            engine.step()
    engine.cost.fit()
    engine.cost.save()
    engine.scheduler.forget_past()
