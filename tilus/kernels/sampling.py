"""Tokens from logits: two launches for all requests of a batch, no sorting, nothing on the host.

The token is the winner of a race. Token i gets a number E_i from the exponential distribution, and among the tokens that the
filters keep, the one with the largest `logit_i / temperature - log(E_i)` is chosen: then each is chosen with its probability
of the softmax over the kept ones (E. J. Gumbel, "Statistical theory of extreme values", 1954; C. Maddison, D. Tarlow, T. Minka,
"A* sampling", 2014). E_i depends on the request's seed, its position and i alone. So the choice needs neither sums nor an order
of evaluation, and does not depend on the batch.

The first launch reads all logits once, a block for each run of a row, and runs the race over all tokens. The second one has a
block a row, which brings the runs together; that is all for greedy rows and those without filters. Filters keep whatever is
not below some bound, so that the winner over all tokens wins among the kept ones, if it is one of them. Whether top_p keeps it
takes one look at what lies above it. If it is not kept, nothing below it is either, and a race over the logits above it is next:
like rejection sampling, without its dependence on chance, as the numbers E_i stay. The bound of top_k is found by counting.

Budget, one H100: 256 rows of 32k logits of 32 bits are 33 MB, 10.4 us at 3.14 TB/s. In this time the multiprocessors issue 35
instructions for each logit, which is what the random numbers take; a greedy choice takes 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

import tilus
from tilus import Const, Tensor, TilusError, f32, int32, uint32
from tilus.kernels.allocate import empty, is_cuda, is_torch
from tilus.kernels.sampling_filters import BROKEN, FIELDS, FINITE, LEAST, MOST, SCORE, TOKEN, Filters, Runs
from tilus.kernels.sampling_row import NO_TOKEN, Dice, Row, Tiling, scalar, winner
from tilus.kernels.vectors import power_of_two
from tilus.runtime.execute import place

MAX_VOCABULARY = 1 << 18
COLDEST = 1e-30  # temperatures whose inverse is safely finite
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Plan:
    """run: of the first launch, whose runs are tiles. whole: of the second one, a block of which goes through a row."""

    run: Tiling
    whole: Tiling


GPU_PLAN = Plan(Tiling(warps=8, quads=4, blocks_per_sm=4), Tiling(warps=16, quads=1, unroll=2))
CPU_PLAN = Plan(Tiling(warps=8, quads=4), Tiling(warps=8, quads=2))


@tilus.kernel
def survey_kernel(
    logits: Tensor["dtype", "requests", "vocabulary"],
    temperature: Tensor[f32, "requests"],
    top_k: Tensor[int32, "requests"],
    seeds: Tensor[uint32, "requests", 2],
    positions: Tensor[uint32, "requests"],
    runs: Tensor[f32, "requests", 6, "count"],
    *,
    tiling: Const,
):
    """A block a run of a row: the winner over all tokens, and what the filters ask for."""
    tilus.grid(runs.shape[2], logits.shape[0], warps=tiling.warps, blocks_per_sm=tiling.blocks_per_sm)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    run, request = tilus.block_id(0), tilus.block_id(1)
    row = Row(logits, request, tiling)
    tile, one = row.tile(run), tilus.full([1], 1.0)
    sound = tilus.all(tile < math.inf, 0, keepdims=True)
    tilus.store(runs, [request, BROKEN, run], tilus.where(sound, 0.0, one))
    if temperature[request] > COLDEST:
        parts, quads = row.parts(tile), row.quads(run)
        dice = dice_of(seeds, positions, temperature, request)
        score, token = winner(dice.scores(parts, quads, 0.0), [quads.to(f32)] * len(parts))
        tilus.store(runs, [request, SCORE, run], score)
        tilus.store(runs, [request, TOKEN, run], token)
        tilus.store(runs, [request, MOST, run], tilus.max(tile, 0, keepdims=True))
        if top_k[request] > 0:
            is_finite = tile > -math.inf
            least = tilus.min(tilus.where(is_finite, tile, math.inf), 0, keepdims=True)
            tilus.store(runs, [request, LEAST, run], least)
            tilus.store(runs, [request, FINITE, run], tilus.sum(tilus.where(is_finite, one, 0.0), 0, keepdims=True))
    else:
        most = tilus.max(tile, 0, keepdims=True)
        numbers = tilus.arange(tiling.width, start=run * tiling.width).to(f32)
        tilus.store(runs, [request, SCORE, run], most)
        tilus.store(
            runs, [request, TOKEN, run], tilus.min(tilus.where(tile == most, numbers, NO_TOKEN), 0, keepdims=True)
        )


@tilus.kernel
def choose_kernel(
    logits: Tensor["dtype", "requests", "vocabulary"],
    temperature: Tensor[f32, "requests"],
    top_k: Tensor[int32, "requests"],
    top_p: Tensor[f32, "requests"],
    min_p: Tensor[f32, "requests"],
    seeds: Tensor[uint32, "requests", 2],
    positions: Tensor[uint32, "requests"],
    runs: Tensor[f32, "requests", 6, "count"],
    tokens: Tensor[int32, "requests"],
    *,
    tiling: Const,
    most_runs: Const,
):
    """A block a row: the winner among what the filters keep."""
    tilus.grid(logits.shape[0], warps=tiling.warps, blocks_per_sm=tiling.blocks_per_sm)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    request = tilus.block_id(0)
    found = Runs(runs, request, most_runs, tiling.warps)
    scores = found.of(SCORE, -math.inf)
    score = tilus.max(scores, 0, keepdims=True)
    tokens_of_best = tilus.where(scores == score, found.of(TOKEN, NO_TOKEN), NO_TOKEN)
    token = scalar(tilus.min(tokens_of_best).to(int32))
    is_row = scalar(tilus.sum(found.of(BROKEN, 0.0))) == 0.0
    if temperature[request] > COLDEST:
        most = scalar(tilus.max(found.of(MOST, -math.inf)))
        is_row = is_row and most > -math.inf
        if is_row:
            row, dice = Row(logits, request, tiling), dice_of(seeds, positions, temperature, request)
            token = Filters(top_k, top_p, min_p, request).winner(row, dice, found, most, score, token)
    elif tilus.item(score) == -math.inf:
        is_row = False
    tilus.store(tokens, [request], tilus.full([1], token if is_row else -1, int32))


def dice_of(seeds: Any, positions: Any, temperature: Any, request: Any) -> Dice:
    key, position = tilus.load(seeds, [request, 0], [2]), tilus.load(positions, [request], [1])
    return Dice(key, position, _LOG2_E / temperature[request])


def sample(
    logits: Any, *, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seeds: Any, positions: Any, out: Any = None,
    device: str | None = None,
) -> Any:  # fmt: skip
    """One token for each request, from its logits.

    Two launches, on every target. The host reads nothing, so that they can be captured in a CUDA graph.

    logits: f16, bf16 or f32 [R, V] with V up to 262144. For each request, [R]: temperature f32, up to 1e-30 for the largest
    logit, the lowest token on ties; top_k int32, 0 for no limit; top_p f32, 1 for no limit; min_p f32, 0 for no limit; seeds
    int64 or uint64; positions int32 or uint32, the counter of the request's random numbers, for example how many tokens it has.
    Torch tensors or numpy arrays. out: int32 [R], where the result goes. device: where to run (reference, emulator, cpu, cuda),
    by default as the arguments say.

    The filters apply one after the other, as in Hugging Face's transformers: logits are divided by the temperature; top_k keeps
    the logits that are not below the k-th largest; top_p keeps those above which less than top_p of what is left then has
    gathered; min_p keeps those of at least min_p times the largest probability. Equal logits are kept or dropped together.
    (transformers breaks up ties at the border of top_p, as its sort has them.) Sums are f32.

    A token is a function of the logits of its row, the parameters, the seed and the position: the number of token i is word i % 4
    of Philox 4x32-10 with the seed as its key and the counter (i // 4, position, 0, 0).

    Returns: int32 [R], -1 for a row with NaN or plus infinity or without any finite logit; minus infinity is never chosen.
    Raises: TilusError when shapes or dtypes do not fit together.
    """
    _check(logits, temperature, top_k, top_p, min_p, seeds, positions)
    out = empty(logits, (logits.shape[0],), "int32") if out is None else out
    plan = GPU_PLAN if place(device, is_cuda(logits)) in ("cuda", "emulator") else CPU_PLAN
    launch(logits, temperature, top_k, top_p, min_p, seeds, positions, out, plan, device)
    return out


def launch(
    logits: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seeds: Any, positions: Any, out: Any, plan: Plan,
    device: str | None,
) -> None:  # fmt: skip
    """By a given plan. Only the last bits of sums depend on it."""
    runs = empty(logits, (logits.shape[0], FIELDS, -(-logits.shape[1] // plan.run.width)), "float32")
    seeds, positions = _words(seeds, 2), _words(positions, 1)
    survey_kernel.on(device)(
        logits, temperature, top_k, seeds, positions, runs, tiling=plan.run
    )  # fmt: skip
    choose_kernel.on(device)(
        logits, temperature, top_k, top_p, min_p, seeds, positions, runs, out, tiling=plan.whole,
        most_runs=power_of_two(-(-MAX_VOCABULARY // plan.run.width)),
    )  # fmt: skip


def _check(logits: Any, *of_requests: Any) -> None:
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise TilusError(
            f"sample: logits of shape {list(logits.shape)}, expected [requests, vocabulary] with 1 to {MAX_VOCABULARY} logits",
            hint="one request: logits[None]",
        )
    shapes = [list(array.shape) for array in of_requests]
    if any(shape != [logits.shape[0]] for shape in shapes):
        raise TilusError(
            f"sample: temperature, top_k, top_p, min_p, seeds and positions of shapes {', '.join(map(str, shapes))}, expected "
            f"[{logits.shape[0]}] each, as there are so many rows of logits",
        )
    if of_requests[4].dtype.itemsize != 8 or of_requests[5].dtype.itemsize != 4:
        raise TilusError(
            f"sample: seeds of {of_requests[4].dtype} and positions of {of_requests[5].dtype}, expected int64 and int32"
        )


def _words(array: Any, count: int) -> Any:
    """Integers as words of 32 bits, [requests, 2] of 64, [requests] of 32."""
    if is_torch(array):
        import torch

        words = array.view(torch.uint32)
    else:
        words = array.view(np.uint32)
    return words.reshape(-1, 2) if count == 2 else words
