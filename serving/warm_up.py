"""Running an engine before the first client comes, so that its model and kernels are known to work."""

from __future__ import annotations

from collections.abc import Callable

from serving.core import Request, SamplingParams
from serving.engine import Engine

_QUESTION = 40  # tokens of a short question in a chat's template
_MEASURED_STEPS = 16  # answers' tokens


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


def _request(index: int, prompt: int, answer: int, token: int = 0) -> Request:
    """token: prompts of another one have nothing in the cache."""
    return Request(
        f"warm-up {index}", (token,) * prompt, SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    )


def measure_steps(engine: Engine) -> None:
    """Teach the engine's cost model what steps take, once kernels are compiled: prompts of many lengths beside more and more
    answers.
    """
    longest, chunk = engine.max_model_len - _MEASURED_STEPS, engine.config.max_step_tokens
    for round_, width in enumerate((1, 4, 16, 64, 256)):
        for index in range(min(width, engine.config.max_batch)):
            prompt = max(1, min(longest, 4 * chunk // (index + 1)))
            engine.add(_request(index, prompt, min(_MEASURED_STEPS, engine.max_model_len - prompt), token=round_ + 2))
        while engine.has_work:
            engine.step()
    engine.cost.fit()
    engine.cost.save()
    engine.scheduler.forget_past()
