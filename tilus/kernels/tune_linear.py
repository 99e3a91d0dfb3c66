"""Tuning and compiling plans of the quantised linear: test arguments of a problem, and what a right result is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DTYPES
from tilus.kernels.linear import kernel_call, launch
from tilus.kernels.linear_problem import LinearProblem, Plan, candidates
from tilus.kernels.quantize.header import WeightHeader
from tilus.kernels.quantize.matrix import QuantizedMatrix
from tilus.kernels.quantize.packed import QuantizedWeight, pack
from tilus.kernels.quantize.tiles import MMA, TILE
from tilus.kernels.trial_arrays import CHECKED_AT_ONCE, placeholder, random_tensor, torch_dtype, wrong_results
from tilus.ptx.assembler import SpillError
from tilus.runtime import graph_timer
from tilus.runtime.autotune import Action, Timer, tune
from tilus.runtime.binaries import on_gpu
from tilus.runtime.tuned_plans import Tuned
from tilus.target import DEFAULT_TARGET, Target

if TYPE_CHECKING:
    from tilus.runtime.cuda import Device

SIZE_OF_WEIGHTS = 4.0  # about the largest weight: sums of K of them times activations stay far from what f16 holds


def measure(problem: LinearProblem, device: Device, timer: Timer = graph_timer.graph_us) -> Tuned:
    """Try the candidates on a GPU, with random weights, as many copies of which exceed the L2 cache as its memory allows.

    Raises: TilusError without a torch for GPUs, and when no candidate can be used.
    """
    torch = graph_timer.require_gpu()
    with torch.cuda.device(device.index):
        trial = LinearTrial(problem, f"cuda:{device.index}", None, device.target, copies=None)
        torch.cuda.synchronize()  # weights are there before kernels that start early read them
        return tune(candidates(problem, device.num_sms, hopper=device.target.sm == 90), trial, timer)


class LinearTrial:
    """A product on random arguments.

    arrays_on: where tensors are, in torch's words. execution: emulator, reference or None for where the tensors are. target: what
    is compiled for. copies: of the weight; None for as many as exceed the L2 cache.

    The weight's rows repeat after 64, so that the right result is a small product in float64.
    """

    def __init__(
        self, problem: LinearProblem, arrays_on: str, execution: str | None, target: Target = DEFAULT_TARGET,
        copies: int | None = 1,
    ) -> None:  # fmt: skip
        torch = graph_timer.require_torch()
        self._problem, self._execution, self._target = problem, execution, target
        matrix = random_matrix(problem.header)
        weight = _repeated(pack(matrix, arrays_on, order=MMA.name), problem.header)
        count = graph_timer.copies(weight.nbytes) if copies is None else copies
        self._weights = [weight, *(_clone(weight) for _ in range(count - 1))]
        k = problem.header.shape[1]
        self._x = random_tensor((problem.m, k), problem.act, arrays_on)
        self._y = torch.empty((problem.m, problem.header.shape[0]), dtype=torch_dtype(problem.out), device=arrays_on)
        rows = torch.from_numpy(matrix.dequantize()).to(arrays_on).double()
        self._expected = self._x.double() @ rows.T

    def compile(self, plan: Plan) -> None:
        _compile(*_placeholders(self._problem), plan, self._target)

    def check(self, plan: Plan) -> str | None:
        self._y.fill_(float("nan"))
        launch(self._x, self._weights[0], self._y, None, plan, self._execution)
        (m, n), width = self._y.shape, self._expected.shape[1]
        whole = n // width * width
        for first in range(0, m, CHECKED_AT_ONCE):
            rows = slice(first, first + CHECKED_AT_ONCE)
            exact, y = self._expected[rows], self._y[rows]
            wrong = wrong_results(y[:, :whole].unflatten(1, (-1, width)), exact[:, None])
            wrong = wrong or wrong_results(y[:, whole:], exact[:, : n - whole])
            if wrong is not None:
                return wrong
        return None

    def actions(self, plan: Plan) -> Sequence[Action]:
        return [partial(launch, self._x, weight, self._y, None, plan, self._execution) for weight in self._weights]


def compile_plan(problem: LinearProblem, plan: Plan, target: Target) -> Plan:
    """Have the kernel of a plan in the disk cache, or the first easier one that does not spill; returns which one it is.

    No array is filled, and no GPU or torch is needed.
    """
    while True:
        try:
            _compile(*_placeholders(problem), plan, target)
            return plan
        except SpillError:
            easier = plan.easier()
            if easier is None:
                raise
            plan = easier


def code_key(problem: LinearProblem, plan: Plan) -> Hashable:
    """Problems and plans with the same key run the same machine code."""
    x, weight, y = _placeholders(problem)
    kernel, arguments, values = kernel_call(x, weight, y, None, plan)
    return kernel, kernel.specification(*arguments, **values)


def _placeholders(problem: LinearProblem) -> tuple[Any, QuantizedWeight, Any]:
    header, (n, k) = problem.header, problem.header.shape
    weight = QuantizedWeight(header, **{name: np.empty(*kind) for name, kind in header.arrays.items()})
    return placeholder((problem.m, k), problem.act), weight, placeholder((problem.m, n), problem.out)


def random_matrix(header: WeightHeader) -> QuantizedMatrix:
    """The first 64 rows of a weight with this header: all finite codes of the type, factors of about equal size."""
    rng = np.random.default_rng(0)
    n, k = min(TILE, header.shape[0]), header.shape[1]
    dtype, groups = header.dtype, (n, k // header.group)
    numbers = np.float64(dtype.decode(np.arange(dtype.num_codes, dtype=np.uint8)))
    usable = np.arange(dtype.num_codes) if header.has_table else np.flatnonzero(np.isfinite(numbers))
    top = 1.0 if header.has_table else float(np.abs(numbers[usable]).max())

    def factors(name: str, most: float) -> npt.NDArray[np.float32]:
        return np.asarray(DTYPES[name].round(rng.uniform(most / 2, most, groups)), np.float32)

    return QuantizedMatrix(
        codes=usable.astype(np.uint8)[rng.integers(0, len(usable), (n, k))],
        scales=factors(header.scale_dtype, SIZE_OF_WEIGHTS / top),
        mins=None if header.mins_dtype is None else -factors(header.mins_dtype, SIZE_OF_WEIGHTS / 2),
        zeros=np.full(groups, int(dtype.max_value) // 2, np.int16) if header.has_zeros else None,
        table=np.linspace(-1, 1, dtype.num_codes, dtype=np.float32) if header.has_table else None,
        dtype=dtype,
        scale_dtype=DTYPES[header.scale_dtype],
    )


def _compile(x: Any, weight: QuantizedWeight, y: Any, plan: Plan, target: Target) -> None:
    kernel, arguments, values = kernel_call(x, weight, y, None, plan)
    on_gpu(kernel.specialize(*arguments, **values), target)


def _repeated(weight: QuantizedWeight, header: WeightHeader) -> QuantizedWeight:
    """The packed rows over and over, up to N of them."""
    count = header.arrays["codes"][0][0]
    arrays = {
        name: array if name == "table" else array.repeat(count, *(1 for _ in array.shape[1:]))
        for name, array in weight.arrays.items()
    }
    return QuantizedWeight(replace(weight.header, shape=header.shape), **arrays)


def _clone(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.header, **{name: array.clone() for name, array in weight.arrays.items()})
