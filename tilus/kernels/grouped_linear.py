"""Quantised linear layers of many experts in one launch (mixture of experts), on Hopper: each row of x times its expert's weight.

Rows come sorted by expert, and where an expert's rows begin is read on the GPU: the host waits for nothing. A product is cut
into items of one expert, `rows` tiles of 64 rows of its weight and `tokens` rows of x. As many blocks as run at once share the
items in turn, token tiles of the same weight beside each other, so that only one of them reads it from memory. The ring of stages
goes on from item to item: while the last steps of one are multiplied, weights of the next are on their way. An expert without
rows has no items.

A token tile may reach into the rows of the next expert; what it computes there is not stored. Steps are those of
`warpgroup_linear`: sums of a group are scaled in f32, and no weight is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import tilus
from tilus import Const, Tensor, f16, f32, int32, uint8
from tilus.dtypes import DTYPES
from tilus.errors import TilusError
from tilus.kernels.allocate import empty, is_cuda
from tilus.kernels.columns import take_columns
from tilus.kernels.linear_step import residual
from tilus.kernels.quantize.header import WeightHeader
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import MMA, TILE, WHOLE
from tilus.kernels.warpgroup_operands import Shape, Unpacking, copy_weights, table_entries, tile_nbytes
from tilus.kernels.warpgroup_products import scaled_sum
from tilus.kernels.warpgroup_ring import (
    COPYING,
    MOST_STAGES,
    MOST_TOKENS,
    SHARED_NBYTES,
    Ring,
    launch_without_spills,
    num_sms_of,
)
from tilus.runtime.execute import place


@dataclass(frozen=True)
class GroupedPlan:
    """One launch: rows of x and tiles of 64 rows of a weight in an item, tiles of 64 columns in a step, steps on their way,
    blocks. Each row of tiles has a warpgroup of its own. overlap: a warpgroup unpacks columns while those before them are
    multiplied, where there are no others that do."""

    tokens: int
    rows: int
    depth: int
    stages: int
    blocks: int
    overlap: bool = False

    def shape(self, span: int) -> Shape:
        return Shape(span, self.rows, self.depth, self.tokens, TILE if self.overlap else 2 * TILE)


@tilus.kernel
def grouped_linear_kernel(
    x: Tensor["act", "m", "k"],
    codes: Tensor[uint8, "tiles", "codes_nbytes"],
    scales: Tensor[uint8, "tiles", "scales_nbytes"],
    y: Tensor["out", "m", "n"],
    offsets: Tensor[int32, "bounds"],
    global_scale: f32,
    mins: Tensor[uint8, "tiles", "mins_nbytes"] = None,
    zeros: Tensor[uint8, "tiles", "zeros_nbytes"] = None,
    table: Tensor[f32, 16] = None,
    bias: Tensor["bias_type", "experts", "n"] = None,
    *,
    wdtype: Const,
    scale_dtype: Const,
    mins_dtype: Const = None,
    span: Const,
    plan: Const,
):
    rows, stages, tokens = plan.rows, plan.stages, plan.tokens
    shape = plan.shape(span)
    ahead = int(plan.overlap)  # products under way while the next piece is unpacked
    consumers, (producers, registers, registers_to_copy) = 4 * rows, COPYING[rows]
    tilus.grid(plan.blocks, warps=consumers + producers)
    tilus.launch_dependents()
    expert_tiles = y.shape[1] // TILE
    step_nbytes = plan.depth * tile_nbytes(wdtype)
    steps = codes.shape[1] // step_nbytes

    factors = [(scales, scale_dtype), (mins, mins_dtype), (zeros, f16)]
    stage_codes = tilus.shared(uint8, [stages, rows, step_nbytes])
    stage_x = tilus.shared(x.dtype, [stages, tokens, shape.columns])
    stage_factors = [
        None
        if array is None or span == WHOLE
        else tilus.shared(uint8, [stages, rows, shape.sets * TILE * dtype.nbytes])
        for array, dtype in factors
    ]
    full, empty = tilus.mbarrier(stages), tilus.mbarrier(stages)

    with tilus.warps(consumers, producers, registers=registers_to_copy):
        tilus.wait_dependencies(constant=[codes, scales, mins, zeros, table, bias])
        nbytes = stage_codes[0].nbytes + stage_x[0].nbytes
        for buffer in stage_factors:
            if buffer is not None:
                nbytes = nbytes + buffer[0].nbytes
        filling = Ring(full, empty, stages)

        def fill(expert, row_tile, token, end):
            for step in tilus.range(steps):
                stage = filling.next_to_fill(nbytes)
                first = expert * expert_tiles + row_tile
                copy_weights(codes, factors, stage_codes, stage_factors, full, stage, first, step, shape)
                tilus.copy_tensor(stage_x[stage], x, [token, step * shape.columns], barrier=full[stage])

        each_item(offsets, x.shape[0], expert_tiles, plan, fill)

    with tilus.warps(0, consumers, registers=registers):
        tilus.wait_dependencies(constant=[codes, scales, mins, zeros, table, bias])
        exponent = residual(wdtype, x.dtype, table, zeros, MMA)
        entries = table_entries(table, x.dtype, 32 * consumers)
        unpacked = Unpacking(wdtype, (scale_dtype, mins_dtype), x.dtype, entries, exponent, shape)
        using = Ring(full, empty, stages)

        def multiply(expert, row_tile, token, end):
            once = unpacked.whole(factors, expert * expert_tiles + row_tile) if span == WHOLE else None
            total = tilus.zeros([TILE * rows, tokens], f32)
            for _ in tilus.range(steps):
                stage = using.next_to_use()
                under_way = []
                for piece in range(shape.pieces):
                    scale, minimum, zero = once if once is not None else unpacked.factors(stage_factors, stage, piece)
                    left = unpacked.weights(stage_codes, stage, piece, zero)
                    offsets_of_piece, extents = [0, piece * shape.width], (TILE * rows, tokens, shape.width)
                    part = tilus.wgmma(left, stage_x[stage], shape=extents, y_offsets=offsets_of_piece)
                    sum_x = None
                    if minimum is not None:
                        ones = tilus.full([TILE * rows, shape.width], 1.0, x.dtype)
                        sum_x = tilus.wgmma(ones, stage_x[stage], shape=extents, y_offsets=offsets_of_piece)
                    under_way = [*under_way, (part, scale, sum_x, minimum)]
                    if piece >= ahead:
                        tilus.wgmma_wait(ahead if minimum is None else 2 * ahead)
                        total = scaled_sum(total, *under_way[piece - ahead])
                if ahead:
                    tilus.wgmma_wait()
                    total = scaled_sum(total, *under_way[shape.pieces - 1])
                tilus.arrive(empty[stage])
            result = total * (global_scale * 2.0**exponent)
            if bias is not None:
                added = tilus.cast(tilus.load(bias[expert], [row_tile * TILE], [TILE * rows]), f32)
                result = result + tilus.reshape(added, [TILE * rows, 1])
            own = tilus.narrow(y, 0, 0, end)  # rows behind it are those of other experts
            tilus.store(own, [token, row_tile * TILE], tilus.cast(result, y.dtype), dims=[1, 0])

        each_item(offsets, x.shape[0], expert_tiles, plan, multiply)


def each_item(offsets, num_rows, expert_tiles, plan: GroupedPlan, work):
    """`work(expert, tile of its weight, first row of x, end of the expert's rows)` for every item of this block."""
    start = tilus.block_id(0)  # this block's next item, counted from the first one of the expert
    for expert in tilus.range(offsets.shape[0] - 1):
        begin, end = offsets[expert], min(offsets[expert + 1], num_rows)
        token_tiles = tilus.cdiv(max(end - begin, 0), plan.tokens)
        count = token_tiles * (expert_tiles // plan.rows)
        own = tilus.cdiv(max(count - start, 0), plan.blocks)
        for index in tilus.range(own):
            item = start + index * plan.blocks
            work(expert, item // token_tiles * plan.rows, begin + item % token_tiles * plan.tokens, end)
        start = start + own * plan.blocks - count


def plans(m: int, experts: int, header: WeightHeader, num_sms: int) -> Iterator[GroupedPlan]:
    """For m rows of x and a stacked weight: the best plan, then those that need fewer registers.

    Without knowing how many rows each expert has, tiles hold twice the mean: a second tile reads its weights from the L2 cache,
    while a larger one costs every expert. Few rows leave registers for four warpgroups.
    """
    tiles_n, tiles_k = header.shape[0] // TILE // experts, header.shape[1] // TILE
    best = next((tokens for tokens in (8, 16, 32) if 2 * m <= tokens * experts), 64)
    for tokens in (tokens for tokens in (64, 32, 16, 8) if tokens <= best):
        for rows in (rows for rows, most in MOST_TOKENS.items() if tiles_n % rows == 0 and tokens <= most):
            for depth in (depth for depth in (2, 1) if tiles_k % depth == 0):
                items = tiles_n // rows * (min(experts, m) + m // tokens)
                overlap = (
                    rows < 4 and tokens < 64
                )  # four warpgroups unpack in turn, sums of 64 tokens leave no registers
                plan = GroupedPlan(tokens, rows, depth, MOST_STAGES, min(max(num_sms, 1), items), overlap)
                stages = min(MOST_STAGES, SHARED_NBYTES // stage_nbytes(header, plan))
                if stages >= 2:
                    yield replace(plan, stages=stages)


def stage_nbytes(header: WeightHeader, plan: GroupedPlan) -> int:
    """Of shared memory for a stage; all tiles start at multiples of 1024."""
    shape = plan.shape(header.span)
    factors = [header.scale_dtype, header.mins_dtype, f16.name if header.has_zeros else None]
    per_set = 0 if header.span == WHOLE else sum(DTYPES[name].nbytes for name in factors if name is not None)
    weights_nbytes = plan.rows * (plan.depth * tile_nbytes(header.dtype) + shape.sets * TILE * per_set)
    return weights_nbytes + plan.tokens * shape.columns * f16.nbytes


def grouped_linear(
    x: Any, weight: QuantizedWeight, offsets: Any, *, bias: Any | None = None, out_dtype: Any = None, out: Any = None,
    device: str | None = None,
) -> Any:  # fmt: skip
    """Rows of x [M, K], sorted by expert, each times the transpose of its expert's weight (N, K), plus its bias: [M, N] (sm_90a).

    x: f16 or bf16, rows contiguous; K is a multiple of 64. weight: those of all experts on top of each other (`quantize.stack`),
    [experts * N, K], packed for GPUs; N is a multiple of 64. offsets: int32 [experts + 1] where x is, from 0 to M without going
    down: expert e has the rows from offsets[e] to before offsets[e + 1]. What is outside of all is not written.
    bias: f16, bf16 or f32 [experts, N]. out_dtype: by default that of x. out: written in place when given. device: where to run
    (reference, emulator, cuda), by default as the arguments say.

    One launch, and nothing is read back: offsets may come from the kernel in front. As in `linear`, the kernel may start while
    that one runs, and then reads the weight and the bias; results are as exact.
    Raises: TilusError when shapes, dtypes or the order of the weight do not fit.
    """
    experts, header = int(offsets.shape[0]) - 1, weight.header
    _check(x, weight, offsets, bias)
    m, n = int(x.shape[0]), weight.shape[0] // experts
    y = empty(x, (m, n), out_dtype) if out is None else out
    if m == 0:
        return y
    ordered = x if weight.columns is None else take_columns(x, weight.columns, device=device)
    where = place(device, is_cuda(x))
    key = ("grouped", m, experts, x.dtype, y.dtype, bias is None, where)
    launch_without_spills(
        weight,
        key,
        plans(m, experts, header, num_sms_of(x, where)),
        lambda plan: launch(ordered, weight, y, offsets, bias, plan, device),
    )
    return y


def launch(
    x: Any, weight: QuantizedWeight, y: Any, offsets: Any, bias: Any | None, plan: GroupedPlan, device: str | None
) -> None:
    """The kernel with a given plan, on activations whose columns are in the order of the weight's."""
    header = weight.header
    codes, scales, mins, zeros = (
        None if array is None else array.reshape(array.shape[0], -1)
        for array in (weight.codes, weight.scales, weight.mins, weight.zeros)
    )
    grouped_linear_kernel.on(device)(
        x, codes, scales, y, offsets, header.global_scale, mins, zeros, weight.table, bias,
        wdtype=header.dtype, scale_dtype=DTYPES[header.scale_dtype],
        mins_dtype=None if header.mins_dtype is None else DTYPES[header.mins_dtype], span=header.span, plan=plan,
    )  # fmt: skip


def _check(x: Any, weight: QuantizedWeight, offsets: Any, bias: Any | None) -> None:
    rows, k = weight.shape
    kind = str(offsets.dtype).removeprefix("torch.")
    if offsets.ndim != 1 or offsets.shape[0] < 2 or kind != "int32":
        raise TilusError(
            f"grouped_linear: offsets are {kind}{list(offsets.shape)}, expected int32 [experts + 1]",
            hint="the cumulative numbers of rows, with a 0 in front: .to(torch.int32)",
        )
    experts = int(offsets.shape[0]) - 1
    if rows % (TILE * experts) or k % TILE:
        raise TilusError(
            f"grouped_linear: a weight of {[rows, k]} for {experts} experts, expected N and K to be multiples of {TILE}",
            hint="stack the experts' weights with tilus.kernels.quantize.stack",
        )
    if x.ndim != 2 or x.shape[1] != k:
        raise TilusError(f"grouped_linear: x has shape {list(x.shape)}, expected [M, {k}]")
    if str(x.dtype).removeprefix("torch.") not in ("float16", "bfloat16"):
        raise TilusError(
            f"grouped_linear: x has dtype {x.dtype}, expected float16 or bfloat16", hint="convert it: x.half()"
        )
    if bias is not None and tuple(bias.shape) != (experts, rows // experts):
        raise TilusError(f"grouped_linear: bias has shape {list(bias.shape)}, expected {[experts, rows // experts]}")
    if weight.header.order != MMA:
        raise TilusError(
            f"grouped_linear with a weight packed in the order {weight.header.order}, expected {MMA}",
            hint='pack it again: weight.to("cuda"), or pack(matrix, device, order="mma")',
        )
