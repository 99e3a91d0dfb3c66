"""Quantised linear layers of many experts in one launch (mixture of experts): each row of x times its expert's weight.

Here is the kernel for Hopper; elsewhere it is that of `linear`, whose blocks then find their expert.
Rows come sorted by expert, and where an expert's rows begin is read on the GPU: the host waits for nothing. A product is cut
into items: of one expert, some tiles of 64 rows of its weight and `tokens` rows of x. As many blocks as run at once share the
items in turn, token tiles of the same weight beside each other, so that only one of them reads it from memory. An item is
multiplied as `warpgroup_linear` does, by the same steps, and the ring of stages goes on from item to item: while the last steps
of one are multiplied, weights of the next are on their way. An expert without rows has no items.

A token tile may reach into the rows of the next expert; what it computes there is not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, f16, f32, int32, uint8
from tilus.dtypes import DTYPES
from tilus.errors import TilusError
from tilus.kernels.activation import activation_of
from tilus.kernels.allocate import empty, is_cuda
from tilus.kernels.columns import take_columns
from tilus.kernels.linear import gpu_of, kernel_call
from tilus.kernels.linear_results import offsets_of
from tilus.kernels.linear_step import residual
from tilus.kernels.plan_choice import launch_without_spills, num_sms_of
from tilus.kernels.quantize.header import WeightHeader
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import MMA, TILE, WHOLE
from tilus.kernels.schedule import Schedule
from tilus.kernels.vectors import power_of_two
from tilus.kernels.warpgroup_operands import Unpacking, table_entries, tile_nbytes
from tilus.kernels.warpgroup_plan import Overlap, WarpgroupPlan, planned
from tilus.kernels.warpgroup_products import sum_of_steps
from tilus.kernels.warpgroup_results import Rows, store_rows
from tilus.kernels.warpgroup_stages import Stages
from tilus.kernels.warpgroup_sums import Sums
from tilus.runtime.execute import place

# Shared memory of a multiprocessor, and what each of its blocks takes of it beside its own.
SM_NBYTES, RESERVED_NBYTES = 228 * 1024, 1024


@dataclass(frozen=True)
class GroupedPlan:
    """One launch: how a block multiplies an item, and how many blocks share the items.

    There are no parts of K in other blocks, a row of tiles has a whole number of steps for each warpgroup along K, an expert's
    weight a whole number of items, and weights are not scaled.
    """

    item: WarpgroupPlan
    blocks: int


@tilus.kernel
def grouped_linear_kernel(
    x: Tensor["act", "m", "k"],
    codes: Tensor[uint8, "tiles", "codes_nbytes"],
    scales: Tensor[uint8, "tiles", "scales_nbytes"],
    y: Tensor["out", "m", "n"],
    offsets: Tensor[int32, "bounds"],
    global_scale: f32,
    blocks: int32,
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
    rows, splits = plan.rows, plan.splits
    group_warps, copiers = 4 * rows, 1 if plan.registers is None else 4
    tilus.grid(blocks, warps=group_warps * splits + copiers, blocks_per_sm=plan.blocks_per_sm)
    tilus.launch_dependents()
    shape = plan.shape(span)
    steps = codes.shape[1] // (plan.depth * tile_nbytes(wdtype))
    expert_tiles = y.shape[1] // TILE

    factors = [(scales, scale_dtype), (mins, mins_dtype), (zeros, f16)]
    constant = [codes, scales, mins, zeros, table, bias]
    stages = Stages(plan, x, codes, wdtype, factors, shape, 0)
    sums = Sums(splits, plan.tokens, 32 * group_warps, turns=splits > 1)

    items = Items(offsets, x.shape[0], expert_tiles, blocks, plan)

    with tilus.warps(group_warps * splits, copiers, registers=None if plan.registers is None else 40):
        tilus.wait_dependencies(constant=constant)
        copy_items(items, stages, steps)

    def multiply_all(split: int):
        exponent = residual(wdtype, x.dtype, table, zeros, MMA)
        entries = table_entries(table, x.dtype, 32 * group_warps)
        unpacked = Unpacking(wdtype, (scale_dtype, mins_dtype), x.dtype, entries, exponent, shape)
        own_stages = Walk(stages, split, splits)

        def multiply(turn, expert, row_tile, token, end):
            once = unpacked.whole(factors, expert * expert_tiles + row_tile) if span == WHOLE else None
            total = sum_of_steps(unpacked, own_stages, once, split, steps, plan)
            if split > 0:
                sums.give(total, split, turn=turn)
            else:
                result = sums.added_to(total, turn) * (global_scale * 2.0**exponent)
                store_item(y, None if bias is None else bias[expert], row_tile, token, end, result, plan)

        items.each(multiply)

    for split in range(splits):
        with tilus.warps(group_warps * split, group_warps, registers=plan.registers):
            tilus.wait_dependencies(constant=constant)
            multiply_all(split)


@dataclass(frozen=True, eq=False)
class Items:
    """What a block has of a launch. offsets: where the rows of each expert begin among num_rows. expert_tiles: of its weight."""

    offsets: Any
    num_rows: Any
    expert_tiles: Any
    blocks: Any
    plan: WarpgroupPlan

    def each(self, work: Callable[[Any, Any, Any, Any, Any], None]) -> None:
        """`work(turn, expert, tile of its weight, first row of x, end of the expert's rows)` for every item of this block."""
        number = tilus.block_id(0)  # of this block's next item, counted from the first one of the expert
        turn, end = 0, self.offsets[0]
        row_tile, token = 0, 0  # variables: what divisions give is used in every step
        for expert in tilus.range(self.offsets.shape[0] - 1):
            begin = end
            end = min(self.offsets[expert + 1], self.num_rows)
            token_tiles = tilus.cdiv(max(end - begin, 0), self.plan.tokens)
            count = token_tiles * (self.expert_tiles // self.plan.rows)
            while number < count:
                row_tile = number // token_tiles * self.plan.rows
                token = begin + number % token_tiles * self.plan.tokens
                work(turn, expert, row_tile, token, end)
                number += self.blocks
                turn += 1
            number -= count


def copy_items(items: Items, stages: Stages, steps: Any) -> None:
    """Fill the ring of stages with what `steps` of every item read."""
    free = Walk(stages, 0, 1)

    def fill(turn: Any, expert: Any, row_tile: Any, token: Any, end: Any) -> None:
        for step in tilus.range(steps):
            stage = free.wait_until_empty()
            stages.copy_weights(stage, expert * items.expert_tiles + row_tile, step)
            stages.copy_activations(stage, token, step, 0)

    items.each(fill)


def store_item(y: Any, bias: Any, row_tile: Any, token: Any, end: Any, result: Any, plan: WarpgroupPlan) -> None:
    """Write the rows of an item that are its expert's, with the expert's bias, if there is any."""
    offset = offsets_of(bias, row_tile * TILE, plan.rows * TILE, False)
    own = tilus.narrow(y, 0, 0, end)  # rows behind it are those of other experts
    stored = Rows(own, plan, None, 128 * plan.rows)
    stored.begin([token, row_tile * TILE])
    store_rows(stored, result, offset)


class Walk:
    """The stages of one role, from item to item: every `stride`-th from `first` on, over and over.

    For `sum_of_steps` it stands in for the stages themselves, whose numbers of steps begin at 0 with every item. The position is
    two variables, since an item's first step is no constant that a division by the number of stages could be folded with.
    """

    def __init__(self, stages: Stages, first: int, stride: int):
        self.count, self.stride = stages.count, stride
        self.codes, self.x, self.factors = stages.codes, stages.x, stages.factors
        self.full, self.empty = stages.full, stages.empty
        self.stage = first - stride
        self.phase = 0

    def advance(self):
        self.stage += self.stride
        if self.stage >= self.count:
            self.stage -= self.count
            self.phase = 1 - self.phase

    def wait_until_empty(self):
        """The next stage, once all have read it."""
        self.advance()
        tilus.wait_barrier(self.empty[self.stage], 1 - self.phase)
        return self.stage

    def wait(self, step):
        """The next stage, once it is there."""
        self.advance()
        tilus.wait_barrier(self.full[self.stage], self.phase)
        return self.stage

    def at(self, step):
        """The last stage that was waited for."""
        return self.stage

    def give_back(self, stage):
        tilus.arrive(self.empty[stage])


# By tokens of an item, best first (docs/performance.md): rows of tiles, warpgroups along K, most tiles of a step, blocks on a
# multiprocessor, overlap and registers.
ITEMS: dict[int, tuple[tuple[int, int, int, int, Overlap, int | None], ...]] = {
    8: ((1, 2, 4, 2, "none", None), (1, 1, 4, 4, "none", None), (1, 1, 2, 2, "none", None), (1, 1, 2, 1, "none", None)),
    16: (
        (2, 1, 4, 2, "none", None),
        (1, 2, 4, 2, "none", None),
        (1, 1, 4, 3, "none", None),
        (1, 1, 2, 2, "none", None),
    ),
    32: ((2, 1, 2, 2, "none", None), (1, 1, 4, 3, "none", None), (1, 1, 2, 2, "none", None)),
    64: ((2, 1, 2, 1, "steps", 208), (1, 1, 2, 2, "none", None), (1, 1, 2, 1, "none", None)),
    128: ((2, 1, 2, 1, "steps", 232), (2, 1, 2, 1, "none", 232), (1, 2, 2, 1, "none", 208), (1, 1, 2, 1, "none", None)),
}
FEW = (1, 4, 4, 1, "none", None)  # of up to 16 tokens, where a block has one item: four warpgroups share it


def plans(m: int, experts: int, header: WeightHeader, num_sms: int) -> Iterator[GroupedPlan]:
    """For m rows of x and a stacked weight: the best plan, then those that need fewer registers.

    Without knowing how many rows each expert has, items hold twice the mean: a second one reads its weights from the L2 cache,
    while a larger one costs every expert. From a mean of 64 on they hold 128, whose steps take less than twice those of 64.
    """
    tiles_n, tiles_k = header.shape[0] // TILE // experts, header.shape[1] // TILE
    best = next((tokens for tokens in (8, 16, 32) if 2 * m <= tokens * experts), 64 if m < 64 * experts else 128)
    for tokens in (tokens for tokens in sorted(ITEMS, reverse=True) if tokens <= best):
        most_pairs = min(experts, m) + m // tokens  # of an expert and some of its rows
        few = tokens <= 16 and tiles_n * most_pairs <= num_sms
        for rows, splits, most, blocks_per_sm, overlap, registers in (FEW, *ITEMS[tokens]) if few else ITEMS[tokens]:
            depth = next(depth for depth in (4, 2, 1) if depth <= most and tiles_k % depth == 0)
            if tiles_n % rows or tiles_k // depth % splits:
                continue
            item = planned(
                header, tokens, rows, splits, 1, depth, SM_NBYTES // blocks_per_sm - RESERVED_NBYTES,
                registers=registers, blocks_per_sm=blocks_per_sm, overlap=overlap,
            )  # fmt: skip
            if item is not None:
                yield GroupedPlan(item, min(num_sms * blocks_per_sm, tiles_n // rows * most_pairs))


def portable_plans(m: int, experts: int, tiles_k: int, where: str) -> Iterator[Schedule]:
    """For the kernel of `linear`: the best one, then those that need fewer registers. Blocks have as many tokens as an expert on
    average, on tensor cores at least 8, of which registers hold no more than 16."""
    mean = power_of_two(-(-m // experts))
    if where in ("cpu", "reference"):
        yield Schedule(min(mean, 64), 1, 1, 0)
        return
    plan: Schedule | None = Schedule(16 if mean > 8 else 8, 1, min(4, 1 << (tiles_k.bit_length() - 1)), 1)
    while plan is not None:
        yield plan
        plan = plan.easier()


def grouped_linear(
    x: Any, weight: QuantizedWeight, offsets: Any, *, bias: Any | None = None, out_dtype: Any = None, out: Any = None,
    invariant: bool = False, device: str | None = None,
) -> Any:  # fmt: skip
    """Rows of x [M, K], sorted by expert, each times the transpose of its expert's weight (N, K), plus its bias: [M, N].

    x: f16 or bf16, rows contiguous; K is a multiple of 64. weight: those of all experts on top of each other (`quantize.stack`),
    [experts * N, K]; N is a multiple of 64. offsets: int32 [experts + 1] where x is, from 0 to M without going
    down: expert e has the rows from offsets[e] to before offsets[e + 1]. What is outside of all is not written.
    bias: f16, bf16 or f32 [experts, N]. out_dtype: by default that of x. out: written in place when given. invariant: as in
    `linear`. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

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
    if where == "cuda" and header.order != MMA:
        raise TilusError(
            f"grouped_linear on a GPU with a weight packed in the order {header.order}, expected {MMA}",
            hint='pack it again: weight.to("cuda"), or pack(matrix, device, order="mma")',
        )
    hopper = header.order == MMA and where != "cpu" and (where != "cuda" or gpu_of(x).target.sm == 90)
    planned_m = experts if invariant else m  # one row of each, whatever comes
    key = ("grouped", planned_m, experts, x.dtype, y.dtype, bias is None, where)
    launch_without_spills(
        weight,
        key,
        plans(planned_m, experts, header, num_sms_of(x, where))
        if hopper
        else portable_plans(planned_m, experts, header.shape[1] // TILE, where),
        lambda plan: launch(ordered, weight, y, offsets, bias, plan, device),
    )
    return y


def launch(
    x: Any, weight: QuantizedWeight, y: Any, offsets: Any, bias: Any | None, plan: GroupedPlan | Schedule, device: str | None
) -> None:  # fmt: skip
    """The kernel with a given plan, on activations whose columns are in the order of the weight's."""
    header = weight.header
    if isinstance(plan, Schedule):
        every_bias = None if bias is None else bias.reshape(-1)
        kernel, arguments, values = kernel_call(x, weight, y, every_bias, plan, offsets=offsets)
        kernel.on(device)(*arguments, **values)
        return
    codes, scales, mins, zeros = (
        None if array is None else array.reshape(array.shape[0], -1)
        for array in (weight.codes, weight.scales, weight.mins, weight.zeros)
    )
    grouped_linear_kernel.on(device)(
        x, codes, scales, y, offsets, header.global_scale, plan.blocks, mins, zeros, weight.table, bias,
        wdtype=header.dtype, scale_dtype=DTYPES[header.scale_dtype],
        mins_dtype=None if header.mins_dtype is None else DTYPES[header.mins_dtype], span=header.span, plan=plan.item,
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
    activation_of("grouped_linear", weight.is_gated, None)
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
