"""Quantised linear layers: y = x W^T + b for weights of any 1- to 8-bit type and every scheme of `QuantizedMatrix`.

The weight is the left operand of products and tokens are columns, so one packed weight serves every batch size and a batch of
one wastes no rows. Weights go straight from global memory to registers, on GPUs the next tiles on their way while these are
multiplied. The warps of a block work on different tiles along K and add up at the end; blocks may split K further. Weights are
packed in another order for CPUs than for GPUs (`tilus.kernels.quantize.tiles`); the kernel is the same.

**What is exact.** Products multiply activations by bare codes (or code minus zero point), which f16 and bf16 hold exactly,
and add up in f32. Scales and minimums multiply these sums in f32, once for each group: y = sum over groups of
scale * (sum of x * code) + minimum * (sum of x). So no weight is ever rounded, whatever the types of activations and scales
are; scales may have the range of f32 (e8m0). Only the entries of a table are rounded, once, to the activations' type. The global
scale and the bias follow in f32, and y is rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tilus
from tilus import Const, Tensor, f32, int32, uint8
from tilus.dtypes import DTYPES, DataType
from tilus.errors import TilusError
from tilus.kernels.activation import Activation, activation_of
from tilus.kernels.allocate import counters, empty, is_cuda, is_torch, result_of
from tilus.kernels.attention import find_queries
from tilus.kernels.columns import take_columns
from tilus.kernels.deferred_norm import NO_NORMS, DeferredNorm, Norms
from tilus.kernels.linear_problem import PLANS, LinearProblem, Plan, heuristic, invariant_plans
from tilus.kernels.linear_results import finished, offsets_of
from tilus.kernels.linear_step import (
    Step,
    Weights,
    activation_tile,
    add_groups,
    residual,
    scaled_sum,
    sum_rows,
    sums_of_activations,
    weight_tile,
)
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.kernels.quantize.tiles import MMA, TILE, WHOLE
from tilus.kernels.schedule import Schedule, cpu_schedule
from tilus.kernels.warpgroup_linear import kernel_call as warpgroup_call
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.lang.arguments import dtype_of_name
from tilus.lang.kernel import Kernel
from tilus.layout import local, replicated
from tilus.ptx.assembler import SpillError
from tilus.runtime.autotune import chosen
from tilus.runtime.cpu.threads import num_threads
from tilus.runtime.execute import place

if TYPE_CHECKING:
    from tilus.kernels.dense_weight import DenseWeight
    from tilus.runtime.cuda import Device

EMULATED_SMS = 132  # an H100


@tilus.kernel(varying=("m", "tiles_n"))
def quantized_linear(
    x: Tensor["act", "m", "k"],
    codes: Tensor[uint8, "tiles_n", "tiles_k", "tile_nbytes"],
    scales: Tensor[uint8, "tiles_n", "sets", 8, "scale_nbytes"],
    y: Tensor["out", "m", "width"],
    global_scale: f32,
    mins: Tensor[uint8, "tiles_n", "sets", 8, "min_nbytes"] = None,
    zeros: Tensor[uint8, "tiles_n", "sets", 8, "zero_nbytes"] = None,
    table: Tensor[f32, 16] = None,
    bias: Tensor["bias_type", "biases"] = None,
    partial: Tensor[f32, "splits", "m", "n"] = None,
    tickets: Tensor[int32, "blocks"] = None,
    offsets: Tensor[int32, "bounds"] = None,
    *,
    wdtype: Const,
    scale_dtype: Const,
    mins_dtype: Const = None,
    span: Const,
    tokens: Const,
    rows: Const,
    warps: Const,
    stages: Const,
    blocks_per_sm: Const,
    order: Const = MMA,
    activation: Const = None,
):
    """offsets: of `grouped_linear`: the weight is those of all experts on top of each other, and rows are sorted by them. A
    block has rows of one expert, which it finds like the sequence of queries. activation: of a gated weight."""
    splits = 1 if partial is None else partial.shape[0]
    experts = 1 if offsets is None else offsets.shape[0] - 1
    own_tiles = codes.shape[0] // experts
    of_tokens = tilus.cdiv(y.shape[0], tokens) if offsets is None else (y.shape[0] + experts * (tokens - 1)) // tokens
    tilus.grid(tilus.cdiv(own_tiles, rows), of_tokens, splits, warps=rows * warps, blocks_per_sm=blocks_per_sm)
    tilus.launch_dependents()
    step = Step(order, span, rows, warps)
    out_tile = row_tile = tilus.block_id(0) * rows
    first_token = tilus.block_id(1) * tokens
    if offsets is not None:
        tilus.wait_dependencies(constant=[codes, scales, mins, zeros, table, bias])
        expert, first_token = find_queries(offsets, experts, tokens, tilus.block_id(1))
        if offsets[expert] + first_token >= offsets[expert + 1]:
            return
        x, y = x[offsets[expert] : offsets[expert + 1]], y[offsets[expert] : offsets[expert + 1]]
        row_tile = row_tile + expert * own_tiles
    begin, end = split_of(codes.shape[1], splits, warps * max(stages, 1))
    own_codes = tilus.narrow(codes, 1, 0, end)  # the last steps ask for tiles behind the end: they are not read
    lookup_table = None if table is None else load_table(table, x.dtype, step.batch)
    exponent = residual(wdtype, x.dtype, table, zeros, order)
    dtypes = (wdtype, scale_dtype, mins_dtype)

    ahead = [Weights(own_codes, (scales, mins, zeros), dtypes, row_tile, step) for _ in range(max(stages, 1))]
    once = begun(ahead, begin, stages, exponent, x.dtype)
    if offsets is None:
        tilus.wait_dependencies(constant=[codes, scales, mins, zeros, table, bias])
    total = sum_over_tiles(x, first_token, ahead, once, [begin, end], lookup_table, exponent, tokens, stages)
    by_row = tilus.sum(tilus.reshape(total, [rows, warps, TILE, tokens]), axis=1)
    result = tilus.reshape(by_row, [rows * TILE, tokens]) * 2.0**exponent
    if partial is None:
        offset = offsets_of(bias, row_tile * TILE, rows * TILE, activation is not None)
        store_results(y, result * global_scale, offset, activation, [first_token, out_tile])
    else:
        tilus.store(partial, [tilus.block_id(2), first_token, row_tile * TILE], result, dims=[2, 1])
        add_splits(
            y, partial, tickets, global_scale, bias, activation, first_token, row_tile, [tokens, rows * TILE], splits
        )


def split_of(tiles, splits, step):
    """The tiles along K of this block: from the first on, and where they end. step: of an iteration of the loop."""
    per_split = tilus.cdiv(tilus.cdiv(tiles, step), splits) * step
    begin = tilus.block_id(2) * per_split
    return begin, min(begin + per_split, tiles)


def begun(ahead, begin, stages, exponent, act: DataType):
    """Fetch what is multiplied first, from a tile on; the factors that serve all of K, or None."""
    once = None
    if ahead[0].step.span == WHOLE:
        ahead[0].fetch_factors(0)
        once = ahead[0].numbers(exponent, act)
    for index in range(stages):
        ahead[index].fetch(begin + index * ahead[0].step.warps)
    return once


def sum_over_tiles(x, first_token, ahead, once, tiles, table, exponent, tokens, stages):
    """Scaled sums [batch, 64, tokens] over tiles along K, from tiles[0] to tiles[1], divided by 2^exponent.

    ahead: what is multiplied first, with `stages` already fetched; each fetches its next tile once its factors are read. once:
    the factors that serve all of K.
    """
    step, wdtype, (_, mins, _) = ahead[0].step, ahead[0].dtypes[0], ahead[0].factors
    shape, layout = [tokens, step.warps * TILE], step.order.activation_layout(tokens, step.rows, step.warps)
    total = tilus.zeros([step.batch, TILE, tokens], f32)
    sums = tilus.zeros([step.batch, sum_rows(step), tokens], f32)
    for first in tilus.range(tiles[0], tiles[1], step.warps * len(ahead)):
        for stage, weights in enumerate(ahead):
            tile = first + stage * step.warps
            loaded = tilus.load(x, [first_token, tile * TILE], shape, layout=layout)
            right = activation_tile(loaded, tokens, step)
            if stages == 0:
                weights.fetch(tile)
            raw = weights.codes
            if once is None and weights.has_many_factors():
                weights.fetch_factors(tile)
            scale, minimum, zero = once if once is not None else weights.numbers(exponent, x.dtype)
            if stages > 0:
                weights.fetch(tile + step.warps * len(ahead))
            w = weight_tile(raw, zero, table, wdtype, x.dtype, step)
            if once is None:
                total = add_groups(total, w, right, scale, minimum, step)
            else:
                total = tilus.dot(w, right, total)
                if mins is not None:
                    sums = sums_of_activations(right, step, sums)
    if once is not None:
        nothing = tilus.zeros([step.batch, TILE, tokens], f32)
        total = scaled_sum(nothing, total, sums, once[0], once[1], 0, step)
    return total


def store_results(y, sums, offset, activation, start):
    """Of scaled sums [rows, tokens] what is stored from a token and a row of tiles on, rounded once."""
    out_rows = TILE if activation is None else TILE // 2
    y_tile = tilus.cast(finished(sums, offset, activation), y.dtype)
    tilus.store(y, [start[0], start[1] * out_rows], y_tile, dims=[1, 0])


def add_splits(y, partial, tickets, global_scale, bias, activation, first_token, row_tile, shape, splits):
    """The block that arrives last adds up the partial sums, always in the same order, and resets the counter."""
    slot = tilus.block_id(1) * tilus.grid_dim(0) + tilus.block_id(0)
    arrived = tilus.atomic_add(tickets, [slot], 1)
    if arrived == splits - 1:
        summed = tilus.load(partial, [0, first_token, row_tile * TILE], shape=shape)
        for split in tilus.range(1, splits):
            summed = summed + tilus.load(partial, [split, first_token, row_tile * TILE], shape=shape)
        offset = offsets_of(bias, row_tile * TILE, shape[1], activation is not None)
        sums = tilus.transpose(summed) * global_scale
        store_results(y, sums, offset, activation, [first_token, row_tile])
        tilus.atomic_add(tickets, [slot], -splits)


def load_table(table, act: DataType, warps: int):
    """The entries of a table in every thread, rounded to the activations' type."""
    layout = replicated(32 * warps, 1) * local(16)
    return tilus.cast(tilus.load(table, [0], [16], layout=layout), act)


def linear(
    x: Any | DeferredNorm, weight: QuantizedWeight | DenseWeight, *, bias: Any | None = None, activation: str | None = None,
    out_dtype: Any = None, out: Any = None, device: str | None = None, invariant: bool = False,
) -> Any:  # fmt: skip
    """x [M, K] of f16 or bf16 times the transpose of a packed or dense weight (N, K), plus a bias [N]: [M, N] of `out_dtype`.

    x, bias, out: torch tensors or numpy arrays, on the weight's device. x may be a norm that `linear_add_rms_norm` leaves to this
    layer, whose sums are then divided by the root mean squares of rows. bias: f16, bf16 or f32, added in f32. activation: of a
    gated weight, silu or gelu_tanh: of the N = 2 F sums s, of F gates and then F factors, the result is [M, F],
    `silu(s[:, :F]) * s[:, F:]` (see `silu_mul`, `gelu_mul`), computed in f32 and rounded once. out_dtype: by default that of x.
    out: written in place when given. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.
    Weights are rounded only on Hopper, of more than 8 to 128 tokens (docs/quantization.md, "Packed for the kernels").
    invariant: a number of y has the same bits whatever the other rows of x and of the weight are and however many there are (on
    one kind of device): sums along K are then cut in one way for every M and N, which takes longer for most.
    The kernel may start while the one in front of it runs, and then reads the weight and the bias, but not x: nothing that is
    still on its way in the stream may write those two.
    Raises: TilusError when K, dtypes or devices do not fit, for a weight that is packed for CPUs on a GPU, for a dense one
    without Hopper's tensor cores, and for a gated one without activation, or the other way round.
    """
    (n, k), function = weight.shape, activation_of("linear", weight.is_gated, activation)
    norms = NO_NORMS
    if isinstance(x, DeferredNorm):
        x, norms = x.values, Norms(before=x)
    if x.ndim != 2 or x.shape[1] != k:
        raise TilusError(f"linear: x has shape {list(x.shape)}, the weight is {[n, k]}", hint=f"x must be [M, {k}]")
    if str(x.dtype).removeprefix("torch.") not in ("float16", "bfloat16"):
        raise TilusError(f"linear: x has dtype {x.dtype}, expected float16 or bfloat16", hint="convert it: x.half()")
    if bias is not None and tuple(bias.shape) != (n,):
        raise TilusError(f"linear: bias has shape {list(bias.shape)}, expected {[n]} for the weight of {[n, k]}")
    if not isinstance(weight, QuantizedWeight):
        if norms.before is not None:
            raise TilusError("linear: the norm of x is deferred, the weight is dense", hint="expected a packed weight")
        from tilus.kernels.dense_weight import dense_linear  # dense products take their GPU from here

        return dense_linear(x, weight, bias, function, out_dtype, out, device, invariant)
    m, width = int(x.shape[0]), n // 2 if weight.is_gated else n
    y = result_of("linear", x, (m, width), out_dtype, out)
    if m == 0:
        return y
    launch_without_spills(x, weight, y, bias, function, device, invariant, norms)
    return y


def launch_without_spills(
    x: Any, weight: QuantizedWeight, y: Any, bias: Any | None, activation: Activation | None, device: str | None,
    invariant: bool, norms: Norms,
) -> None:  # fmt: skip
    """`launch` with the plan for the device, or with the first easier one that the registers suffice for. x: with columns in the
    order of the model."""
    x = x if weight.columns is None else take_columns(x, weight.columns, device=device)
    m, where = int(x.shape[0]), place(device, is_cuda(x))
    key = (
        m, x.dtype, y.dtype, bias is None, where, is_cuda(x) and x.get_device(), is_aligned(x), invariant,
        norms.before is None, norms.after is None,
    )  # fmt: skip
    while True:
        plan = weight.schedules.get(key)
        if plan is None:
            plan = _plan(x, weight, y, where, invariant, norms)
            if isinstance(plan, WarpgroupPlan) and (y.dtype.itemsize == 4 or norms.after is not None):
                plan = plan.with_wide_results(weight.header)
            weight.schedules[key] = plan
        try:
            return launch(x, weight, y, bias, plan, device, activation, norms)
        except SpillError:
            easier = plan.narrower() if invariant and isinstance(plan, WarpgroupPlan) else plan.easier()
            if easier is None:
                raise
            weight.schedules[key] = easier


def launch(
    x: Any, weight: QuantizedWeight, y: Any, bias: Any | None, plan: Plan, device: str | None,
    activation: Activation | None = None, norms: Norms = NO_NORMS,
) -> None:  # fmt: skip
    """The kernel of a given plan, on activations whose columns are in the order of the weight's."""
    kernel, arguments, values = kernel_call(x, weight, y, bias, plan, activation, norms=norms)
    kernel.on(device)(*arguments, **values)


def kernel_call(
    x: Any, weight: QuantizedWeight, y: Any, bias: Any | None, plan: Plan, activation: Activation | None = None,
    offsets: Any | None = None, norms: Norms = NO_NORMS,
) -> tuple[Kernel, list[Any], dict[str, Any]]:  # fmt: skip
    """What a plan means: its kernel, arguments and compile-time values. activation: of a gated weight. offsets: of
    `grouped_linear`. norms: beside the layer, for plans of warpgroups."""
    if isinstance(plan, WarpgroupPlan):
        return warpgroup_call(x, weight, y, bias, plan, activation, norms=norms)
    m, n, header = int(y.shape[0]), weight.shape[0], weight.header
    partial = tickets = None
    if plan.splits > 1:
        partial = empty(x, (plan.splits, m, n), "float32")
        tickets = counters(x, int(weight.codes.shape[0]) * -(-m // plan.tokens))
    arguments = [
        x, weight.codes, weight.scales, y, header.global_scale, weight.mins, weight.zeros, weight.table, bias, partial, tickets,
        offsets,
    ]  # fmt: skip
    values = {
        "wdtype": header.dtype, "scale_dtype": DTYPES[header.scale_dtype],
        "mins_dtype": None if header.mins_dtype is None else DTYPES[header.mins_dtype],
        "span": header.span, "tokens": plan.tokens, "rows": plan.rows, "warps": plan.warps, "stages": plan.stages,
        "blocks_per_sm": plan.blocks_per_sm, "order": header.order, "activation": activation,
    }  # fmt: skip
    return quantized_linear, arguments, values


def _plan(x: Any, weight: QuantizedWeight, y: Any, where: str, invariant: bool, norms: Norms) -> Plan:
    """For the device that runs the product: on a GPU the tuned plan where there is one, else by rule. Norms need warpgroups."""
    header, m = weight.header, 1 if invariant and where == "cpu" else int(x.shape[0])
    tiles_n, tiles_k = (-(-extent // TILE) for extent in weight.shape)
    if where == "cpu":
        return cpu_schedule(m, tiles_n, tiles_k, header.dtype.nbits, 1 if invariant else num_threads())
    problem = LinearProblem.of(header, m, _dtype(x), _dtype(y))
    if where != "cuda":
        hopper = norms is not NO_NORMS
        sms = EMULATED_SMS if hopper or where == "emulator" else 0
        return invariant_plans(problem, sms, hopper=hopper)[0] if invariant else heuristic(problem, sms, hopper=hopper)
    if header.order != MMA:
        raise TilusError(
            f"linear on a GPU with a weight packed in the order {header.order}, expected {MMA}",
            hint='pack it again: weight.to("cuda"), or pack(matrix, device, order="mma")',
        )
    device = gpu_of(x)
    hopper = device.target.sm == 90 and is_aligned(x)
    if invariant:
        return invariant_plans(problem, device.num_sms, hopper=hopper)[0]
    plan = _tuned(problem, device)
    if plan is None or (norms is not NO_NORMS and isinstance(plan, Schedule)):
        plan = heuristic(problem, device.num_sms, hopper=hopper)
    return plan if hopper or isinstance(plan, Schedule) else heuristic(problem, device.num_sms)


def is_aligned(x: Any) -> bool:
    """Whether TMA can copy rows of x: their first bytes must be multiples of 16."""
    address, stride = (x.data_ptr(), x.stride(0)) if is_torch(x) else (x.ctypes.data, x.strides[0] // x.itemsize)
    return address % 16 == 0 and stride % 8 == 0


def _tuned(problem: LinearProblem, device: Device) -> Plan | None:
    from tilus.kernels.tune_linear import measure  # it launches what is above

    return chosen(problem.key(device.name), PLANS, lambda: measure(problem.tuned_as, device))


def _dtype(array: Any) -> DataType:
    """Raises: TilusError for a type that kernels do not have."""
    found = dtype_of_name(str(array.dtype).removeprefix("torch."))
    if found is None:
        raise TilusError(f"linear: an array of dtype {array.dtype}, expected float16, bfloat16 or float32")
    return found


def gpu_of(x: Any) -> Device:
    """The GPU that runs a kernel on x: its own, or the current one."""
    from tilus.runtime import cuda

    return cuda.device(x.get_device()) if is_cuda(x) else cuda.current_device()
