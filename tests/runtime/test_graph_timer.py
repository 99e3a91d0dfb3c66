"""Timing of launches, on a GPU that is simulated: a clock, streams that run at once, graphs that record and replay."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tilus.errors import TilusError
from tilus.runtime import graph_timer
from tilus.runtime.graph_timer import copies, graph_us, is_capturing


class SimulatedGPU:
    """A launch takes `us` of GPU time; replays take turns with `noise`, and a graph's launches run when it is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.us = 0.0
        self.recorded: list[float] | None = None
        self.launches = self.replays = 0
        self.noise = [0.0]
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.us = gpu.us

            def elapsed_time(self, end: Event) -> float:
                return (end.us - self.us) / 1e3

        class Graph:
            def replay(self) -> None:
                gpu.us += sum(self.times) + gpu.noise[gpu.replays % len(gpu.noise)]
                gpu.replays += 1

        @contextmanager
        def graph(graph: Graph, stream: object) -> Iterator[None]:
            gpu.recorded = graph.times = []
            yield
            gpu.recorded = None

        @contextmanager
        def stream(stream: object) -> Iterator[None]:
            yield

        fake = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "stream": stream, "Stream": lambda: fake,
            "current_stream": lambda: fake, "current_device": lambda: 0, "is_available": lambda: True,
            "is_current_stream_capturing": lambda: self.recorded is not None,
            "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=50 << 20),
            "mem_get_info": lambda: (1 << 30, 80 << 30),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self, us: float) -> Callable[[], None]:
        def action() -> None:
            self.launches += 1
            if self.recorded is None:
                self.us += us + 100.0  # the host is slower than the GPU
            else:
                assert is_capturing()
                self.recorded.append(us)

        return action


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGPU:
    return SimulatedGPU(monkeypatch)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_time_of_a_launch_in_the_middle_of_others(gpu: SimulatedGPU, count: int) -> None:
    """The mean over the copies, without what the host takes; each has run before anything is recorded."""
    assert graph_us([gpu.launch(6.0 + index % 2) for index in range(count)]) == pytest.approx(
        6.0 + (count // 2) / count, abs=1e-3
    )
    assert gpu.replays == graph_timer.REPLAYS and not is_capturing()
    assert gpu.launches >= 3 * count  # once to compile, once for its length, and recorded


def test_outliers_do_not_count(gpu: SimulatedGPU) -> None:
    gpu.noise = [0.0, 0.0, 0.0, 1e6]
    assert graph_us([gpu.launch(5.0)]) == 5.0


def test_a_torch_without_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not is_capturing()
    with pytest.raises(TilusError, match=f"tuning needs a torch for GPUs, found {re.escape(torch.__version__)}"):
        graph_timer.require_gpu()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TilusError, match="tuning needs torch, which is not installed"):
        graph_timer.require_gpu()


def test_copies_exceed_the_cache_as_far_as_memory_goes(gpu: SimulatedGPU) -> None:
    for nbytes in (1 << 20, 7 << 20, 50 << 20, 90 << 20):
        assert copies(nbytes) * nbytes > 4 * (50 << 20)
        assert (copies(nbytes) - 1) * nbytes <= 4 * (50 << 20)
    assert copies(300 << 20) == 1  # more than the caches by itself
    assert copies(1 << 40) == 1  # there is one in any case
