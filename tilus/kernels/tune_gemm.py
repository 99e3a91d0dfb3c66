"""Plans of the dense product worth trying, and tuning and compiling them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tilus.dtypes import DataType
from tilus.kernels.gemm import (
    MOST_SHARED_TOKENS,
    MOST_TOKENS,
    ROW_NBYTES,
    ROWS,
    Plan,
    fitted,
    gemm_kernel,
    kernel_call,
    launch,
    most_stages,
    plan,
    splits_of,
)
from tilus.kernels.trial_arrays import CHECKED_AT_ONCE, placeholder, random_tensor, torch_dtype, wrong_results
from tilus.runtime import graph_timer
from tilus.runtime.autotune import Action, Timer, bucket, tune
from tilus.runtime.execute import build
from tilus.runtime.tuned_plans import Key, Tuned
from tilus.target import DEFAULT_TARGET, Target

if TYPE_CHECKING:
    from tilus.runtime.cuda import Device

PLANS: tuple[type, ...] = (Plan,)
FAMILY = "gemm-2"  # another number where plans get another meaning, or the kernel another speed
CANDIDATES = 10
NO_FACTORS = (1.0, None, None, None)

# The model's machine, an H100: for each multiprocessor bytes of memory and of the L2 cache, and products of 16-bit numbers.
BYTES_PER_NS, CACHED_BYTES_PER_NS, PRODUCTS_PER_NS = 24.0, 40.0, 2900.0
START_NS = 1500.0  # until the first operands are there, and the last results away


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

    def __str__(self) -> str:
        return f"{self.n} x {self.k} {self.weight}, M = {self.m}"


def heuristic(problem: GemmProblem, num_sms: int) -> Plan:
    """The plan that is used without tuning."""
    return plan(problem.m, problem.n, problem.k * problem.act.nbytes, num_sms, problem.out.nbytes)


def candidates(problem: GemmProblem, num_sms: int) -> tuple[Plan, ...]:
    """The heuristic's plan, then the others in the order of the model's times; about ten in all."""
    first = heuristic(problem, num_sms)
    others = [found for found in _possible(problem, num_sms) if found != first]
    others.sort(key=lambda found: estimated_us(found, problem, num_sms))
    return first, *others[: CANDIDATES - 1]


def estimated_us(found: Plan, problem: GemmProblem, num_sms: int) -> float:
    """Microseconds by a model that is good for an order only: rounds of tiles, each as long as its products or its operands."""
    row_tiles, token_tiles = -(-problem.n // ROWS), -(-problem.m // found.tokens)
    tiles = row_tiles * token_tiles * found.splits
    rounds = -(-tiles // found.blocks)
    k = problem.k / found.splits
    nbytes = k * (ROWS * problem.weight.nbytes + found.tokens * problem.act.nbytes / found.cluster)
    first_reads = problem.k * problem.n * problem.weight.nbytes / num_sms  # of each weight, from memory
    products = ROWS * found.tokens * k * problem.act.nbytes / 2
    busy = max(rounds * products / PRODUCTS_PER_NS, rounds * nbytes / CACHED_BYTES_PER_NS, first_reads / BYTES_PER_NS)
    return (busy * (1 + 1 / found.stages / 4) + START_NS) / 1000


def _possible(problem: GemmProblem, num_sms: int) -> Iterator[Plan]:
    """Tiles that are not mostly padding, with as many stages as there is room for and fewer."""
    row_tiles = -(-problem.n // ROWS)
    fewest = next((tokens for tokens in (16, 32, 64, 128) if tokens >= problem.m), MOST_TOKENS)
    for tokens in (16, 32, 64, 128, 192, 256):
        if tokens > fewest or tokens * 16 < fewest:
            continue
        steps = -(-problem.k * problem.act.nbytes // ROW_NBYTES)
        most_splits = 1
        if tokens <= MOST_SHARED_TOKENS:
            most_splits = splits_of(row_tiles * -(-problem.m // tokens), steps, num_sms)
        teams = [(1, splits) for splits in (1, 2, 4) if splits <= most_splits]
        if row_tiles % 2 == 0 and tokens >= 64 and num_sms > 1:
            teams.append((2, 1))
        for cluster, splits in teams:
            most = most_stages(tokens, problem.out.nbytes, splits)
            for stages in sorted({most, max(2, most - 1), max(2, most // 2)}):
                yield fitted(Plan(tokens, stages, cluster, 0, splits), problem.m, problem.n, num_sms)


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
    build(gemm_kernel.specialize(*arguments, **values).function, target)
