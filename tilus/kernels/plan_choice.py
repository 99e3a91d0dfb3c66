"""The choice of a plan for a weight, where nothing is measured: the first of those offered whose kernel fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import dropwhile
from typing import Any, TypeVar

from tilus.errors import TilusError
from tilus.kernels.linear import EMULATED_SMS, gpu_of
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.ptx.assembler import SpillError

Plan = TypeVar("Plan")
Result = TypeVar("Result")


def num_sms_of(x: Any, where: str) -> int:
    """Of the GPU that runs it, or that the emulator stands for; the reference likes few blocks."""
    if where == "cuda":
        return gpu_of(x).num_sms
    return EMULATED_SMS if where == "emulator" else 1


def launch_without_spills(
    weight: QuantizedWeight, key: Any, candidates: Iterator[Any], launch_by: Callable[[Any], None]
) -> None:
    """Launch by the first plan that the registers suffice for. The weight remembers it under the key."""
    last = None
    for plan in dropwhile(lambda plan: plan != weight.schedules.get(key, plan), candidates):
        try:
            launch_by(plan)
        except SpillError as error:
            last = error
        else:
            weight.schedules[key] = plan
            return
    raise last or TilusError(f"no plan fits the shared memory for {weight.header.scheme} {weight.header.dtype}")


def by_fitting_plan(
    found: dict[Any, Plan], key: Any, candidates: Iterable[Plan], launch_by: Callable[[Plan], Result]
) -> Result:
    """Launch by the first plan that the registers suffice for, which `found` remembers under the key.

    Raises: SpillError where they suffice for none."""
    last = None
    for plan in dropwhile(lambda plan: plan != found.get(key, plan), candidates):
        try:
            result = launch_by(plan)
        except SpillError as error:
            last = error
        else:
            found[key] = plan
            return result
    raise last or TilusError(f"no plan for {key}")
