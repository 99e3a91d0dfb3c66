"""What to ask and when: planned requests, from synthetic arrivals or scaled from a trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tilus.errors import TilusError

Pattern = Literal["poisson", "gamma", "constant"]
PATTERNS: tuple[str, ...] = get_args(Pattern)


@dataclass(frozen=True)
class PlannedRequest:
    """One request of a workload.

    arrival: seconds after the start. input_tokens, output_tokens: the lengths to ask for.
    blocks: names of the pieces of block_tokens tokens that the prompt is made of; requests whose first names are equal have
    equal beginnings. None of them: a prompt that shares nothing.
    """

    arrival: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: float = 0.0


@dataclass(frozen=True)
class LengthRange:
    """Token counts from low to high, both included, all equally likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> LengthRange:
        """From `N` or `LOW:HIGH`. Raises ValueError on anything else."""
        low, _, high = text.partition(":")
        found = cls(int(low), int(high or low))
        if not 1 <= found.low <= found.high:
            raise ValueError(text)
        return found

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        return [int(length) for length in rng.integers(self.low, self.high, count, endpoint=True)]


def arrival_times(
    pattern: Pattern, rate: float, count: int, rng: np.random.Generator, *, cv: float = 1.0
) -> NDArray[np.float64]:
    """Times in seconds of `count` arrivals at `rate` a second, the first at 0.

    The gaps are independent: exponential (poisson), gamma with mean 1 / rate and coefficient of variation `cv` (gamma: 1
    is poisson again, more comes in bursts), or all equal (constant).
    """
    num_gaps = max(0, count - 1)
    if pattern == "poisson":
        gaps = rng.exponential(1 / rate, num_gaps)
    elif pattern == "gamma":
        gaps = rng.gamma(cv**-2, cv**2 / rate, num_gaps)  # shape 1 / cv^2; shape times scale is the mean
    else:
        gaps = np.full(num_gaps, 1 / rate)
    return np.concatenate((np.zeros(min(count, 1)), np.cumsum(gaps)))


def synthetic(
    arrivals: Sequence[float] | NDArray[np.float64],
    input_tokens: LengthRange,
    output_tokens: LengthRange,
    rng: np.random.Generator,
) -> list[PlannedRequest]:
    """Requests at these times with lengths that are drawn independently."""
    count = len(arrivals)
    lengths = zip(arrivals, input_tokens.draw(count, rng), output_tokens.draw(count, rng))
    return [PlannedRequest(float(arrival), inputs, outputs) for arrival, inputs, outputs in lengths]


def mean_rate(plan: Sequence[PlannedRequest]) -> float:
    """Arrivals a second between the first and the last; infinite when all come at once."""
    span = plan[-1].arrival - plan[0].arrival if plan else 0.0
    return (len(plan) - 1) / span if span > 0 else math.inf


def scaled(plan: Sequence[PlannedRequest], *, rate: float = 1.0, length: float = 1.0) -> list[PlannedRequest]:
    """The same requests `rate` times as often and with `length` times as many tokens (at least one)."""
    return [
        replace(
            planned,
            arrival=planned.arrival / rate,
            input_tokens=max(1, round(planned.input_tokens * length)),
            output_tokens=max(1, round(planned.output_tokens * length)),
            block_tokens=planned.block_tokens * length,
        )
        for planned in plan
    ]


def at_rate(plan: Sequence[PlannedRequest], rate: float) -> list[PlannedRequest]:
    """The same requests, stretched in time so that `rate` of them arrive a second.

    Raises: TilusError when all of them arrive at the same time.
    """
    found = mean_rate(plan)
    if not math.isfinite(found):
        raise TilusError(
            f"the {len(plan)} requests of this trace all arrive at the same time, so they have no rate to stretch to {rate}",
            hint="take more of the trace with --limit, or leave --rate out",
        )
    return scaled(plan, rate=rate / found)
