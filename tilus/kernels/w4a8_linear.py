"""Linear layers of 4-bit weights and 8-bit activations on Hopper: y = x W^T + b from the packed weights of `linear`.

`warpgroup_linear` with operands of 8 bits: twice the products for each instruction, and half of their activations to read. Codes
become operands without a conversion (`byte_operands`). Sums of a group are exact for int8 and scaled in f32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tilus.dtypes import DataType, float8_e4m3, int8
from tilus.errors import TilusError
from tilus.kernels.activation import Activation, activation_of
from tilus.kernels.allocate import is_cuda, result_of
from tilus.kernels.byte_operands import exponent_of
from tilus.kernels.plan_choice import launch_without_spills, num_sms_of
from tilus.kernels.quantize.header import WeightHeader
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import MMA, TILE, WHOLE
from tilus.kernels.warpgroup_linear import kernel_call
from tilus.kernels.warpgroup_operands import tile_nbytes
from tilus.kernels.warpgroup_plan import HALF_NBYTES, SHARED_NBYTES, Overlap, Unit, WarpgroupPlan, planned
from tilus.kernels.warpgroup_schedule import LEAST_SPLIT_NBYTES, width_of
from tilus.runtime.execute import place

TYPES = {"int8": int8, "float8_e4m3fn": float8_e4m3}  # of activations, by their names in torch
MOST_EIGHTS = 32  # tokens of a tile up to which multiples of 8 have an instruction for both types
SMALLEST_GROUP = 32  # columns of a product of 8-bit operands


def plans(m: int, act: DataType, header: WeightHeader, num_sms: int) -> Iterator[WarpgroupPlan]:
    """The best plan for m tokens of type `act`, then those that need fewer registers.

    Up to 64 tokens the time is that of reading and unpacking, and blocks are those of `linear`. More tokens are cut into up to
    128: no registers hold the sums of more, since weights are not scaled. The products of single warps have no instruction for
    float8, those of warpgroups none for 40 or 56 tokens of int8.
    """
    tiles_n, tiles_k = header.shape[0] // TILE, header.shape[1] // TILE
    codes_nbytes = tiles_k * tile_nbytes(header.dtype)
    long = codes_nbytes > LEAST_SPLIT_NBYTES["reading"]
    least = LEAST_SPLIT_NBYTES["reading" if m <= 32 else "computing"]
    blocks = 2 if 2 * tiles_n <= num_sms and codes_nbytes > least else 1
    for most in (4, 2, 1):
        depth = next(depth for depth in (4, 2, 1) if depth <= most and tiles_k % depth == 0)
        fit = partial(planned, header, depth=depth, act_nbytes=1)
        if m <= 16:
            unit: Unit = "mma" if m <= 8 and act == int8 and blocks == 1 else "wgmma"
            found = _reading(partial(fit, unit=unit), 8 if m <= 8 else 16, blocks, tiles_n > num_sms)
        elif m <= 64:
            found = _between(fit, width_of(m, MOST_EIGHTS), blocks, tiles_n > num_sms, long, min(depth, 2))
        else:
            found = _computing(fit, m, blocks, tiles_n, num_sms, min(depth, 2))
        while found is not None:
            yield found
            found = found.easier()


Fit = Callable[..., WarpgroupPlan | None]


def _reading(fit: Fit, tokens: int, blocks: int, many: bool) -> WarpgroupPlan | None:
    splits = 2 if many or blocks == 2 else 4
    overlap: Overlap = "step" if blocks == 2 else "none"
    half = fit(tokens, 1, splits, blocks, nbytes=HALF_NBYTES, overlap=overlap)
    enough = half is not None and half.stages >= 2 * splits  # else a warpgroup waits for its only stage
    return half if enough else fit(tokens, 1, splits, blocks, nbytes=SHARED_NBYTES, overlap=overlap)


def _between(fit: Fit, tokens: int, blocks: int, many: bool, long: bool, narrow: int) -> WarpgroupPlan | None:
    if many:
        return fit(tokens, 1, 2 if tokens <= 32 else 1, 1, depth=narrow, nbytes=HALF_NBYTES, blocks_per_sm=2)
    if tokens <= 32 and blocks == 1:
        return fit(tokens, 1, 3, blocks, depth=narrow, nbytes=SHARED_NBYTES)
    if tokens > 32 and blocks == 2 and long:
        return fit(tokens, 1, 2, blocks, depth=narrow, nbytes=SHARED_NBYTES)
    return fit(tokens, 1, 2, blocks, nbytes=SHARED_NBYTES, overlap="step")


def _computing(fit: Fit, m: int, blocks: int, tiles_n: int, num_sms: int, narrow: int) -> WarpgroupPlan | None:
    """Two blocks of a warpgroup on each multiprocessor; where there are fewer tiles, two warpgroups share one along K."""
    count = -(-m // 128)
    tokens = width_of(-(-m // count), MOST_EIGHTS)
    if tiles_n * count > num_sms:
        return fit(tokens, 1, 1, 1, depth=narrow, nbytes=HALF_NBYTES, blocks_per_sm=2, overlap="steps")
    along = blocks if m <= 128 else 1
    return fit(tokens, 1, 2, along, depth=narrow, nbytes=SHARED_NBYTES, registers=208)


def w4a8_linear(
    x: Any, x_scale: Any, weight: QuantizedWeight, *, out_dtype: Any = None, bias: Any | None = None,
    activation: str | None = None, out: Any = None, device: str | None = None,
) -> Any:  # fmt: skip
    """Codes x [M, K] of activations, times x_scale [M], times the transpose of a packed weight (N, K), plus a bias: [M, N].

    x, x_scale: as `quantize_tokens(..., paired=True)` makes them, int8 or float8_e4m3 and f32. weight: codes, less their zero
    points, that the type of x holds exactly, up to a power of two for all of them: integers of 4 bits for both, of 8 bits with a
    sign for int8, float8_e4m3 and smaller floats for float8_e4m3; factors of groups of a multiple of 32 columns or of all; no
    table, and columns in their order. It is packed for GPUs; N and K are multiples of 64. bias: f16, bf16 or f32 [N].
    activation: of a gated weight, as in `linear`. out_dtype: f16, bf16 or f32, needed unless out is given, which is written in
    place. device: where to run (reference, emulator, cuda: sm_90a), by default as the arguments say.

    The sum of a group is exact for int8; for float8_e4m3 hardware keeps some 14 bits of it. It is scaled and added to the others
    in f32, and the result is rounded once. The kernel may start while the one in front of it runs, and then reads the weight and
    the bias, as in `linear`.
    Raises: TilusError when shapes or dtypes do not fit, and for weights of other schemes.
    """
    _check(x, x_scale, weight, bias)
    function = activation_of("w4a8_linear", weight.is_gated, activation)
    if out is None and out_dtype is None:
        raise TilusError("w4a8_linear without out_dtype", hint="choose one: float16, bfloat16 or float32")
    m, width = int(x.shape[0]), weight.shape[0] // 2 if weight.is_gated else weight.shape[0]
    y = result_of("w4a8_linear", x, (m, width), out_dtype, out)
    if m == 0:
        return y
    where = place(device, is_cuda(x))
    key = ("w4a8", m, x.dtype, y.dtype, bias is None, where)
    candidates = plans(m, TYPES[str(x.dtype).removeprefix("torch.")], weight.header, num_sms_of(x, where))
    launch_without_spills(
        weight, key, candidates, lambda plan: launch(x, x_scale, weight, y, bias, plan, device, function)
    )
    return y


def launch(
    x: Any, x_scale: Any, weight: QuantizedWeight, y: Any, bias: Any | None, plan: WarpgroupPlan, device: str | None,
    activation: Activation | None = None,
) -> None:  # fmt: skip
    """The kernel with a given plan."""
    kernel, arguments, values = kernel_call(x, weight, y, bias, plan, activation, x_scale)
    kernel.on(device)(*arguments, **values)


def _check(x: Any, x_scale: Any, weight: QuantizedWeight, bias: Any | None) -> None:
    (n, k), header = weight.shape, weight.header
    if header.order != MMA or n % TILE or k % TILE:
        raise TilusError(
            f"w4a8_linear of a weight {[n, k]} in the order {header.order}, expected multiples of {TILE} in the order {MMA}",
            hint='pack it for a GPU: pack(matrix, device, order="mma")',
        )
    kind = str(x.dtype).removeprefix("torch.")
    if x.ndim != 2 or x.shape[1] != k or kind not in TYPES:
        raise TilusError(
            f"w4a8_linear: x is {kind}{list(x.shape)}, expected int8 or float8_e4m3fn [M, {k}]",
            hint="quantize_tokens(x, dtype, paired=True) makes codes and scales of activations",
        )
    if header.has_table or header.has_columns or (header.span != WHOLE and header.span < SMALLEST_GROUP):
        raise TilusError(
            f"w4a8_linear of {header.scheme} {header.dtype} in groups of {header.group}, expected no table, "
            f"columns in their order and groups of a multiple of {SMALLEST_GROUP}",
            hint="`linear` takes every scheme, with 16-bit activations",
        )
    exponent_of(header.dtype, TYPES[kind], header.has_zeros)  # raises where the types do not fit
    if tuple(x_scale.shape) != (x.shape[0],):
        raise TilusError(f"w4a8_linear: x_scale has shape {list(x_scale.shape)}, expected {[int(x.shape[0])]}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise TilusError(f"w4a8_linear: bias has shape {list(bias.shape)}, expected {[n]} for the weight of {[n, k]}")
