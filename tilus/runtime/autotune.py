"""Choosing the fastest of a few plans by measurement: compile them all, check each one's result, time it.

Nothing here knows a kernel. A kernel's plans come best first by its own model, the first being the one that is used without
tuning; how they are launched on test arguments, and how launches are timed, are arguments.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from tilus import config
from tilus.errors import TilusError
from tilus.runtime.ahead import is_dry
from tilus.runtime.graph_timer import is_capturing
from tilus.runtime.tuned_plans import Key, Measurement, Tuned, recall, remember

SMALL_BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256)
# Another plan than the first one must be this much faster: times differ by about a hundredth from run to run.
LEAST_GAIN = 0.01

Action = Callable[[], object]
Timer = Callable[[Sequence[Action]], float]
"""Microseconds of one of these launches, when they run in turn."""

_tuning = threading.Lock()  # two at once would measure each other


class Trial(Protocol):
    """One problem on test arguments."""

    def compile(self, plan: Any) -> None:
        """Make a plan's kernel ready. Called by several threads. Raises: TilusError, when it spills registers for example."""
        ...

    def check(self, plan: Any) -> str | None:
        """Launch once: what is wrong with the result, None when nothing is."""
        ...

    def actions(self, plan: Any) -> Sequence[Action]:
        """Launches on copies of the operands, which together exceed the caches."""
        ...


def bucket(m: int) -> int:
    """The largest number of tokens that shares a plan with m: of 1, 2-4, 5-8, 9-16, ..., 129-256, then powers of two."""
    return next((most for most in SMALL_BUCKETS if m <= most), 1 << (m - 1).bit_length())


def tune(plans: Sequence[Any], trial: Trial, timer: Timer) -> Tuned:
    """Measure all plans. One that does not compile, spills, cannot be launched or gives wrong results gets a note, no time.

    The assembler is a process, so that threads compile several plans at once as far as Python's part allows.
    Raises: TilusError with all notes when no plan is left.
    """
    with ThreadPoolExecutor(min(len(plans), os.cpu_count() or 1)) as pool:
        refusals = list(pool.map(partial(_refusal, trial), plans))
    measured = tuple(
        Measurement(plan, None, refusal) if refusal is not None else _measured(trial, timer, plan)
        for plan, refusal in zip(plans, refusals, strict=True)
    )
    times = [float("inf") if m.us is None else m.us for m in measured]
    if min(times) == float("inf"):
        notes = "\n".join(f"  {m.plan}: {m.note}" for m in measured)
        raise TilusError(f"none of {len(measured)} plans can be used:\n{notes}")
    best = times.index(min(times))
    return Tuned(measured, 0 if times[0] * (1 - LEAST_GAIN) <= times[best] else best)


def tuned(key: Key, kinds: Sequence[type], measure: Callable[[], Tuned]) -> Tuned:
    """The result for this key: as remembered, else `measure()`, which is then remembered."""
    found = recall(key, kinds)
    if found is not None:
        return found
    with _tuning:
        found = recall(key, kinds) or measure()  # another thread may have been here meanwhile
        remember(key, found)
    return found


def chosen(key: Key, kinds: Sequence[type], measure: Callable[[], Tuned]) -> Any | None:
    """The plan to use from now on: the winner that is remembered, or found now where TILUS_AUTOTUNE=1 asks for it; else None.

    While a CUDA graph is recorded, or launches are left out, nothing is measured.
    """
    if config.autotune() and not is_capturing() and not is_dry():
        return tuned(key, kinds, measure).plan
    found = recall(key, kinds)
    return None if found is None else found.plan


def _refusal(trial: Trial, plan: Any) -> str | None:
    try:
        trial.compile(plan)
    except TilusError as error:
        return error.message.splitlines()[0]
    return None


def _measured(trial: Trial, timer: Timer, plan: Any) -> Measurement:
    try:
        wrong = trial.check(plan)
        return Measurement(plan, None, wrong) if wrong is not None else Measurement(plan, timer(trial.actions(plan)))
    except TilusError as error:
        return Measurement(plan, None, error.message.splitlines()[0])
