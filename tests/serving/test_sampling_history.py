"""What the engine tells sampling about requests whose next token depends on the ones before."""

from __future__ import annotations

from serving_fakes import FakeRunner, FakeVocabulary, ManualClock, reference_answer

from serving.config import EngineConfig
from serving.core import Request, SamplingParams
from serving.engine import Engine


def test_the_engine_tells_the_history_where_it_is_needed() -> None:
    """Also in chunks: a history is that of the whole sequence. Without penalties nobody copies it."""
    runner, config = (
        FakeRunner(page_size=4),
        EngineConfig(num_pages=64, max_model_len=100, page_size=4, max_step_tokens=40),
    )
    engine = Engine(runner, FakeVocabulary(), config, ManualClock())
    prompt = tuple(range(1, 60))
    engine.add(Request("penalised", prompt, SamplingParams(max_tokens=9, ignore_eos=True, presence_penalty=1.0)))
    engine.add(Request("plain", prompt, SamplingParams(max_tokens=9, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    answer = reference_answer(prompt, 9, ignore_eos=True)
    found = {
        name: [i for b in runner.batches for i in b.sampled if i.request_id == name] for name in ("penalised", "plain")
    }
    assert [i.history for i in found["penalised"]] == [(*prompt, *answer[:draw]) for draw in range(9)]
    assert [i.history for i in found["plain"]] == [()] * 9
