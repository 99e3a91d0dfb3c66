"""The engine in a thread of its own, seen from asyncio.

The event loop puts commands into an inbox; the engine thread takes them between steps. Outputs of a step are handed over all at
once, when the next one has been launched and the engine waits for the device: both threads want Python's lock, and the device
must not wait for either. Every wait has an end: outputs, a deadline, the engine's failure, or the server's stop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from serving.core import Request, RequestOutput
from serving.engine import Engine
from serving.errors import EngineFailure, Overloaded, RequestError

_LOG = logging.getLogger("serving")
_GRACE = 60.0  # seconds by which a step may overrun a request's own deadline


class Generation:
    """The outputs of requests that belong together, as one asynchronous iterator; ends when all have finished.

    Who reads slowly gets more at once: outputs of a request that have not been read are put together, so that at most its answer
    is held. Raises EngineFailure when the engine stops, or has not finished within `timeout` seconds, though it gives requests up
    before. `close` gives up what has not finished and ends the iteration. All in the event loop's thread.
    """

    def __init__(self, ids: Iterable[str], timeout: float, abort: Callable[[Sequence[str]], None]) -> None:
        self._unfinished = set(ids)
        self._abort = abort
        hung = EngineFailure(f"the engine has not finished within {timeout:g} seconds")
        self._limit = asyncio.get_running_loop().call_later(timeout, self.put, hung)
        self._unread: dict[str, list[RequestOutput]] = {}
        self._failure: EngineFailure | None = None
        self._changed = asyncio.Event()

    def put(self, event: RequestOutput | EngineFailure) -> None:
        if isinstance(event, EngineFailure):
            self._failure = event
        else:
            self._unread.setdefault(event.request_id, []).append(event)
        self._changed.set()

    def close(self) -> None:
        self._limit.cancel()
        if self._unfinished:
            self._abort(sorted(self._unfinished))
            self._unfinished.clear()
            self._changed.set()

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        while self._unfinished:
            await self._changed.wait()
            self._changed.clear()
            while self._unread and self._unfinished:
                request_id = next(iter(self._unread))
                output = _together(self._unread.pop(request_id))
                if output.finish_reason is not None:
                    self._unfinished.discard(request_id)
                yield output
            if self._failure is not None and self._unfinished:
                raise self._failure


def _together(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """One output of what a request has gained in several steps."""
    if len(outputs) == 1:
        return outputs[0]
    text = "".join(output.text for output in outputs)
    tokens = tuple(token for output in outputs for token in output.tokens)
    return outputs[-1]._replace(text=text, tokens=tokens, prompt=outputs[0].prompt)


class AsyncEngine:
    """Start it, `submit` requests from the event loop, stop it. At most `max_waiting` requests wait for their turn.

    failure: why the engine no longer runs; None while it does.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine = engine
        self._max_live = engine.config.max_batch + max_waiting
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._generations: dict[str, Generation] = {}
        self._outputs: list[RequestOutput] = []  # not handed over yet
        self.failure: EngineFailure | None = None
        engine.before_wait = self._deliver
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """In the event loop, where the outputs go."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its current step, and fail what has not finished."""
        self._fail("the server is shutting down")
        await asyncio.to_thread(self._thread.join, _GRACE)

    def submit(self, requests: Sequence[Request]) -> Generation:
        """Queue requests, all or none. Raises RequestError for what can never be served, Overloaded, EngineFailure."""
        for request in requests:
            self.engine.validate(request)
        if len(requests) > self._max_live:
            found = f"{len(requests)} answers were asked for"
            raise RequestError(f"{found}, but at most {self._max_live} requests may run or wait at once", param="n")
        with self._wake:
            if self.failure is not None:
                raise EngineFailure(self.failure.message)
            live = len(self._generations)
            if live + len(requests) > self._max_live:
                raise Overloaded(
                    f"{live} requests are running or waiting and {len(requests)} more were asked for, but at most "
                    f"{self._max_live} may be; try again later"
                )
            generation = Generation([r.id for r in requests], self.engine.config.request_timeout + _GRACE, self._abort)
            for request in requests:
                self._generations[request.id] = generation
                self._inbox.append(lambda request=request: self.engine.add(request))
            self._wake.notify()
        return generation

    def _abort(self, ids: Sequence[str]) -> None:
        with self._wake:
            for request_id in ids:
                if self._generations.pop(request_id, None) is not None:
                    self._inbox.append(lambda request_id=request_id: self.engine.abort(request_id))
            self._wake.notify()

    def _run(self) -> None:
        try:
            while (commands := self._next_commands()) is not None:
                for command in commands:
                    command()
                if self.engine.has_work:
                    outputs = self.engine.step()  # in which those of before are handed over
                    self._outputs += outputs
                if not self.engine.has_launched:
                    self._deliver()
                if not self.engine.has_work:
                    self.engine.check()
        except Exception as error:
            _LOG.exception("the engine failed")
            self._fail(f"the engine failed: {type(error).__name__}: {error}")

    def _next_commands(self) -> list[Callable[[], None]] | None:
        """What arrived since the last step, waiting for something when there is no work; None means stop."""
        with self._wake:
            while not (self._inbox or self.engine.has_work or self.failure):
                self._wake.wait()
            if self.failure is not None:
                return None
            commands, self._inbox = self._inbox, []
            return commands

    def _deliver(self) -> None:
        outputs, self._outputs = self._outputs, []
        with self._wake:
            events = [
                (generation, output)
                for output in outputs
                if (generation := self._generations.get(output.request_id)) is not None
            ]
            for output in outputs:
                if output.finish_reason is not None:
                    self._generations.pop(output.request_id, None)
        if events:
            self._loop.call_soon_threadsafe(_put_all, events)

    def _fail(self, message: str) -> None:
        with self._wake:
            self.failure = self.failure or EngineFailure(message)
            events = [(generation, self.failure) for generation in set(self._generations.values())]
            self._generations.clear()
            self._wake.notify()
        self._loop.call_soon_threadsafe(_put_all, events)


def _put_all(events: Iterable[tuple[Generation, RequestOutput | EngineFailure]]) -> None:
    for generation, event in events:
        generation.put(event)
