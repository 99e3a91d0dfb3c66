"""Dense linear layers on Hopper: y = x W^T (+ bias) for 16-bit floats, 8-bit floats and 8-bit integers.

The weight is the left operand and tokens are columns, y^T = W x^T, so that a few tokens waste no rows of the tensor cores. A
block computes tiles of `rows` outputs by `tokens`, one after the other, and there are as many blocks as run at once. One
warpgroup brings operands (TMA) into a ring of stages. Two multiply them (wgmma), scale and round the sums, and give them to a
tensor copy; transposed stores to shared memory have put them in order. Meanwhile the stages of the next tile fill.

In a cluster, blocks with the same tokens bring one part of them each, for all. Or, where a product has fewer tiles than there
are multiprocessors, the blocks of a cluster share each tile: every one multiplies a part of K, and adds up, in the order of the
parts, what all have for its share of the rows. So the result does not depend on who is first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.dtypes import DataType
from tilus.kernels.allocate import empty, is_cuda
from tilus.kernels.linear import EMULATED_SMS, gpu_of
from tilus.lang.arguments import dtype_of_name
from tilus.runtime.autotune import chosen
from tilus.runtime.execute import place
from tilus.target import TARGETS

if TYPE_CHECKING:
    from tilus.runtime.cuda import Device

BAND = 8  # neighbouring rows of clusters that take turns, so that what they read is found in the L2 cache
CONSUMERS, PRODUCERS = 8, 4  # warps
ROW_NBYTES = 128  # of an operand's tile: the widest swizzle
ROWS = 128  # outputs of a tile: 64 for each warpgroup
MOST_TOKENS = 256
MOST_STAGES = 8
MOST_SPLITS = 4  # of K
MOST_SHARED_TOKENS = 64  # of tiles that blocks share: the sums of more leave no room for stages
CLUSTER_SMS = (
    16  # multiprocessors that clusters share, at least: a GPC's. The others may be too few for a whole cluster
)
STEPS_OF_SPLIT = 4  # at least, of ROW_NBYTES each: below that starting and adding up take longer than the steps


@tilus.kernel
def gemm_kernel(
    x: Tensor["act", "m", "k"],
    w: Tensor["weight", "n", "k"],
    y: Tensor["out", "m", "n"],
    scale: f32,
    blocks: int32,
    x_scale: Tensor[f32, "m"] = None,
    w_scale: Tensor[f32, "n"] = None,
    bias: Tensor["bias_type", "n"] = None,
    *,
    rows: Const = ROWS,
    tokens: Const = MOST_TOKENS,
    stages: Const = 4,
    cluster: Const = 1,
    splits: Const = 1,
):
    assert min(cluster, splits) == 1, "blocks of a cluster share tokens or tiles, not both"
    team = cluster * splits
    tilus.grid(blocks, warps=CONSUMERS + PRODUCERS, cluster=team)
    m, n = y.shape
    depth = ROW_NBYTES // x.dtype.nbytes
    w_tiles = tilus.shared(w.dtype, [stages, rows, depth])
    x_tiles = tilus.shared(x.dtype, [stages, tokens, depth])
    full, empty = tilus.mbarrier(stages), tilus.mbarrier(stages, arrivals=cluster)
    sum_type = int32 if x.dtype.is_integer else f32
    shared_sums = None if splits == 1 else SharedSums(sum_type, [rows, tokens], splits)
    tilus.cluster_sync()
    tilus.launch_dependents()
    tilus.wait_dependencies()

    rank, split = (tilus.cluster_rank(), 0) if splits == 1 else (0, tilus.cluster_rank())
    teams, first = blocks // team, tilus.block_id(0) // team
    all_steps = tilus.cdiv(x.shape[1], depth)
    begin = split * all_steps // splits
    steps = (split + 1) * all_steps // splits - begin
    token_tiles, row_tiles = tilus.cdiv(m, tokens), tilus.cdiv(n, rows * cluster)
    count = tilus.cdiv(token_tiles * row_tiles - first, teams)

    def tile_at(index):
        """Row and token at which a tile starts: bands of rows, in which rows vary fastest."""
        number = first + index * teams
        band = number // (BAND * token_tiles)
        height = min(row_tiles - band * BAND, BAND)
        within = number - band * BAND * token_tiles
        row = band * BAND + within % height
        return (row * cluster + rank) * rows, within // height * tokens

    with tilus.warps(CONSUMERS, PRODUCERS, registers=40):
        filled = 0
        for index in tilus.range(count):
            row, token = tile_at(index)
            for step in tilus.range(steps):
                stage = filled % stages
                tilus.wait_barrier(empty[stage], (filled // stages + 1) % 2)
                tilus.arrive(full[stage], nbytes=(rows + tokens) * ROW_NBYTES)
                column = (begin + step) * depth
                tilus.copy_tensor(w_tiles[stage], w, [row, column], barrier=full[stage])
                part = tokens // cluster
                tilus.copy_tensor(
                    x_tiles[stage], x, [token + rank * part, column], shape=[part, depth],
                    dst_offsets=[rank * part, 0], barrier=full[stage], multicast=None if cluster == 1 else (1 << cluster) - 1,
                )  # fmt: skip
                filled += 1

    with tilus.warps(0, CONSUMERS, registers=232):
        used = 0
        y_tiles = tilus.shared(y.dtype, [2, min(tokens, 64), rows // splits])
        for index in tilus.range(count):
            row, token = tile_at(index)
            total = tilus.zeros([rows, tokens], sum_type)
            for step in tilus.range(steps):
                tilus.wait_barrier(full[used % stages], used // stages % 2)
                total = tilus.wgmma(w_tiles[used % stages], x_tiles[used % stages], total)
                tilus.wgmma_wait(1)
                if step > 0:
                    give_back(empty, (used + stages - 1) % stages, cluster)
                used += 1
            tilus.wgmma_wait()
            give_back(empty, (used + stages - 1) % stages, cluster)
            if shared_sums is not None:
                total = shared_sums.own_rows(total, split, index)
                row += split * (rows // splits)
            by_row = row_factors(scale, w_scale, bias, row, rows // splits)
            store_tile(y, y_tiles, total, by_row, x_scale, row, token, index)
        tilus.wait_stores()


def give_back(empty, stage, cluster: int):
    """All blocks that bring parts of this stage may fill it again."""
    if cluster == 1:
        tilus.arrive(empty[stage])
    else:
        for rank in range(cluster):
            tilus.arrive(empty[stage], block=rank)


class SharedSums:
    """Adds up the sums [rows, tokens] of the blocks of a cluster, each block some of the rows."""

    def __init__(self, dtype: DataType, shape: list[int], splits: int):
        self.splits = splits
        self.parts = tilus.shared(dtype, shape)
        self.given, self.taken = tilus.mbarrier(arrivals=splits), tilus.mbarrier(arrivals=splits)

    def own_rows(self, total, split, index):
        """The sums of this block's rows of tile number `index`, [rows / splits, tokens]. `parts` holds a block's sums from when
        all have taken their rows of the tile before to when all have taken those of this one."""
        rows, tokens = self.parts.shape
        own = rows // self.splits
        tilus.wait_barrier(self.taken, (index + 1) % 2)
        tilus.store_shared(self.parts, total)
        for block in range(self.splits):
            tilus.arrive(self.given, block=block)
        tilus.wait_barrier(self.given, index % 2)
        summed = tilus.load_shared(self.parts, [split * own, 0], [own, tokens], block=0)
        for block in range(1, self.splits):
            summed = summed + tilus.load_shared(self.parts, [split * own, 0], [own, tokens], block=block)
        for block in range(self.splits):
            tilus.arrive(self.taken, block=block)
        return summed


def row_factors(scale, w_scale, bias, row, rows: int):
    """Factors and offsets of the rows of y^T, [rows, 1]; None where there are none."""
    factor = scale
    if w_scale is not None:
        factor = tilus.reshape(tilus.load(w_scale, [row], [rows]), [rows, 1]) * scale
    offset = None
    if bias is not None:
        offset = tilus.reshape(tilus.load(bias, [row], [rows]).to(f32), [rows, 1])
    return factor, offset


def store_tile(y, y_tiles, total, by_row, x_scale, row, token, number):
    """Scale and round the sums [rows, tokens], and start to store them as [tokens, rows], some tokens at a time. Two buffers take
    turns, from tile `number` to tile, too."""
    part = y_tiles.shape[1]
    rows, tokens = total.shape
    factor, offset = by_row
    parts = tilus.reshape(total, [rows, tokens // part, part])
    for index in range(tokens // part):
        result = tilus.select(parts, 1, index).to(f32) * factor
        if x_scale is not None:
            result = result * tilus.load(x_scale, [token + index * part], [part])
        if offset is not None:
            result = result + offset
        tilus.wait_stores(1, reads_only=True)
        tilus.sync()
        buffer = y_tiles[(number * (tokens // part) + index) % 2]
        tilus.store_shared(buffer, result.to(y.dtype).T)
        tilus.fence_async()
        tilus.sync()
        tilus.store_tensor(y, [token + index * part, row], buffer)
        tilus.commit_stores()


@dataclass(frozen=True)
class Plan:
    """One launch: tokens of a tile, stages of operands, blocks of a cluster that share tokens, blocks of the grid, and blocks
    of a cluster that share tiles. There are whole clusters."""

    tokens: int
    stages: int
    cluster: int
    blocks: int
    splits: int = 1


def plan(m: int, n: int, row_nbytes: int, num_sms: int, out_nbytes: int = 2) -> Plan:
    """For [m, k] @ [n, k]^T with rows of row_nbytes: the fewest tokens that hold all, or tiles of many while they fill the
    multiprocessors; stages as the shared memory allows; two or four blocks that share tiles where there are too few.

    Blocks that share tokens are for tuning to try: giving stages back across blocks took longer on an H100 than the copies
    that it saved (docs/performance.md)."""
    row_tiles = -(-n // ROWS)
    tokens = next((t for t in (16, 32, 64, 128) if t >= m), MOST_TOKENS)
    while tokens > 64 and row_tiles * -(-m // tokens) < num_sms // 2:
        tokens //= 2
    tiles = row_tiles * -(-m // tokens)
    splits = splits_of(tiles, -(-row_nbytes // ROW_NBYTES), num_sms) if tokens <= MOST_SHARED_TOKENS else 1
    return fitted(Plan(tokens, most_stages(tokens, out_nbytes, splits), 1, 0, splits), m, n, num_sms)


def splits_of(tiles: int, steps: int, num_sms: int) -> int:
    """How many blocks of a cluster share each of so many tiles along K, in so many steps, all of them running at once."""
    whole, splits = num_sms // CLUSTER_SMS * CLUSTER_SMS, 1
    while splits < MOST_SPLITS and tiles * splits * 2 <= whole and steps >= STEPS_OF_SPLIT * splits * 2:
        splits *= 2
    return splits


def most_stages(tokens: int, out_nbytes: int, splits: int = 1) -> int:
    """That the shared memory has room for."""
    stage_nbytes = (ROWS + tokens) * ROW_NBYTES
    buffers_nbytes = 2 * min(tokens, 64) * ROWS * out_nbytes // splits + (splits > 1) * 4 * ROWS * tokens
    room = TARGETS["sm_90a"].max_shared_nbytes - buffers_nbytes - 2048  # barriers, and starts of tiles
    return min(MOST_STAGES, room // stage_nbytes)


def fitted(found: Plan, m: int, n: int, num_sms: int) -> Plan:
    """The plan with as many blocks as its tiles have, or as run at once."""
    tiles, team = -(-n // ROWS) * -(-m // found.tokens), found.cluster * found.splits
    return replace(found, blocks=min(tiles * found.splits, num_sms // team * team))


@lru_cache(maxsize=4096)
def _plan(m: int, n: int, k: int, dtypes: tuple[Any, Any, Any], device: Device | None) -> Plan:
    """The tuned plan of a GPU where there is one, else by rule. dtypes: of x, w and y."""
    from tilus.kernels.tune_gemm import PLANS, GemmProblem, heuristic, measure  # it launches what is here

    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    act, weight, out = (dtype_of_name(name) for name in names)
    if act is None or weight is None or out is None:
        raise TilusError(f"gemm of {names[0]} and {names[1]} to {names[2]}, which kernels do not have")
    problem, sms = GemmProblem(m, n, k, act, weight, out), device.num_sms if device else EMULATED_SMS
    if device is not None:
        found = chosen(problem.key(device.name), PLANS, lambda: measure(problem.tuned_as, device))
        if found is not None:
            return fitted(found, m, n, sms)
    return heuristic(problem, sms)


def gemm(
    x: Any, w: Any, *, bias: Any | None = None, scale: float = 1.0, x_scale: Any | None = None, w_scale: Any | None = None,
    out_dtype: Any = None, out: Any = None, device: str | None = None,
) -> Any:  # fmt: skip
    """x [M, K] times the transpose of w [N, K], times scales, plus a bias [N]: [M, N] of `out_dtype` (sm_90a).

    x, w: f16 or bf16, both the same, float8_e4m3 and float8_e5m2 in any mix, or int8; rows contiguous and of a multiple of 16
    bytes. scale: of the whole product; x_scale [M], w_scale [N]: f32, of each row of x and w (`quantize_tokens` makes codes and
    scales of activations). bias: f16, bf16 or f32.
    out_dtype: by default that of x; of 8-bit operands it must be given: f16, bf16 or f32, and rows of the result are multiples of
    16 bytes, too. out: written in place when given. device: where to run (reference, emulator, cuda), by default as the arguments
    say. Products are added up in f32 (of 8-bit floats hardware keeps fewer bits of each step), those of integers exactly in 32
    bits, in which any K below 2^17 fits. The sums are scaled in f32 and rounded once.
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
    y = empty(x, (m, n), out_dtype) if out is None else out
    if m and n:
        where = place(device, is_cuda(x))
        gpu = gpu_of(x) if where == "cuda" else None
        found = _plan(m, n, int(x.shape[1]), (x.dtype, w.dtype, y.dtype), gpu)
        launch(x, w, y, (scale, x_scale, w_scale, bias), found, device)
    return y


def launch(x: Any, w: Any, y: Any, factors: tuple[float, Any, Any, Any], plan: Plan, device: str | None) -> None:
    """The kernel by a given plan. factors: scale, x_scale, w_scale, bias."""
    arguments, values = kernel_call(x, w, y, factors, plan)
    gemm_kernel.on(device)(*arguments, **values)


def kernel_call(
    x: Any, w: Any, y: Any, factors: tuple[float, Any, Any, Any], plan: Plan
) -> tuple[list[Any], dict[str, Any]]:
    """What a plan means: arguments and compile-time values of `gemm_kernel`."""
    scale, *vectors = factors
    values = {"tokens": plan.tokens, "stages": plan.stages, "cluster": plan.cluster, "splits": plan.splits}
    return [x, w, y, scale, plan.blocks, *vectors], values
