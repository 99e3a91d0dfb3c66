"""Linear layers of 4-bit weights and 8-bit activations on Hopper: y = x W^T + b from the packed weights of `linear`.

Twice the products of 16-bit operands for each instruction, and half of their activations to read. Codes become 8-bit operands in
registers, without a conversion:

- int8: a word of packed codes has eight of them, and `word & 0xf0f0f0f0` are four bytes of 16 times a code. So are those of
  `word << 4`.
- float8_e4m3: in its lowest four bits a byte counts 0 to 15 steps of 2^-9, subnormal numbers and the first normal ones alike.
  So a code's magnitude, with its sign on top, is the code times 2^-9.

Both factors go into the scales. Four bytes of a word are one row's columns 2 t, 2 t + 8, 2 t + 1 and 2 t + 9 of 16, where
products of 8-bit operands want four neighbours. `quantize_tokens(paired=True)` writes activations in that order, so one packed
weight serves all. Sums of a group are exact for int8 and scaled in f32.

Blocks take tiles in turn, and those of a cluster may share a tile along K, as in `gemm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import tilus
from tilus import Const, Tensor, f32, uint8, uint32
from tilus.dtypes import DTYPES, DataType, float8_e4m3, int4, int8
from tilus.errors import TilusError
from tilus.kernels.allocate import empty, is_cuda
from tilus.kernels.quantize.header import WeightHeader
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import MMA, TILE, WHOLE
from tilus.kernels.shared_sums import MOST_SPLITS, SharedSums, splits_of
from tilus.kernels.warpgroup_operands import Shape, Unpacking, copy_weights, tile_nbytes
from tilus.kernels.warpgroup_ring import (
    COPYING,
    MOST_STAGES,
    MOST_TOKENS,
    SHARED_NBYTES,
    Ring,
    launch_without_spills,
    num_sms_of,
)
from tilus.layout import local, spatial
from tilus.layout.atoms import wgmma_a
from tilus.runtime.execute import place

FACTORS = {int8: 2.0**-4, float8_e4m3: 2.0**9}  # of what codes become
SMALLEST_GROUP = 32  # columns of a product of 8-bit operands


@dataclass(frozen=True)
class W4A8Plan:
    """One launch: tokens and tiles of 64 rows of a block's tile, tiles of 64 columns in a step, steps on their way, blocks of a
    cluster that share a tile along K, blocks of the grid. Each row of tiles has a warpgroup of its own. overlap: as in
    `GroupedPlan`."""

    tokens: int
    rows: int
    depth: int
    stages: int
    splits: int
    blocks: int
    overlap: bool = False

    def shape(self, span: int) -> Shape:
        return Shape(span, self.rows, self.depth, self.tokens, TILE if self.overlap else 2 * TILE)


@tilus.kernel
def w4a8_linear_kernel(
    x: Tensor["act", "m", "k"],
    x_scale: Tensor[f32, "m"],
    codes: Tensor[uint8, "tiles_n", "codes_nbytes"],
    scales: Tensor[uint8, "tiles_n", "scales_nbytes"],
    y: Tensor["out", "m", "n"],
    global_scale: f32,
    bias: Tensor["bias_type", "n"] = None,
    *,
    scale_dtype: Const,
    span: Const,
    plan: Const,
):
    rows, stages, tokens, splits = plan.rows, plan.stages, plan.tokens, plan.splits
    shape = plan.shape(span)
    ahead = int(plan.overlap)  # products under way while the next piece is unpacked
    consumers, (producers, registers, registers_to_copy) = 4 * rows, COPYING[rows]
    tilus.grid(plan.blocks, warps=consumers + producers, cluster=splits)
    step_nbytes = plan.depth * tile_nbytes(int4)
    all_steps = codes.shape[1] // step_nbytes
    split = tilus.cluster_rank()
    begin = split * all_steps // splits
    steps = (split + 1) * all_steps // splits - begin

    factors = [(scales, scale_dtype)]
    stage_codes = tilus.shared(uint8, [stages, rows, step_nbytes])
    stage_x = tilus.shared(x.dtype, [stages, tokens, shape.columns])
    stage_scales = None
    if span != WHOLE:
        stage_scales = tilus.shared(uint8, [stages, rows, shape.sets * TILE * scale_dtype.nbytes])
    full, empty = tilus.mbarrier(stages), tilus.mbarrier(stages)
    shared_sums = None if splits == 1 else SharedSums(f32, [rows * TILE, tokens], splits)
    tilus.cluster_sync()
    tilus.launch_dependents()

    teams, first = plan.blocks // splits, tilus.block_id(0) // splits
    token_tiles, row_tiles = tilus.cdiv(y.shape[0], tokens), tilus.cdiv(codes.shape[0], rows)
    count = tilus.cdiv(token_tiles * row_tiles - first, teams)

    with tilus.warps(consumers, producers, registers=registers_to_copy):
        tilus.wait_dependencies(constant=[codes, scales, bias])
        nbytes = stage_codes[0].nbytes + stage_x[0].nbytes + (0 if stage_scales is None else stage_scales[0].nbytes)
        filling = Ring(full, empty, stages)
        for index in tilus.range(count):
            item = first + index * teams
            for step in tilus.range(steps):
                stage = filling.next_to_fill(nbytes)
                row_tile = item // token_tiles * rows
                copy_weights(codes, factors, stage_codes, [stage_scales], full, stage, row_tile, begin + step, shape)
                start = [item % token_tiles * tokens, (begin + step) * shape.columns]
                tilus.copy_tensor(stage_x[stage], x, start, barrier=full[stage])

    with tilus.warps(0, consumers, registers=registers):
        tilus.wait_dependencies(constant=[codes, scales, bias])
        unpacked = Unpacking(int4, (scale_dtype, None), x.dtype, None, 0, shape)
        using = Ring(full, empty, stages)
        for index in tilus.range(count):
            item = first + index * teams
            row_tile, token = item // token_tiles * rows, item % token_tiles * tokens
            once = unpacked.whole([*factors, (None, None), (None, None)], row_tile) if span == WHOLE else None
            total = tilus.zeros([TILE * rows, tokens], f32)
            for _ in tilus.range(steps):
                stage = using.next_to_use()
                under_way = []
                for piece in range(shape.pieces):
                    scale, _, _ = (
                        once if once is not None else unpacked.factors([stage_scales, None, None], stage, piece)
                    )
                    left = operand(stage_codes, stage, piece, x.dtype, shape)
                    offsets, extents = [0, piece * shape.width], (TILE * rows, tokens, shape.width)
                    part = tilus.wgmma(left, stage_x[stage], shape=extents, y_offsets=offsets)
                    under_way = [*under_way, (part, scale)]
                    if piece >= ahead:
                        tilus.wgmma_wait(ahead)
                        total = scaled(total, *under_way[piece - ahead])
                if ahead:
                    tilus.wgmma_wait()
                    total = scaled(total, *under_way[shape.pieces - 1])
                tilus.arrive(empty[stage])
            row = row_tile * TILE
            if shared_sums is not None:
                total = shared_sums.own_rows(total, split, index)
                row += split * (rows * TILE // splits)
            result = total * (global_scale * FACTORS[x.dtype]) * tilus.load(x_scale, [token], [tokens])
            if bias is not None:
                offset = tilus.cast(tilus.load(bias, [row], [result.shape[0]]), f32)
                result = result + tilus.reshape(offset, [result.shape[0], 1])
            tilus.store(y, [token, row], tilus.cast(result, y.dtype), dims=[1, 0])


def scaled(total, part, scale):
    return tilus.fma(part.to(f32), scale, total)


def operand(stage_codes, stage, piece: int, act: DataType, shape: Shape):
    """The codes [rows * 64, width] of a piece as numbers of `act` divided by FACTORS[act], columns paired."""
    tiles, threads = max(1, shape.width // TILE), 128 * shape.rows
    first, nbytes = piece * shape.width // TILE * tile_nbytes(int4), tiles * tile_nbytes(int4)
    layout = MMA.warpgroup_bytes(int4, shape.rows, 1, tiles).reshape((shape.rows, nbytes))
    raw = tilus.load_shared(stage_codes[stage], [0, first], [shape.rows, nbytes], layout=layout)
    words = tilus.view(raw, uint32, [threads, 4 * tiles, 1], spatial(threads, 1, 1) * local(1, 4 * tiles, 1))
    which = tilus.reshape(tilus.arange(2), [1, 1, 2]).to(
        uint32
    )  # of the two rows of a thread that have codes in a word
    if act == int8:
        four = words << (4 - 4 * which) & 0xF0F0F0F0
    else:
        codes = words >> 4 * which & 0x0F0F0F0F
        negative = codes >> 3 & 0x01010101
        four = (codes ^ 15 * negative) + negative | negative << 7
    fragments = spatial(shape.rows, 1) * local(1, 2 * tiles) * wgmma_a(8)
    four = tilus.with_layout(four, spatial(threads, 1, 1) * local(1, 4 * tiles, 2))
    numbers = tilus.view(four, act, [TILE * shape.rows, TILE * tiles], fragments)
    if shape.width < TILE:
        parts = TILE // shape.width
        numbers = tilus.select(tilus.reshape(numbers, [TILE * shape.rows, parts, shape.width]), 1, piece % parts)
    return numbers


def plans(m: int, header: WeightHeader, num_sms: int) -> Iterator[W4A8Plan]:
    """The best plan, then those that need fewer registers: the fewest tokens that hold all, and tiles with as many rows as leave
    work for all multiprocessors, which share them along K where they are too few."""
    tiles_n, tiles_k = header.shape[0] // TILE, header.shape[1] // TILE
    best = next((tokens for tokens in (8, 16, 32) if tokens >= m), 64)
    for tokens in (tokens for tokens in (64, 32, 16, 8) if tokens <= best):
        token_tiles = -(-m // tokens)
        fitting = [rows for rows, most in MOST_TOKENS.items() if tiles_n % rows == 0 and tokens <= most]
        busy = [rows for rows in fitting if tiles_n // rows * token_tiles * MOST_SPLITS * 4 >= num_sms * 3]
        for rows in busy or fitting[-1:]:
            tiles = tiles_n // rows * token_tiles
            for depth in (depth for depth in (2, 1) if tiles_k % depth == 0):
                splits = splits_of(tiles, tiles_k // depth, num_sms)
                blocks = max(splits, min(tiles * splits, num_sms // splits * splits))
                overlap = rows < 4 and tokens < 64
                plan = W4A8Plan(tokens, rows, depth, MOST_STAGES, splits, blocks, overlap)
                room = SHARED_NBYTES - (splits > 1) * 4 * rows * TILE * tokens
                yield replace(plan, stages=min(MOST_STAGES, room // stage_nbytes(header, plan)))


def stage_nbytes(header: WeightHeader, plan: W4A8Plan) -> int:
    """Of shared memory for a stage."""
    shape = plan.shape(header.span)
    per_set = 0 if header.span == WHOLE else DTYPES[header.scale_dtype].nbytes
    weights_nbytes = plan.rows * (plan.depth * tile_nbytes(int4) + shape.sets * TILE * per_set)
    return weights_nbytes + plan.tokens * shape.columns


def w4a8_linear(
    x: Any, x_scale: Any, weight: QuantizedWeight, *, out_dtype: Any = None, bias: Any | None = None, out: Any = None,
    device: str | None = None,
) -> Any:  # fmt: skip
    """Codes x [M, K] of activations, times x_scale [M], times the transpose of a packed weight (N, K), plus a bias: [M, N].

    x, x_scale: as `quantize_tokens(..., paired=True)` makes them, int8 or float8_e4m3 and f32. weight: int4 with one scale for a
    group of a multiple of 32 or of all columns, and nothing else, packed for GPUs; N and K are multiples of 64. bias: f16, bf16
    or f32 [N]. out_dtype: f16, bf16 or f32, needed unless out is given, which is written in place. device: where to run
    (reference, emulator, cuda: sm_90a), by default as the arguments say.

    The sum of a group is exact for int8; for float8_e4m3 hardware keeps some 14 bits of it. It is scaled and added to the others
    in f32, and the result is rounded once. The kernel may start while the one in front of it runs, and then reads the weight and
    the bias, as in `linear`.
    Raises: TilusError when shapes or dtypes do not fit, and for weights of other schemes.
    """
    _check(x, x_scale, weight, bias)
    if out is None and out_dtype is None:
        raise TilusError("w4a8_linear without out_dtype", hint="choose one: float16, bfloat16 or float32")
    m, n = int(x.shape[0]), weight.shape[0]
    y = empty(x, (m, n), out_dtype) if out is None else out
    if m == 0:
        return y
    where = place(device, is_cuda(x))
    key = ("w4a8", m, x.dtype, y.dtype, bias is None, where)
    candidates = plans(m, weight.header, num_sms_of(x, where))
    launch_without_spills(weight, key, candidates, lambda plan: launch(x, x_scale, weight, y, bias, plan, device))
    return y


def launch(
    x: Any, x_scale: Any, weight: QuantizedWeight, y: Any, bias: Any | None, plan: W4A8Plan, device: str | None
) -> None:  # fmt: skip
    """The kernel with a given plan."""
    header = weight.header
    codes, scales = (array.reshape(array.shape[0], -1) for array in (weight.codes, weight.scales))
    w4a8_linear_kernel.on(device)(
        x, x_scale, codes, scales, y, header.global_scale, bias,
        scale_dtype=DTYPES[header.scale_dtype], span=header.span, plan=plan,
    )  # fmt: skip


def _check(x: Any, x_scale: Any, weight: QuantizedWeight, bias: Any | None) -> None:
    n, k = weight.shape
    header = weight.header
    if header.dtype != int4 or header.scheme != "symmetric" or (header.span != WHOLE and header.span < SMALLEST_GROUP):
        raise TilusError(
            f"w4a8_linear of {header.scheme} {header.dtype} in groups of {header.group}, expected symmetric int4 in groups of a "
            f"multiple of {SMALLEST_GROUP}",
            hint="`linear` takes every scheme, with 16-bit activations",
        )
    if header.order != MMA or n % TILE or k % TILE:
        raise TilusError(
            f"w4a8_linear of a weight {[n, k]} in the order {header.order}, expected multiples of {TILE} in the order {MMA}",
            hint='pack it for a GPU: pack(matrix, device, order="mma")',
        )
    kind = str(x.dtype).removeprefix("torch.")
    if x.ndim != 2 or x.shape[1] != k or kind not in ("int8", "float8_e4m3fn"):
        raise TilusError(
            f"w4a8_linear: x is {kind}{list(x.shape)}, expected int8 or float8_e4m3fn [M, {k}]",
            hint="quantize_tokens(x, dtype, paired=True) makes codes and scales of activations",
        )
    if tuple(x_scale.shape) != (x.shape[0],):
        raise TilusError(f"w4a8_linear: x_scale has shape {list(x_scale.shape)}, expected {[int(x.shape[0])]}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise TilusError(f"w4a8_linear: bias has shape {list(bias.shape)}, expected {[n]} for the weight of {[n, k]}")
