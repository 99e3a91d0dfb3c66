"""Every wait has an end: a hung engine, a failing one, and one that stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from serving_fakes import FakeRunner, FakeVocabulary, ManualClock, reference_answer

from serving.async_engine import AsyncEngine, Generation
from serving.config import EngineConfig
from serving.core import Batch, Request, RequestOutput, SampledToken, SamplingParams, StepOutput
from serving.engine import Engine
from serving.errors import EngineFailure, Overloaded, RequestError


class GatedRunner(FakeRunner):
    def __init__(self) -> None:
        super().__init__(page_size=4)
        self.gate = threading.Event()

    def execute(self, batch: Batch) -> StepOutput:
        self.gate.wait(10)
        return super().execute(batch)


def make(max_waiting: int = 4, overlap: bool = False) -> tuple[AsyncEngine, GatedRunner]:
    runner = GatedRunner()
    config = EngineConfig(num_pages=16, max_model_len=64, page_size=4, max_batch=2, max_step_tokens=8, overlap=overlap)
    return AsyncEngine(Engine(runner, FakeVocabulary(), config, ManualClock()), max_waiting), runner


def request(name: str, max_tokens: int = 5) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))


async def tokens_of(generation: Generation) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    async for output in generation:
        tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
    return tokens


@pytest.mark.parametrize("overlap", [False, True])
def test_answers_arrive_and_the_thread_ends(overlap: bool) -> None:
    async def scenario() -> None:
        engine, runner = make(overlap=overlap)
        runner.gate.set()
        engine.start()
        expected = reference_answer([1, 2, 3], 5, ignore_eos=True)
        first, second = engine.submit([request("a"), request("b")]), engine.submit([request("c")])
        assert await tokens_of(first) == {"a": expected, "b": expected}
        assert await tokens_of(second) == {"c": expected}
        await engine.stop()
        assert not engine._thread.is_alive()
        engine.engine.check()

    asyncio.run(scenario())


def test_who_reads_slowly_gets_more_at_once_and_nothing_less() -> None:
    """All is done before the first look: one output for each request, with all that it gained."""

    async def scenario() -> None:
        engine, runner = make()
        runner.gate.set()
        engine.start()
        generation = engine.submit([request("a", 20), request("b", 7)])
        async with asyncio.timeout(10):
            while sum(outputs[-1].finish_reason is not None for outputs in generation._unread.values()) < 2:
                await asyncio.sleep(0.005)
        outputs = {output.request_id: output async for output in generation}
        for name, size in (("a", 20), ("b", 7)):
            expected = reference_answer([1, 2, 3], size, ignore_eos=True)
            assert [token.token_id for token in outputs[name].tokens] == expected
            assert outputs[name].text == FakeVocabulary().decode(expected) and outputs[name].finish_reason == "length"
        await engine.stop()

    asyncio.run(scenario())


def test_outputs_come_while_the_next_step_runs() -> None:
    """And no later: that step may take long."""

    class SlowToCome(FakeRunner):
        def __init__(self) -> None:
            super().__init__(page_size=4)
            self.allowed = threading.Semaphore(0)

        def launch(self, batch: Batch) -> Callable[[], StepOutput]:
            output = self.execute(batch)

            def wait() -> StepOutput:
                assert self.allowed.acquire(timeout=10)
                return output

            return wait

    async def scenario() -> None:
        runner = SlowToCome()
        config = EngineConfig(num_pages=16, max_model_len=64, page_size=4, max_batch=2, max_step_tokens=8, overlap=True)
        engine = AsyncEngine(Engine(runner, FakeVocabulary(), config, ManualClock()), 4)
        engine.start()
        outputs = aiter(engine.submit([request("a", 3)]))
        for token in reference_answer([1, 2, 3], 3, ignore_eos=True):
            runner.allowed.release()
            output = await asyncio.wait_for(anext(outputs), 10)
            assert [found.token_id for found in output.tokens] == [token]
        await engine.stop()

    asyncio.run(scenario())


def test_what_is_put_together_keeps_the_prompt_of_the_first_output() -> None:
    async def main() -> list[RequestOutput]:
        generation = Generation(["a"], 5.0, lambda ids: None)
        outputs = (
            RequestOutput("a", "x", (SampledToken(1),), prompt=(SampledToken(7), SampledToken(8))),
            RequestOutput("a", "y", (SampledToken(2),), "length"),
        )
        for output in outputs:
            generation.put(output)
        return [output async for output in generation]

    (whole,) = asyncio.run(main())
    assert (whole.text, whole.tokens, whole.prompt) == ("xy", ((1, None), (2, None)), ((7, None), (8, None)))


def test_a_hung_engine_is_noticed() -> None:
    async def scenario() -> None:
        aborted: list[str] = []
        generation = Generation(["a"], 0.05, aborted.extend)
        with pytest.raises(EngineFailure, match=r"the engine has not finished within 0\.05 seconds"):
            await tokens_of(generation)
        generation.close()
        assert aborted == ["a"]

    asyncio.run(scenario())


def test_stopping_tells_those_who_wait_and_those_who_come() -> None:
    async def scenario() -> None:
        engine, runner = make()
        engine.start()
        waiting = engine.submit([request("a")])
        stopping = asyncio.create_task(engine.stop())
        with pytest.raises(EngineFailure, match="the server is shutting down"):
            await tokens_of(waiting)
        runner.gate.set()
        await stopping
        assert not engine._thread.is_alive()
        with pytest.raises(EngineFailure, match="the server is shutting down"):
            engine.submit([request("b")])

    asyncio.run(scenario())


def test_all_or_none_are_queued() -> None:
    async def scenario() -> None:
        engine, _ = make(max_waiting=1)
        with pytest.raises(RequestError, match="but token ids go from 0 to 63"):
            engine.submit([request("a"), Request("b", (99,), SamplingParams())])
        engine.submit([request("c"), request("d")])
        timers = len(asyncio.get_running_loop()._scheduled)  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(
            Overloaded, match="2 requests are running or waiting and 2 more were asked for, but at most 3"
        ):
            engine.submit([request("e"), request("f")])
        assert len(asyncio.get_running_loop()._scheduled) == timers  # pyright: ignore[reportAttributeAccessIssue]
        assert set(engine._generations) == {"c", "d"} and len(engine._inbox) == 2

    asyncio.run(scenario())


def test_closing_gives_up_what_has_not_finished() -> None:
    async def scenario() -> None:
        engine, runner = make()
        engine.start()
        leaves, stays = engine.submit([request("a", 40)]), engine.submit([request("b")])
        leaves.close()
        assert await tokens_of(leaves) == {}
        runner.gate.set()
        assert await tokens_of(stays) == {"b": reference_answer([1, 2, 3], 5, ignore_eos=True)}
        await engine.stop()
        assert engine.engine.pages.num_free == 16

    asyncio.run(scenario())
