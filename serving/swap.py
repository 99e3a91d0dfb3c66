"""Copies of pages between the cache and the host's memory. A page is contiguous, so that each takes one copy.

On a GPU they run on a stream of their own, beside the steps: a step waits only for copies of pages that it reads or writes, and
copies wait for steps that were launched before them. Copies follow each other in order, so a page of the host that is given on is
read before it is written again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from serving.core import Batch, PageCopy
from serving.kv_pool import KvPool

_MEASURED = 16  # pages
_ROUNDS = 3


class PageSwapper:
    """Owns the host's pages: `memory`, uint8 [pages, bytes of a page], pinned for a GPU."""

    def __init__(self, pool: KvPool, num_host_pages: int) -> None:
        self._pages = pool.memory
        on_gpu = self._pages.device.type == "cuda"
        self.memory = torch.empty((num_host_pages, pool.shape.nbytes), dtype=torch.uint8, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(self._pages.device) if on_gpu else None
        self._on_their_way: dict[int, torch.cuda.Event] = {}  # by page of the cache

    def begin(self, batch: Batch) -> None:
        """Start a batch's copies, and let its step, which is launched next on the current stream, wait for those of its pages."""
        if batch.copies:
            self._start(batch.copies)
        if not self._on_their_way:
            return
        stream = torch.cuda.current_stream(self._pages.device)
        for page in {page for item in batch.items for page in item.pages} & self._on_their_way.keys():
            stream.wait_event(self._on_their_way.pop(page))
        self._on_their_way = {page: event for page, event in self._on_their_way.items() if not event.query()}

    def seconds_a_page(self) -> float:
        """What a copy takes, measured: the median over there and back, of pages whose contents stay as they are."""
        count = min(_MEASURED, len(self.memory), len(self._pages))
        times = sorted(self._timed(count, to_host) for _ in range(_ROUNDS) for to_host in (True, False))
        return times[len(times) // 2] / count if count else 0.0

    def _timed(self, count: int, to_host: bool) -> float:
        start = time.perf_counter()
        self._start([PageCopy(index, index, to_host) for index in range(count)])
        if self._stream is not None:
            self._stream.synchronize()
        return time.perf_counter() - start

    def _copy(self, copy: PageCopy) -> None:
        page, host_page = self._pages[copy.page], self.memory[copy.host_page]
        source, target = (page, host_page) if copy.to_host else (host_page, page)
        target.copy_(source, non_blocking=True)

    def _start(self, copies: Sequence[PageCopy]) -> None:
        if self._stream is None:
            for copy in copies:
                self._copy(copy)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._pages.device))
        with torch.cuda.stream(self._stream):
            for copy in copies:
                self._copy(copy)
                event = self._on_their_way[copy.page] = torch.cuda.Event()
                event.record(self._stream)
