"""Tuning and compiling for a list of products: what `tilus tune` does, and what benchmarks read.

A weight keeps the plan that it was first launched with: tune before that, or in another process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tilus.dtypes import DataType, f32
from tilus.kernels import linear_problem, tune_gemm, tune_linear
from tilus.kernels.linear_problem import LinearProblem
from tilus.kernels.model_layers import HEAD, Layer
from tilus.kernels.tune_gemm import GemmProblem
from tilus.runtime import graph_timer
from tilus.runtime.autotune import Timer, tuned
from tilus.runtime.compile_pool import compile_all
from tilus.runtime.tuned_plans import Key, Tuned, plan_to_json, recall, remember
from tilus.target import Target

if TYPE_CHECKING:
    from tilus.runtime.cuda import Device

Problem = LinearProblem | GemmProblem


@dataclass(frozen=True)
class Product:
    """A layer of a model at a number of tokens."""

    layer: str
    problem: Problem


def products_of(layers: Iterable[Layer], tokens: Iterable[int], act: DataType) -> list[Product]:
    """The layers at each number of tokens, each product once; the last layer's results are f32, as the server wants logits."""
    counts = sorted(set(tokens))
    found: dict[Problem, Product] = {}
    for layer in layers:
        out = f32 if layer.name == HEAD else act
        for m in counts:
            if layer.weight is None:
                problem: Problem = GemmProblem(m, layer.n, layer.k, act, act, out)
            else:
                problem = LinearProblem.of(layer.weight, m, act, out)
            found.setdefault(problem, Product(layer.name, problem))
    return list(found.values())


def tune_all(
    problems: Iterable[Problem], device: Device, *, again: bool = False, timer: Timer = graph_timer.graph_us,
    done: Callable[[], None] = lambda: None,
) -> list[Tuned]:  # fmt: skip
    """The fastest plans on a GPU, measured unless they are known; they are remembered for all processes.

    again: measure those that are known, too. done: called after each problem. Raises: TilusError when no plan of a problem can
    be used, and without torch.
    """
    results: list[Tuned] = []
    for problem in problems:
        key, kinds, measure = _ways(problem, device, timer)
        if again:
            remember(key, measure())
        results.append(tuned(key, kinds, measure))
        done()
    return results


def known(problem: Problem, device: Device) -> Tuned | None:
    """What tuning found for a problem on this GPU; None when it was not tuned."""
    key, kinds, _ = _ways(problem, device, graph_timer.graph_us)
    return recall(key, kinds)


def ratios(problems: Iterable[Problem], device: Device) -> dict[str, float | None]:
    """For each problem that was tuned, in words: how many times as long the plan without tuning takes as the best one."""
    found = ((problem, known(problem, device)) for problem in problems)
    return {str(problem): result.ratio for problem, result in found if result is not None}


def compile_plans(
    problems: Iterable[Problem], target: Target, num_sms: int, device: Device | None = None, *,
    done: Callable[[int, int], None] = lambda count, total: None, processes: int | None = None,
) -> int:  # fmt: skip
    """Have the kernels that these problems will run in the disk cache; returns how many different ones there are.

    Plans are the tuned ones of `device`, where it is given and they are known, else those that are used without tuning on a GPU
    of num_sms multiprocessors. done, processes: as in `compile_all`. No GPU is needed.
    Raises: TilusError when a kernel cannot be compiled.
    """
    different: dict[Hashable, Callable[[], Any]] = {}
    for problem in problems:
        plan = _plan(problem, num_sms, target, device)
        match problem:
            case LinearProblem():
                compile = partial(tune_linear.compile_plan, problem, plan, target)
                different.setdefault(tune_linear.code_key(problem, plan), compile)
            case GemmProblem():
                compile = partial(tune_gemm.compile_plan, problem, plan, target)
                different.setdefault(tune_gemm.code_key(problem, plan), compile)
    compile_all(list(different.values()), done=done, processes=processes)
    return len(different)


def to_json(product: Product, result: Tuned) -> dict[str, Any]:
    """A line of `tilus tune --json`."""
    problem = product.problem
    match problem:
        case LinearProblem(header=header):
            weight = {"dtype": header.dtype.name, "scheme": header.scheme, "group": header.group}
        case GemmProblem():
            weight = {"dtype": problem.weight.name}
    n, k = shape_of(problem)
    return {
        "layer": product.layer, "N": n, "K": k, "M": problem.m, **weight, "act": problem.act.name, "out": problem.out.name,
        "heuristic_us": result.heuristic_us, "us": result.us, "ratio": result.ratio, "plan": plan_to_json(result.plan),
        "candidates": [{"plan": plan_to_json(m.plan), "us": m.us, "note": m.note} for m in result.measurements],
    }  # fmt: skip


def table(products: Sequence[Product], results: Sequence[Tuned]) -> str:
    """A line for each product: microseconds without tuning and with it, and the plan."""
    rows = [("layer", "N x K", "M", "rule us", "tuned us", "ratio", "plan")]
    for product, result in zip(products, results, strict=True):
        n, k = shape_of(product.problem)
        before = "-" if result.heuristic_us is None else f"{result.heuristic_us:.2f}"
        ratio = "-" if result.ratio is None else f"{result.ratio:.2f}"
        rows.append(
            (product.layer, f"{n} x {k}", str(product.problem.m), before, f"{result.us:.2f}", ratio, str(result.plan))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def shape_of(problem: Problem) -> tuple[int, int]:
    """N and K."""
    return problem.header.shape if isinstance(problem, LinearProblem) else (problem.n, problem.k)


def _plan(problem: Problem, num_sms: int, target: Target, device: Device | None) -> Any:
    result = None if device is None else known(problem, device)
    match problem:
        case LinearProblem():
            hopper = target.sm == 90
            return linear_problem.heuristic(problem, num_sms, hopper=hopper) if result is None else result.plan
        case GemmProblem():
            return tune_gemm.heuristic(problem, num_sms) if result is None else result.plan


def _ways(problem: Problem, device: Device, timer: Timer) -> tuple[Key, Sequence[type], Callable[[], Tuned]]:
    key = problem.key(device.name)
    match problem:
        case LinearProblem():
            return key, linear_problem.PLANS, partial(tune_linear.measure, problem.tuned_as, device, timer)
        case GemmProblem():
            return key, tune_gemm.PLANS, partial(tune_gemm.measure, problem.tuned_as, device, timer)
