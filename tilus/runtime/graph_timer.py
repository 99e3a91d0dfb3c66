"""How long launches take on a GPU: a CUDA graph of many, replayed, so that Python and the driver are not in the way."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tilus.errors import TilusError

GRAPH_US = 1000.0  # a graph repeats the launches until it takes about this long
REPLAYS = 11
L2_MULTIPLE = 4  # what the copies of an operand add up to, in sizes of the L2 cache
MOST_OF_FREE_MEMORY = 0.5


def graph_us(actions: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of one of the launches, when all run in turn on the current device.

    actions: launch into the current stream of torch; each has run before, so that nothing is compiled or loaded here.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for action in actions:  # what they allocate for a stream exists from here on
            action()
        once = _intervals_us(lambda: [action() for action in actions], 1)[0]
        graph = torch.cuda.CUDAGraph()
        passes = max(1, round(GRAPH_US / once))
        with torch.cuda.graph(graph, stream=side):
            for _ in range(passes):
                for action in actions:
                    action()
        times = _intervals_us(graph.replay, REPLAYS)[1:]
    torch.cuda.current_stream().wait_stream(side)
    return round(statistics.median(times) / (passes * len(actions)), 3)


def copies(nbytes: int) -> int:
    """How many operands of this size exceed the L2 cache of the current GPU several times, as far as its memory allows."""
    torch = require_torch()
    wanted = L2_MULTIPLE * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size // nbytes + 1
    free = int(MOST_OF_FREE_MEMORY * torch.cuda.mem_get_info()[0])
    return max(1, min(wanted, free // nbytes))


def is_capturing() -> bool:
    """Whether the current stream of torch records a CUDA graph: nothing may be measured then."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def require_torch() -> Any:
    """The module torch. Raises: TilusError when it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise TilusError("tuning needs torch, which is not installed", hint="pip install 'tilus[serve]'") from error
    return torch


def require_gpu() -> Any:
    """The module torch. Raises: TilusError when it is not installed, or not for GPUs."""
    torch = require_torch()
    if not torch.cuda.is_available():
        raise TilusError(f"tuning needs a torch for GPUs, found {torch.__version__}", hint="install torch for CUDA")
    return torch


def _intervals_us(action: Callable[[], object], count: int) -> list[float]:
    """From each start of the action to the next. The GPU never waits for the CPU in between."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.current_stream().synchronize()
    return [1e3 * start.elapsed_time(stop) for start, stop in itertools.pairwise(events)]
