"""Times of actions on the current GPU: CUDA graphs that walk through copies of the operands, and launches from Python."""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from products.weights import Expected

L2_MULTIPLE = 4  # what the copies of an operand add up to, in sizes of the L2 cache
ACTIVATIONS = 2  # different ones, used in turn
GRAPH_US = 1000.0  # a graph goes through the copies again until it takes about this long
MEASURED_US = 30_000.0  # replays of a graph take about this long, unless they become too many or too few
FEWEST_REPLAYS = 5
WARM_UP_US = 20_000.0  # replays that do not count: behind large allocations the first ones were seen to be slower

Action = Callable[[], object]


def copies(nbytes: int, l2_nbytes: int) -> int:
    """How many operands of this size exceed the cache L2_MULTIPLE times; at least one for each of the activations."""
    return max(ACTIVATIONS, L2_MULTIPLE * l2_nbytes // nbytes + 1)


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """Kernels that are prepared meanwhile start after the end of the one in front of them.

    Launches that name their device are prepared apart from those that do not: the former are for here, the latter for elsewhere.
    """
    before = os.environ.get("TILUS_DEPENDENT_LAUNCH")
    os.environ["TILUS_DEPENDENT_LAUNCH"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TILUS_DEPENDENT_LAUNCH"]
        else:
            os.environ["TILUS_DEPENDENT_LAUNCH"] = before


class Timer:
    """Medians over replays of CUDA graphs, on the current stream, which must not be the default one."""

    def __init__(self, replays: int) -> None:
        self.replays = replays
        self.l2_nbytes: int = torch.cuda.get_device_properties(0).L2_cache_size

    def copies(self, nbytes: int) -> int:
        return copies(nbytes, self.l2_nbytes)

    def us(
        self, actions: Sequence[Action], outputs: Sequence[torch.Tensor] = (), replays: int | None = None
    ) -> float:  # fmt: skip
        """Median microseconds of one action when all run in turn, over and over, with nothing between them.

        Replays are submitted without waiting for each other, so that the GPU never waits for the CPU; events between them
        give each one's time. outputs: hold NaN again before the replays.
        """
        for action in actions:  # compile, load and allocate before the capture
            action()
        once = self._intervals(self._captured(actions, 1).replay, 2)[
            1
        ]  # the GPU's time: Python may take longer to launch
        passes = max(1, round(GRAPH_US / once))
        graph = self._captured(actions, passes)
        most = self.replays if replays is None else replays
        count = min(most, max(FEWEST_REPLAYS, round(MEASURED_US / (once * passes))))
        poison(outputs)
        warm_up = 1 + round(WARM_UP_US / (once * passes))
        times = self._intervals(graph.replay, warm_up + count)[warm_up:]
        return round(statistics.median(times) / (passes * len(actions)), 3)

    @staticmethod
    def _captured(actions: Sequence[Action], passes: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(passes):
                for action in actions:
                    action()
        return graph

    def eager_us(self, actions: Sequence[Action]) -> float:
        """Median microseconds of one action when Python launches all in turn, over and over, without a graph: with whatever the
        GPU waits for in between."""
        for action in actions:
            action()
        times = self._intervals(lambda: [action() for action in actions], self.replays + 1)[1:]
        return round(statistics.median(times) / len(actions), 3)

    @staticmethod
    def _intervals(action: Action, count: int) -> list[float]:
        """Microseconds from each start of the action to the next."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            action()
            event.record()
        torch.cuda.current_stream().synchronize()
        return [1e3 * start.elapsed_time(stop) for start, stop in itertools.pairwise(events)]

    def checked_us(
        self, actions: Sequence[Action], outputs: Sequence[torch.Tensor], wanted: Sequence[Expected], what: str
    ) -> tuple[float, dict[str, float]]:
        """The time, and the worst errors. The first actions write each output once; all are checked before and after timing,
        and hold NaN before they are written. Raises WrongResult."""

        def check(when: str) -> list[dict[str, float]]:
            return [expected.check(y, f"{what}, {when}") for y, expected in zip(outputs, wanted, strict=True)]

        poison(outputs)
        for action in actions[: len(outputs)]:
            action()
        found = check("one call")
        us = self.us(actions, outputs)
        found += check("after the replays")
        return us, {key: max(errors[key] for errors in found) for key in found[0]}


def in_turn(
    product: Callable[..., object], xs: Sequence[torch.Tensor], weights: Sequence[Any], outputs: Sequence[torch.Tensor]
) -> list[Action]:  # fmt: skip
    """`product(x, weight, output)` for each of the weights; activations take turns, each with an output of its own."""
    pairs = itertools.cycle(zip(xs, outputs, strict=True))
    return [functools.partial(product, x, w, y) for w, (x, y) in zip(weights, pairs)]


def poison(outputs: Sequence[torch.Tensor]) -> None:
    for y in outputs:
        y.fill_(float("nan"))


class Budget:
    """Seconds that a run may take; None: any number."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._start, self._seconds = clock, clock(), seconds

    @property
    def used(self) -> float:
        return self._clock() - self._start

    @property
    def exhausted(self) -> bool:
        return self._seconds is not None and self.used >= self._seconds
