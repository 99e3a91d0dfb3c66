"""One request and its streamed answer, measured."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable

from aiohttp import ClientResponse

from serving.bench.client import ConnectionFailed, HttpClient
from serving.bench.events import DONE, EventReader, StreamEvent, message_of
from serving.bench.record import Failure, Outcome, Record
from serving.bench.target import Target
from serving.bench.workload import PlannedRequest

_WITHOUT_RETRY_AFTER = 1.0  # seconds to wait after a 429 that does not say how long


class _Failed(Exception):
    """The exchange cannot end well."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(kind, message)


class Exchange:
    """A request from its arrival to its end. What is known of it is kept all the time, whenever it ends.

    clock: gives the seconds since the run's start. arrival: on that clock.
    """

    def __init__(
        self, http: HttpClient, target: Target, clock: Callable[[], float], index: int, planned: PlannedRequest
    ) -> None:
        self._http = http
        self._target = target
        self._clock = clock
        self._index = index
        self._planned = planned
        self._sent: float | None = None
        self._token_times: list[float] = []
        self._end: float | None = None
        self._retries = 0
        self._input_tokens: int | None = None
        self._output_tokens: int | None = None

    async def run(self, body: bytes) -> Record:
        """Send and read to the end. Being cancelled is an outcome, not an exception."""
        try:
            async with asyncio.timeout(self._target.timeout):
                await self._attempt(body)
        except asyncio.CancelledError:
            return self._record("cancelled", None)
        except TimeoutError:
            return self._failed(Failure("timeout", f"not finished after {self._target.timeout:g} s"))
        except _Failed as failed:
            return self._failed(failed.failure)
        except ConnectionFailed as error:
            return self._failed(Failure("cut off" if self._token_times else "connection", str(error)))
        return self._record("finished", None)

    def _failed(self, failure: Failure) -> Record:
        if self._end is not None:  # the answer was complete, whatever happened to the connection then
            return self._record("finished", None)
        return self._record("failed", failure)

    def _record(self, outcome: Outcome, failure: Failure | None) -> Record:
        now = self._clock()
        return Record(
            index=self._index,
            arrival=self._planned.arrival,
            sent=now if self._sent is None else self._sent,
            token_times=tuple(self._token_times),
            end=now if self._end is None else self._end,
            outcome=outcome,
            failure=failure,
            retries=self._retries,
            asked_input_tokens=self._planned.input_tokens,
            asked_output_tokens=self._planned.output_tokens,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
        )

    async def _attempt(self, body: bytes) -> None:
        """Send until the answer is another one than 429, or until retries are used up."""
        while True:
            if self._sent is None:
                self._sent = self._clock()
            async with self._http.request("POST", self._target.path, body) as reply:
                if reply.status == 200:
                    await self._read(reply)
                    return
                if reply.status != 429 or self._retries == self._target.retries:
                    raise _Failed(f"http {reply.status}", message_of(await reply.text(errors="replace")))
                pause = _retry_after(reply)
            self._retries += 1
            await asyncio.sleep(pause)

    async def _read(self, reply: ClientResponse) -> None:
        """Read to the very end, also after the last event: only then can the connection be used again."""
        kind = reply.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise _Failed("no stream", f"the answer's content-type is {kind!r}, but must be text/event-stream")
        reader = EventReader()
        async for chunk in reply.content.iter_any():
            now = self._clock()
            try:
                for data in reader.feed(chunk):
                    self._take(data, now)
            except ValueError as error:
                raise _Failed("malformed event", str(error)) from error
        if self._end is None:
            raise _Failed("cut off", f"the stream ended after {len(self._token_times)} chunks without {DONE}")

    def _take(self, data: str, now: float) -> None:
        if data == DONE:
            self._end = now
            return
        event = StreamEvent.parse(data)
        if event.error is not None:
            raise _Failed("error in the stream", event.error)
        # An answer of one token that shows nothing is known by its end only.
        if event.is_token or (event.is_final and not self._token_times):
            self._token_times.append(now)
        if event.output_tokens is not None:
            self._input_tokens, self._output_tokens = event.input_tokens, event.output_tokens


def _retry_after(reply: ClientResponse) -> float:
    """Seconds to wait, from the header Retry-After, which has seconds or a date."""
    value = reply.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return _WITHOUT_RETRY_AFTER
