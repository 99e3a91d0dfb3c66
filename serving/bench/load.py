"""Sending a workload: at its own times whatever the server does (open loop), or by users who wait for answers (closed loop)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from serving.bench.client import HttpClient
from serving.bench.exchange import Exchange
from serving.bench.prompts import PromptWriter
from serving.bench.record import Record
from serving.bench.target import Target
from serving.bench.workload import PlannedRequest

_LAG_PERIOD = 0.02  # seconds between two looks at whether the client itself keeps up


@dataclass(eq=False)
class Observations:
    """What a run saw. lags: by how many seconds the client woke up too late, time and again."""

    num_planned: int
    records: list[Record] = field(default_factory=list[Record])
    lags: list[float] = field(default_factory=list[float])
    interrupted: bool = False


class Load:
    """Sends a plan to a server and observes. users: how many in a closed loop; None is the open loop.

    show: told (done, total) after each request. Everything runs on the event loop's clock.
    """

    def __init__(
        self,
        http: HttpClient,
        target: Target,
        writer: PromptWriter,
        plan: Sequence[PlannedRequest],
        users: int | None,
        show: Callable[[int, int], None],
    ) -> None:
        self._http = http
        self._target = target
        self._writer = writer
        self._plan = plan
        self._users = users
        self._show = show
        self._seen = Observations(len(plan))
        self._start = 0.0

    async def run(self, stop: asyncio.Event) -> Observations:
        """Until all requests ended, or until `stop` is set: then those on their way are cancelled and the others not sent."""
        self._show(0, len(self._plan))
        self._start = self._loop_time()
        drive = asyncio.create_task(self._open() if self._users is None else self._closed(self._users))
        watch = asyncio.create_task(self._watch_lag())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((drive, stopped), return_when=asyncio.FIRST_COMPLETED)
            self._seen.interrupted = not drive.done()
        finally:
            for task in (drive, watch, stopped):
                task.cancel()
            results = await asyncio.gather(drive, watch, stopped, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        self._seen.records.sort(key=lambda record: record.index)
        return self._seen

    async def _open(self) -> None:
        """Each request at its arrival. One that is late is sent late, and known to be."""
        async with asyncio.TaskGroup() as tasks:
            for index, planned in enumerate(self._plan):
                body = self._body(index, planned)  # before the arrival: long prompts take milliseconds
                await asyncio.sleep(max(0.0, planned.arrival - self._clock()))
                tasks.create_task(self._exchange(index, planned, body))
                await asyncio.sleep(0)  # it goes out before the next one is written

    async def _closed(self, users: int) -> None:
        """Each user sends the next request as soon as the last one has ended."""
        requests = enumerate(self._plan)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(users, len(self._plan))):
                tasks.create_task(self._user(requests))

    async def _user(self, requests: Iterator[tuple[int, PlannedRequest]]) -> None:
        for index, planned in requests:
            body = self._body(index, planned)
            record = await self._exchange(index, replace(planned, arrival=self._clock()), body)
            if record.outcome == "cancelled":
                return

    async def _exchange(self, index: int, planned: PlannedRequest, body: bytes) -> Record:
        record = await Exchange(self._http, self._target, self._clock, index, planned).run(body)
        self._seen.records.append(record)
        self._show(len(self._seen.records), len(self._plan))
        return record

    def _body(self, index: int, planned: PlannedRequest) -> bytes:
        return self._target.body(self._writer.text(index, planned), planned.output_tokens)

    async def _watch_lag(self) -> None:
        """A client that wakes up late also sees answers late."""
        while True:
            due = self._clock() + _LAG_PERIOD
            await asyncio.sleep(_LAG_PERIOD)
            self._seen.lags.append(self._clock() - due)

    def _clock(self) -> float:
        return self._loop_time() - self._start

    @staticmethod
    def _loop_time() -> float:
        return asyncio.get_running_loop().time()
