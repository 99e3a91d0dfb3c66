"""Quantised linear layers: y = x W^T for weights of any 1- to 8-bit type, with group scales and optional minimums.

The weight is the left operand of the tensor cores and tokens are columns, so one packed weight serves every batch size and a
batch of one wastes no rows. Weights go straight from global memory to registers, the next tile on its way while this one is
multiplied. The warps of a block work on different tiles along K and add up at the end; blocks may split K further.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tilus
from tilus import Const, Tensor, config, f16, f32, int32, uint8
from tilus.codegen.cast_plan import scale_exponent
from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.quantize import (
    TILE,
    QuantizedWeight,
    activation_layout,
    byte_layout,
    fragment_layout,
    scale_layout,
)  # fmt: skip

EMULATED_SMS = 132  # an H100


def weight_tile(
    raw, scales, minimums, wdtype: DataType, act: DataType, groups: int, warps: int, folded: bool, packed_for: DataType
):
    """Dequantise one 64x64 tile per warp: [warps, 64, 64] of `act`, from its bytes and its scales [warps, groups, 8, 8].

    folded: the exponent bias of the codes is made up for by the scales, which are few, and not by the codes.
    """
    values = tilus.unpack_codes(
        raw, wdtype, act, [warps, TILE, TILE], fragment_layout(warps), packed_for=packed_for, scaled=folded
    )
    # Packed columns are [j, h, t, e]; t // (4 / groups) is the group.
    split = tilus.reshape(values, [warps, TILE, 4, 2, groups, 4 // groups, 2])
    scale = row_factors(scales, act, groups, warps)
    if folded:
        scale = scale * 2.0 ** scale_exponent(wdtype, act)
    if minimums is None:
        scaled = split * scale
    else:
        scaled = tilus.fma(split, scale, row_factors(minimums, act, groups, warps))
    return tilus.reshape(scaled, [warps, TILE, TILE])


def row_factors(tile, act: DataType, groups: int, warps: int):
    """[warps, groups, row % 8, row // 8] as a factor that broadcasts over the columns of a weight tile."""
    by_row = tilus.transpose(tilus.cast(tile, act), [0, 3, 2, 1])
    return tilus.reshape(by_row, [warps, TILE, 1, 1, groups, 1, 1])


def activation_tile(x, tokens: int, warps: int):
    """[tokens, warps * 64] as the right operand [warps, 64, tokens], its rows in the column order of packed weights."""
    split = tilus.reshape(x, [tokens, warps, 4, 4, 2, 2])
    return tilus.reshape(tilus.transpose(split, [1, 3, 4, 2, 5, 0]), [warps, TILE, tokens])


@tilus.kernel
def quantized_linear(
    x: Tensor["act", "m", "k"],
    codes: Tensor[uint8, "tiles_n", "tiles_k", "tile_nbytes"],
    scales: Tensor[f16, "tiles_n", "tiles_k", "groups", 8, 8],
    y: Tensor["out", "m", "n"],
    minimums: Tensor[f16, "tiles_n", "tiles_k", "groups", 8, 8] = None,
    partial: Tensor[f32, "splits", "m", "n"] = None,
    tickets: Tensor[int32, "blocks"] = None,
    *,
    wdtype: Const,
    groups: Const,
    tokens: Const,
    warps: Const,
    folded: Const = False,
    packed_for: Const = f16,
):
    m = y.shape[0]
    splits = 1 if partial is None else partial.shape[0]
    tilus.grid(codes.shape[0], tilus.cdiv(m, tokens), splits, warps=warps, blocks_per_sm=2 if tokens == 8 else 1)
    row_tile = tilus.block_id(0)
    first_token = tilus.block_id(1) * tokens
    tile_count = codes.shape[1]
    per_split = tilus.cdiv(tilus.cdiv(tile_count, warps), splits) * warps
    begin = tilus.block_id(2) * per_split
    end = min(begin + per_split, tile_count)

    raw_shape = [warps, 512 * wdtype.nbits]
    raw_layout = byte_layout(wdtype, warps)
    factor_shape = [warps, groups, 8, 8]
    factor_layout = scale_layout(groups, warps)
    acc = tilus.zeros([warps, TILE, tokens], f32)
    raw = tilus.load(codes, [row_tile, begin, 0], shape=raw_shape, layout=raw_layout)
    scale = tilus.load(scales, [row_tile, begin, 0, 0, 0], shape=factor_shape, layout=factor_layout)
    for tile in tilus.range(begin, end, warps):
        act_tile = tilus.load(
            x, [first_token, tile * TILE], shape=[tokens, warps * TILE], layout=activation_layout(tokens, warps)
        )
        raw_now = raw
        scale_now = scale
        minimum_now = None
        if minimums is not None:
            minimum_now = tilus.load(minimums, [row_tile, tile, 0, 0, 0], shape=factor_shape, layout=factor_layout)
        raw = tilus.load(codes, [row_tile, tile + warps, 0], shape=raw_shape, layout=raw_layout)
        scale = tilus.load(scales, [row_tile, tile + warps, 0, 0, 0], shape=factor_shape, layout=factor_layout)
        w = weight_tile(raw_now, scale_now, minimum_now, wdtype, x.dtype, groups, warps, folded, packed_for)
        acc = tilus.dot(w, activation_tile(act_tile, tokens, warps), acc)

    total = tilus.sum(acc, axis=0)
    if partial is None:
        tilus.store(y, [first_token, row_tile * TILE], tilus.cast(total, y.dtype), dims=[1, 0])
    else:
        tilus.store(partial, [tilus.block_id(2), first_token, row_tile * TILE], total, dims=[2, 1])
        reduce_splits(y, partial, tickets, first_token, row_tile, tokens, splits)


def reduce_splits(y, partial, tickets, first_token, row_tile, tokens: int, splits):
    """The block that arrives last adds up the partial sums, always in the same order, and resets the counter."""
    slot = tilus.block_id(1) * tilus.grid_dim(0) + row_tile
    arrived = tilus.atomic_add(tickets, [slot], 1)
    if arrived == splits - 1:
        summed = tilus.load(partial, [0, first_token, row_tile * TILE], shape=[tokens, TILE])
        for split in tilus.range(1, splits):
            summed = summed + tilus.load(partial, [split, first_token, row_tile * TILE], shape=[tokens, TILE])
        tilus.store(y, [first_token, row_tile * TILE], tilus.cast(summed, y.dtype))
        tilus.atomic_add(tickets, [slot], -splits)


@dataclass(frozen=True)
class Schedule:
    """How a product is cut: tokens per block, warps along K per block, blocks along K per tile."""

    tokens: int
    warps: int
    splits: int


@lru_cache(maxsize=4096)
def schedule(m: int, tiles_n: int, tiles_k: int, nbits: int, num_sms: int) -> Schedule:
    """A schedule for a GPU: enough blocks to fill it, at least two tiles per warp and split. Chosen from a sweep on an H100.

    num_sms 0 stands for the reference execution, which likes few large tiles.
    """
    if num_sms == 0:
        return Schedule(max(8, min(64, -(-m // 8) * 8)), min(tiles_k, 32), 1)
    if m <= 16:
        tokens = 8 if m <= 8 else 16
    else:  # 32 tokens a block read each weight half as often, 16 fill a GPU twice as easily
        tokens = 32 if 2 * tiles_n * -(-m // 32) >= 3 * num_sms else 16
    blocks = tiles_n * -(-m // tokens)
    if tokens == 32:
        return Schedule(tokens, min(2, tiles_k), 1)
    if blocks >= num_sms:
        warps = 8 if tokens == 8 and nbits <= 6 else 4  # eight warps of wider codes have too few registers
        return Schedule(tokens, min(warps, tiles_k), 1)
    warps = min(4, tiles_k)
    return Schedule(tokens, warps, max(1, min(2 * num_sms // blocks, tiles_k // (2 * warps), 16)))


def linear(
    x: Any, weight: QuantizedWeight, *, out_dtype: Any = None, out: Any = None, device: str | None = None
) -> Any:
    """x [M, K] of f16 or bf16 times the transpose of a packed weight (N, K): [M, N] of `out_dtype` (default: that of x).

    x, out: torch tensors or numpy arrays, on the weight's device. out: written in place when given. device: where to run
    (reference, emulator, cuda), by default as the arguments say.
    Raises: TilusError when K, dtypes or devices do not fit.
    """
    n, k = weight.shape
    if x.ndim != 2 or x.shape[1] != k:
        raise TilusError(f"linear: x has shape {list(x.shape)}, the weight is {[n, k]}", hint=f"x must be [M, {k}]")
    if str(x.dtype).removeprefix("torch.") not in ("float16", "bfloat16"):
        raise TilusError(f"linear: x has dtype {x.dtype}, expected float16 or bfloat16", hint="convert it: x.half()")
    m = int(x.shape[0])
    y = empty(x, (m, n), out_dtype) if out is None else out
    if m == 0:
        return y
    tiles_n, tiles_k = int(weight.codes.shape[0]), int(weight.codes.shape[1])
    plan = schedule(m, tiles_n, tiles_k, weight.dtype.nbits, _num_sms(x, device))
    partial = tickets = None
    if plan.splits > 1:
        partial = empty(x, (plan.splits, m, n), "float32")
        tickets = counters(x, tiles_n * -(-m // plan.tokens))
    quantized_linear.on(device)(
        x, weight.codes, weight.scales, y, weight.minimums, partial, tickets,
        wdtype=weight.dtype, groups=weight.groups_per_tile, tokens=plan.tokens, warps=plan.warps,
        folded=weight.folded, packed_for=weight.packed_for,
    )  # fmt: skip
    return y


def _num_sms(x: Any, device: str | None) -> int:
    """Of the GPU that the product is made for: the one that runs it, or the one that the emulator stands for."""
    if is_cuda(x):
        from tilus.runtime import cuda

        return cuda.device(x.get_device()).num_sms
    match device or config.device():
        case "cuda":
            from tilus.runtime import cuda

            return cuda.current_device().num_sms
        case "emulator":
            return EMULATED_SMS
        case _:
            return 0
