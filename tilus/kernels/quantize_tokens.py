"""Activations in 8 bits, for products with 8-bit weights: one scale for each token, found when the token is there.

The scale maps the largest magnitude of a row to the largest code ("dynamic per-token quantisation"; Z. Yao et al., "ZeroQuant",
arXiv 2206.01861).
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32
from tilus.dtypes import DataType, float8_e4m3, int8
from tilus.kernels.allocate import empty, is_torch
from tilus.layout import RegisterLayout, local

VECTOR = 8  # elements of 16 bits that a thread loads at once; of paired columns it has all 16
MAX_WARPS = 16
MOST_COLUMNS = 32 * 32 * MAX_WARPS  # that registers hold
LARGEST = {int8: 127.0, float8_e4m3: 448.0}  # codes; -128 is left out, so that both signs are alike
SMALLEST_PEAK = 2.0**-100  # 127 and 448 over this are still finite
TORCH_NAMES = {int8: "int8", float8_e4m3: "float8_e4m3fn"}


@tilus.kernel
def quantize_tokens_kernel(
    x: Tensor["act", "m", "k"], codes: Tensor["code", "m", "k"], scales: Tensor[f32, "m"], *, columns: Const,
    paired: Const = False,
):  # fmt: skip
    """One row a block; every thread holds its part of the row from the load to the store. Wide rows are loaded twice instead."""
    vector = 16 if paired else VECTOR
    warps = min(MAX_WARPS, tilus.cdiv(columns, 32 * vector))
    width = min(MOST_COLUMNS, tilus.cdiv(columns, 32 * vector * warps) * 32 * vector * warps)
    layout = local(width // (32 * vector * warps)).spatial(32 * warps).local(vector)
    tilus.grid(x.shape[0], warps=warps)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    row = tilus.block_id(0)
    values = tilus.load(x, [row, 0], [width], layout=layout)
    peak = tilus.maximum(largest_magnitude(values), SMALLEST_PEAK)
    for first in range(width, columns, width):
        peak = tilus.maximum(peak, largest_magnitude(tilus.load(x, [row, first], [width], layout=layout)))
    largest = LARGEST[codes.dtype]
    factor = largest / peak
    tilus.store(codes, [row, 0], stored((values.to(f32) * factor).to(codes.dtype), paired, layout))
    for first in range(width, columns, width):
        values = tilus.load(x, [row, first], [width], layout=layout).to(f32)
        tilus.store(codes, [row, first], stored((values * factor).to(codes.dtype), paired, layout))
    tilus.store(scales, [row], peak / largest)


def stored(codes, paired: bool, layout: RegisterLayout):
    """A tile of codes as it is stored: as it is, or each 16 columns paired, and a thread's in their order again."""
    if not paired:
        return codes
    by_column = tilus.reshape(codes, [codes.shape[0] // 16, 2, 4, 2])
    moved = tilus.reshape(tilus.transpose(by_column, [0, 2, 3, 1]), [codes.shape[0]])
    return tilus.with_layout(moved, layout)


def largest_magnitude(values):
    """[1] in f32; infinity where something is NaN, which a maximum would pass over."""
    numbers = values.to(f32)
    return tilus.max(tilus.where(numbers == numbers, abs(numbers), math.inf), 0, keepdims=True)


def quantize_tokens(
    x: Any, dtype: DataType = int8, *, paired: bool = False, device: str | None = None
) -> tuple[Any, Any]:  # fmt: skip
    """Codes of x in 8 bits and one scale for each row: `x[i, j]` is about `codes[i, j] * scales[i]`.

    x: f16 or bf16 [M, K], rows may be strided; a torch tensor, or for int8 also a numpy array. dtype: int8 or float8_e4m3.
    paired: each 16 columns in another order, that in which `w4a8_linear` finds its weights; K is then a multiple of 16, and place
    4 t + 2 c + h has column 8 h + 2 t + c, for h, c < 2 and t < 4.
    device: where to run (reference, emulator, cpu, cuda), by default as the argument says.

    In f32, each operation rounded to nearest even: peak = max(max_j |x[i, j]|, 2^-100), scales[i] = peak / L and codes[i, j] =
    x[i, j] * (L / peak) rounded to `dtype`, where L is 127 or 448. So codes of int8 are -127 to 127, and a row of zeros has codes
    of zero. A row with an infinity or NaN has the scale infinity, finite elements have code 0, and all its products are NaN.

    Returns: codes [M, K] of `dtype`, scales float32 [M], as `gemm` takes them.
    Raises: TilusError when the shape or a dtype does not fit.
    """
    if x.ndim != 2 or x.shape[1] < 1:
        raise TilusError(f"quantize_tokens: x has shape {list(x.shape)}, expected [tokens, K] with K >= 1")
    if paired and x.shape[1] % 16:
        raise TilusError(f"quantize_tokens: x has {x.shape[1]} columns, expected a multiple of 16 to pair them")
    if str(x.dtype).removeprefix("torch.") not in ("float16", "bfloat16"):
        raise TilusError(
            f"quantize_tokens: x has dtype {x.dtype}, expected float16 or bfloat16", hint="convert it: x.half()"
        )
    if dtype not in LARGEST:
        raise TilusError(f"quantize_tokens to {dtype}, expected {' or '.join(str(known) for known in LARGEST)}")
    if dtype == float8_e4m3 and not is_torch(x):
        raise TilusError(
            f"quantize_tokens of a {type(x).__name__} to {dtype}, expected a torch tensor",
            hint="numpy has no such type",
        )
    codes, scales = empty(x, tuple(x.shape), TORCH_NAMES[dtype]), empty(x, (int(x.shape[0]),), "float32")
    if x.shape[0]:
        quantize_tokens_kernel.on(device)(x, codes, scales, columns=int(x.shape[1]), paired=paired)
    return codes, scales
