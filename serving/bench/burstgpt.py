"""A generator of requests with the statistics of BurstGPT (arXiv 2401.17644), seeded, for when the trace is not at hand.

Arrivals are a renewal process with gamma gaps in operational time, which runs at the service's rate: that changes from day
to day and over the hours of a day. The sources of each number stand beside it; the paper's table of fits per service was
not available, so no claim is made beyond these.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serving.bench.workload import PlannedRequest

RATE = 0.271  # requests a second: 1,429.7 k rows in 61 days of BurstGPT_1.csv
GAP_SHAPE = 0.5  # of the gamma distribution of gaps; the example program's (a coefficient of variation of sqrt 2)

# Requests by day: logarithms with this deviation, each day's correlated with the one before; third-party summary of the file.
DAY_SIGMA = 1.13
DAY_CORRELATION = 0.56

# The rate at each hour of a day as a multiple of the day's mean, from midnight; the same summary.
HOURS = (
    (0.96, 0.91, 0.59, 0.53, 0.38, 0.35, 0.20, 0.16, 0.18, 0.43, 0.90, 1.32)
    + (1.79, 1.54, 1.84, 1.43, 1.51, 1.39, 1.21, 1.61, 1.39, 1.20, 1.16, 1.05)
)  # fmt: skip

# Request tokens: log-normal, by the mean of the trace and the median of its first conversations.
REQUEST_MEDIAN = 353.0
REQUEST_MEAN = 621.0

# Response tokens: log-normal around a mean that depends on the request's tokens. The dependence is read off the figure of
# requests against responses in BurstGPT's repository, in (request, response) tokens; its level follows from the overall mean.
RESPONSE_CURVE = ((30.0, 265.0), (150.0, 165.0), (400.0, 165.0), (2000.0, 450.0))
RESPONSE_MEAN = 126.0
RESPONSE_SIGMA = 0.7

LONGEST = 8192  # tokens that a request or a response may have

_HOUR_SECONDS = 3600.0


def generate(count: int, rng: np.random.Generator) -> list[PlannedRequest]:
    """`count` requests, the first at 0 s, from a midnight on. The same state of `rng` gives the same requests."""
    if not count:
        return []
    operational = np.cumsum(rng.gamma(GAP_SHAPE, 1 / GAP_SHAPE, count))
    arrivals = clock_times(operational, rng)
    requests = request_lengths(count, rng)
    responses = response_lengths(requests, rng)
    rows = zip(arrivals - arrivals[0], requests, responses)
    return [PlannedRequest(float(time), int(inputs), int(outputs)) for time, inputs, outputs in rows]


def clock_times(operational: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Seconds at which so many requests are expected to have come, by the rates of days and hours."""
    hours = np.array(HOURS) / np.mean(HOURS) * RATE * _HOUR_SECONDS
    days: list[NDArray[np.float64]] = []
    level, expected = rng.normal(), 0.0
    while expected <= operational[-1]:
        factor = np.exp(DAY_SIGMA * level - DAY_SIGMA**2 / 2)  # its mean is 1
        days.append(hours * factor)
        expected += float(days[-1].sum())
        level = DAY_CORRELATION * level + np.sqrt(1 - DAY_CORRELATION**2) * rng.normal()
    cumulative = np.concatenate(([0.0], np.cumsum(np.concatenate(days))))
    return np.interp(operational, cumulative, np.arange(len(cumulative)) * _HOUR_SECONDS)


def request_lengths(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    sigma = np.sqrt(2 * np.log(REQUEST_MEAN / REQUEST_MEDIAN))  # mean over median is exp(sigma^2 / 2)
    return _tokens(rng.lognormal(np.log(REQUEST_MEDIAN), sigma, count))


def response_lengths(requests: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A response to each request of so many tokens."""
    spread = rng.lognormal(-(RESPONSE_SIGMA**2) / 2, RESPONSE_SIGMA, len(requests))  # its mean is 1
    return _tokens(_curve(requests) * (RESPONSE_MEAN / _mean_of_curve()) * spread)


def _curve(requests: NDArray[np.int64]) -> NDArray[np.float64]:
    xs, ys = np.array(RESPONSE_CURVE).T
    return np.interp(requests, xs, ys)


def _mean_of_curve() -> float:
    """The curve's mean over the distribution of requests, drawn from a generator of its own."""
    return float(_curve(request_lengths(100_000, np.random.default_rng(0))).mean())


def _tokens(lengths: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.clip(np.rint(lengths), 1, LONGEST).astype(np.int64)
