"""What one run of the benchmark shares: the timer, reads, the budget, cuBLAS, and what happens to a measurement that fails."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from products.limits import PEAK_TFLOPS
from products.reads import Reads
from products.timing import ACTIVATIONS, Budget, Timer, in_turn, one_after_the_other
from products.weights import Expected, RandomWeight, expected
from tilus.kernels import linear
from tilus.kernels.quantize import QuantizedWeight

Result = TypeVar("Result")


class Run:
    """Measurements on the current GPU, on the current stream."""

    def __init__(self, replays: int, budget: Budget) -> None:
        self.timer, self.budget = Timer(replays), budget
        self.reads = Reads(self.timer)
        self.failures: dict[str, str] = {}

    @functools.cached_property
    def measured_tflops(self) -> float:
        """The speed of torch's bf16 product of 8192^3, on random data."""
        x, w, y = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(3))
        return round(2 * 8192**3 / self.timer.us([lambda: torch.mm(x, w.T, out=y)]) * 1e-6, 1)

    @property
    def tflops(self) -> float:
        """What limits are computed from."""
        return max(PEAK_TFLOPS, self.measured_tflops)

    def attempt(self, what: str, measure: Callable[[], Result]) -> Result | None:
        """The result, or None with a line in `failures` where there is none. A wrong result ends the run, and so does a GPU that
        does not answer any more."""
        try:
            return measure()
        except Exception as error:
            torch.cuda.synchronize()  # raises where the GPU itself has failed
            self.failures[what] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return None

    def taken_failures(self) -> dict[str, str]:
        """The failures since the last call."""
        found, self.failures = self.failures, {}
        return found

    def linear_us(
        self, xs: Sequence[torch.Tensor], weights: Sequence[QuantizedWeight], wanted: Sequence[Expected], what: str
    ) -> dict[str, Any]:
        """{us, plain_us, error, rms}: tilus' linear with dependent launch and without."""
        outputs = outputs_like(wanted, torch.float16)

        def timed(device: str | None) -> tuple[float, dict[str, float]]:
            actions = in_turn(lambda x, w, y: linear(x, w, out=y, device=device), xs, weights, outputs)
            return self.timer.checked_us(actions, outputs, wanted, what)

        dependent = self.attempt("us", lambda: timed(None))
        with one_after_the_other():
            plain = self.attempt("plain_us", lambda: timed("cuda"))
        errors = [found[1] for found in (dependent, plain) if found is not None]
        worst = {key: max((error[key] for error in errors), default=None) for key in ("error", "rms")}
        return {"us": dependent and dependent[0], "plain_us": plain and plain[0], **worst}

    def torch_us(self, xs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], what: str) -> float:
        """torch.mm of activations [M, K] and weights [N, K] that are all the same, checked; cuBLAS may add partial sums in the
        type of the result."""
        weight = weights[0]
        wanted = [expected(x, lambda a, b: weight[a:b].double(), weight.shape[0], x.dtype, roundings=4) for x in xs]
        outputs = outputs_like(wanted, weight.dtype)
        actions = in_turn(lambda x, w, y: torch.mm(x, w.T, out=y), xs, weights, outputs)
        return self.timer.checked_us(actions, outputs, wanted, what)[0]

    def copies_of(self, weight: torch.Tensor) -> list[torch.Tensor]:
        return [weight, *(weight.clone() for _ in range(self.timer.copies(weight.nbytes) - 1))]

    def packed_copies(self, weight: RandomWeight) -> list[QuantizedWeight]:
        packed = weight.pack()
        return [packed, *(clone(packed) for _ in range(self.timer.copies(packed.nbytes) - 1))]


def activations(m: int, k: int) -> list[torch.Tensor]:
    return [torch.randn(m, k, device="cuda").half() for _ in range(ACTIVATIONS)]


def products_with(weight: RandomWeight, xs: Sequence[torch.Tensor], roundings: int = 1) -> list[Expected]:
    """The float64 products of f16 activations and a quantised weight."""
    return [
        expected(x, weight.rows, weight.shape[0], x.dtype, offset=weight.offset, roundings=roundings) for x in xs
    ]  # fmt: skip


def outputs_like(wanted: Sequence[Expected], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty(one.exact.shape, dtype=dtype, device=one.exact.device) for one in wanted]


def clone(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.header, **{name: array.clone() for name, array in weight.arrays.items()})
