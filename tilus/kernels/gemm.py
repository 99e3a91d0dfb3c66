"""Dense linear layers on Hopper: y = x W^T (+ bias) for 16-bit floats, 8-bit floats and 8-bit integers.

The kernel is in `gemm_kernel`, the rule by which it is cut into tiles and blocks in `gemm_schedule`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tilus import TilusError
from tilus.kernels.activation import Activation
from tilus.kernels.allocate import is_cuda, result_of
from tilus.kernels.gemm_kernel import gemm_kernel
from tilus.kernels.gemm_schedule import Plan, invariant_plan, launched
from tilus.kernels.linear import EMULATED_SMS, gpu_of
from tilus.lang.arguments import dtype_of_name
from tilus.runtime.autotune import chosen
from tilus.runtime.execute import place

if TYPE_CHECKING:
    from tilus.runtime.cuda import Device


@lru_cache(maxsize=4096)
def _plan(m: int, n: int, k: int, dtypes: tuple[Any, Any, Any], device: Device | None, invariant: bool) -> Plan:
    """The tuned plan of a GPU where there is one, else by rule. dtypes: of x, w and y."""
    from tilus.kernels.tune_gemm import PLANS, GemmProblem, heuristic, measure  # it launches what is here

    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    act, weight, out = (dtype_of_name(name) for name in names)
    if act is None or weight is None or out is None:
        raise TilusError(f"gemm of {names[0]} and {names[1]} to {names[2]}, which kernels do not have")
    problem, sms = GemmProblem(m, n, k, act, weight, out), device.num_sms if device else EMULATED_SMS
    if invariant:
        return invariant_plan(problem.product(sms))
    if device is not None:
        found = chosen(problem.key(device.name), PLANS, lambda: measure(problem.tuned_as, device))
        if found is not None:
            return launched(found, m, n, sms)
    return heuristic(problem, sms)


def gemm(
    x: Any, w: Any, *, bias: Any | None = None, scale: float = 1.0, x_scale: Any | None = None, w_scale: Any | None = None,
    activation: Activation | None = None, out_dtype: Any = None, out: Any = None, constant: bool = False,
    device: str | None = None, invariant: bool = False,
) -> Any:  # fmt: skip
    """x [M, K] times the transpose of w [N, K], times scales, plus a bias [N]: [M, N] of `out_dtype` (sm_90a).

    x, w: f16 or bf16, both the same, float8_e4m3 and float8_e5m2 in any mix, or int8; rows contiguous and of a multiple of 16
    bytes. scale: of the whole product; x_scale [M], w_scale [N]: f32, of each row of x and w (`quantize_tokens` makes codes and
    scales of activations). bias: f16, bf16 or f32. activation: of a gated w, whose N = 2 F rows (and w_scale) are in the order of
    `quantize.gates`, the bias in that of the model; the result is [M, F], activation(gate) * factor.
    out_dtype: by default that of x; of 8-bit operands it must be given: f16, bf16 or f32, and rows of the result are multiples of
    16 bytes, too. out: written in place when given. constant: a promise that w, w_scale and bias are those of a layer, written
    neither by the last kernel or copy in the stream that is launched in the ordinary way nor by anything after it; the kernel
    then asks for weights while the one in front of it ends (`tilus.wait_dependencies`).
    invariant: a row of the result has the same bits whatever the other rows are and however many there are, as nothing is cut
    along K.
    device: where to run (reference, emulator, cuda), by default as the arguments say. Products are added up in f32 (of 8-bit
    floats hardware keeps fewer bits of each step), those of integers exactly in 32 bits, in which any K below 2^17 fits. The sums
    are scaled in f32 and rounded once.
    Raises: TilusError when shapes or dtypes do not fit.
    """
    m, n = int(x.shape[0]), int(w.shape[0])
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise TilusError(f"gemm: x has shape {list(x.shape)}, w {list(w.shape)}; expected [M, K] and [N, K]")
    for name, vector, extent in (("bias", bias, n), ("x_scale", x_scale, m), ("w_scale", w_scale, n)):
        if vector is not None and tuple(vector.shape) != (extent,):
            raise TilusError(f"gemm: {name} has shape {list(vector.shape)}, expected {[extent]}")
    if out is None and out_dtype is None and x.dtype.itemsize == 1:
        raise TilusError(f"gemm of {x.dtype} without out_dtype", hint="choose one: float16, bfloat16 or float32")
    y = result_of("gemm", x, (m, n if activation is None else n // 2), out_dtype, out)
    if m and n:
        where = place(device, is_cuda(x))
        gpu = gpu_of(x) if where == "cuda" else None
        found = _plan(m, n, int(x.shape[1]), (x.dtype, w.dtype, y.dtype), gpu, invariant)
        launch(x, w, y, (scale, x_scale, w_scale, bias), found, device, constant, activation)
    return y


def launch(
    x: Any, w: Any, y: Any, factors: tuple[float, Any, Any, Any], plan: Plan, device: str | None, constant: bool = False,
    activation: Activation | None = None,
) -> None:  # fmt: skip
    """The kernel by a given plan. factors: scale, x_scale, w_scale, bias. constant: of w, w_scale and bias, as for `gemm`."""
    arguments, values = kernel_call(x, w, y, factors, plan, constant, activation)
    gemm_kernel.on(device)(*arguments, **values)


def kernel_call(
    x: Any, w: Any, y: Any, factors: tuple[float, Any, Any, Any], plan: Plan, constant: bool = False,
    activation: Activation | None = None,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """What a plan means: arguments and compile-time values of `gemm_kernel`."""
    scale, *vectors = factors
    values = {"plan": replace(plan, launched=0), "constant": constant, "activation": activation}
    return [x, w, y, scale, plan.launched, *vectors], values
