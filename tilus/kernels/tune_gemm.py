"""Plans of the dense product worth trying, and tuning and compiling them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tilus.dtypes import DataType
from tilus.kernels.gemm import kernel_call, launch
from tilus.kernels.gemm_kernel import gemm_kernel
from tilus.kernels.gemm_schedule import Plan, Product, estimated_us, plan, possible
from tilus.kernels.trial_arrays import CHECKED_AT_ONCE, placeholder, random_tensor, torch_dtype, wrong_results
from tilus.runtime import graph_timer
from tilus.runtime.autotune import Action, Timer, bucket, tune
from tilus.runtime.binaries import on_gpu
from tilus.runtime.tuned_plans import Key, Tuned
from tilus.target import DEFAULT_TARGET, Target

if TYPE_CHECKING:
    from tilus.runtime.cuda import Device

PLANS: tuple[type, ...] = (Plan,)
FAMILY = "gemm-3"  # another number where plans get another meaning, or the kernel another speed
CANDIDATES = 10
NO_FACTORS = (1.0, None, None, None)


@dataclass(frozen=True)
class GemmProblem:
    """x [m, k] times the transpose of w [n, k]."""

    m: int
    n: int
    k: int
    act: DataType
    weight: DataType
    out: DataType

    @property
    def tuned_as(self) -> GemmProblem:
        """The problem that shares its plan with this one, of as many tokens as the bucket has."""
        return replace(self, m=bucket(self.m))

    def key(self, device: str) -> Key:
        """Under which the plan of the bucket is stored. device: the GPU's name."""
        types = (self.act.name, self.weight.name, self.out.name)
        return Key(FAMILY, device, json.dumps([self.n, self.k, *types, bucket(self.m)]))

    def product(self, num_sms: int) -> Product:
        """What the rule looks at."""
        return Product(self.m, self.n, self.k * self.act.nbytes, self.out.nbytes, num_sms)

    def __str__(self) -> str:
        return f"{self.n} x {self.k} {self.weight}, M = {self.m}"


def heuristic(problem: GemmProblem, num_sms: int) -> Plan:
    """The plan that is used without tuning."""
    return plan(problem.product(num_sms))


def candidates(problem: GemmProblem, num_sms: int) -> tuple[Plan, ...]:
    """The best by the model, the heuristic's first; about ten in all."""
    product = problem.product(num_sms)
    found = sorted(possible(product), key=lambda each: estimated_us(each, product))
    return tuple(found[:CANDIDATES])


def measure(problem: GemmProblem, device: Device, timer: Timer = graph_timer.graph_us) -> Tuned:
    """Try the candidates on a GPU, with as many copies of the weight as exceed its L2 cache and fit its memory.

    Raises: TilusError without a torch for GPUs, and when no candidate can be used.
    """
    torch = graph_timer.require_gpu()
    with torch.cuda.device(device.index):
        trial = GemmTrial(problem, f"cuda:{device.index}", None, device.target, copies=None)
        torch.cuda.synchronize()
        return tune(candidates(problem, device.num_sms), trial, timer)


class GemmTrial:
    """A product on random arguments; the parameters are those of `tilus.kernels.tune_linear.LinearTrial`."""

    def __init__(
        self, problem: GemmProblem, arrays_on: str, execution: str | None, target: Target = DEFAULT_TARGET,
        copies: int | None = 1,
    ) -> None:  # fmt: skip
        torch = graph_timer.require_torch()
        self._problem, self._execution, self._target = problem, execution, target
        self._x = random_tensor((problem.m, problem.k), problem.act, arrays_on)
        weight = random_tensor((problem.n, problem.k), problem.weight, arrays_on)
        count = graph_timer.copies(weight.nbytes) if copies is None else copies
        self._weights = [weight, *(weight.clone() for _ in range(count - 1))]
        self._y = torch.empty((problem.m, problem.n), dtype=torch_dtype(problem.out), device=arrays_on)

    def compile(self, plan: Plan) -> None:
        _compile(*_placeholders(self._problem), plan, self._target)

    def check(self, plan: Plan) -> str | None:
        self._y.fill_(float("nan"))
        launch(self._x, self._weights[0], self._y, NO_FACTORS, plan, self._execution)
        x = self._x.double()
        for first in range(0, self._problem.n, CHECKED_AT_ONCE):
            columns = slice(first, first + CHECKED_AT_ONCE)
            wrong = wrong_results(self._y[:, columns], x @ self._weights[0][columns].double().T)
            if wrong is not None:
                return wrong
        return None

    def actions(self, plan: Plan) -> Sequence[Action]:
        return [
            partial(launch, self._x, weight, self._y, NO_FACTORS, plan, self._execution) for weight in self._weights
        ]


def compile_plan(problem: GemmProblem, plan: Plan, target: Target) -> Plan:
    """Have the kernel of a plan in the disk cache; returns the plan. No GPU or torch is needed."""
    _compile(*_placeholders(problem), plan, target)
    return plan


def code_key(problem: GemmProblem, plan: Plan) -> Hashable:
    """Problems and plans with the same key run the same machine code."""
    arguments, values = kernel_call(*_placeholders(problem), NO_FACTORS, plan)
    return gemm_kernel, gemm_kernel.specification(*arguments, **values)


def _placeholders(problem: GemmProblem) -> tuple[Any, Any, Any]:
    x = placeholder((problem.m, problem.k), problem.act)
    w = placeholder((problem.n, problem.k), problem.weight)
    return x, w, placeholder((problem.m, problem.n), problem.out)


def _compile(x: Any, w: Any, y: Any, plan: Plan, target: Target) -> None:
    arguments, values = kernel_call(x, w, y, NO_FACTORS, plan)
    on_gpu(gemm_kernel.specialize(*arguments, **values), target)
