"""Tokens from logits: one launch for all requests of a batch, no sorting, nothing on the host.

The token is the winner of a race. Token i gets a number E_i from the exponential distribution, and among the tokens that the
filters keep, the one with the largest `logit_i / temperature - log(E_i)` is chosen: then each is chosen with its probability
of the softmax over the kept ones (E. J. Gumbel, "Statistical theory of extreme values", 1954; C. Maddison, D. Tarlow, T. Minka,
"A* sampling", 2014). E_i depends on the request's seed, its position and i alone. So the choice needs neither sums nor an order
of evaluation, and does not depend on the batch.

What the filters keep is a threshold on the logits. It is found by search over values: sums over the logits above some pivots
decide between which of them it lies. One cluster of blocks has the row in its registers, so that a step of the search reads no
memory, and its sums come in the same order whatever the batch is.

Budget, one H100, 152k logits of 32 bits: reading is 0.19 us a row at 3.14 TB/s; an empty kernel in a graph takes 1.3 us. A
cluster of 8 blocks gets its row of 0.6 MB at 8 x 24 bytes in a nanosecond, 3.2 us from memory; from 17 rows on all
multiprocessors read. The random numbers are about 35 instructions a logit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import tilus
from tilus import Const, Tensor, TilusError, f32, int32, uint32
from tilus.kernels.allocate import empty, is_cuda, is_torch
from tilus.kernels.attention import power_of_two
from tilus.kernels.philox import log2_exponential, philox
from tilus.kernels.sampling_row import QUAD, Row, RowPlan, total
from tilus.layout import replicated
from tilus.runtime.execute import place

MAX_VOCABULARY = 1 << 18
PIVOTS = 3
WARPS = 16
CLUSTER = 8
COLDEST = 1e-30  # temperatures whose inverse is safely finite
SMALL = 1024  # a vocabulary that one block has
MOST_KEPT = 10  # fours of a thread whose weights fit into the registers beside the logits
_LOG2_E = math.log2(math.e)


@tilus.kernel
def sample_kernel(
    logits: Tensor["dtype", "requests", "vocabulary"],
    temperature: Tensor[f32, "requests"],
    top_k: Tensor[int32, "requests"],
    top_p: Tensor[f32, "requests"],
    min_p: Tensor[f32, "requests"],
    seeds: Tensor[uint32, "requests", 2],
    positions: Tensor[uint32, "requests"],
    tokens: Tensor[int32, "requests"],
    logprobs: Tensor[f32, "requests"] = None,
    *,
    plan: Const,
    pivots: Const = PIVOTS,
):
    """A cluster of blocks a request."""
    tilus.grid(plan.cluster * logits.shape[0], warps=plan.warps, cluster=plan.cluster)
    tilus.launch_dependents()
    tilus.cluster_sync()  # all blocks have started
    tilus.wait_dependencies()
    request = tilus.block_id(0) // plan.cluster
    row = Row(logits, request, plan)
    most, least, finite, broken = row.survey()
    token = 0
    if temperature[request] > COLDEST:
        rate = _LOG2_E / temperature[request]
        bound = filtered(row, most, least, finite, rate, top_k[request], top_p[request], min_p[request], pivots)
        layout = replicated(plan.threads, 1)
        key, position = tilus.load(seeds, [request, 0], [2]), tilus.load(positions, [request], [1], layout=layout)

        def race(i: Any) -> Any:
            return raced(row, i, bound, most, rate, key, position)

        _, token = row.winner(race)
    else:
        _, token = row.winner(row.slices.__getitem__)
    if broken > 0.0:
        token = -1
    if tilus.cluster_rank() == 0:
        tilus.store(tokens, [request], tilus.full([1], token, int32))
    if logprobs is not None:
        _, masses = row.measure([-math.inf], weights_of(row, most, _LOG2_E))
        (masses,) = row.ask(masses)
        if tilus.cluster_rank() == 0:
            chosen = tilus.load(logits, [request, max(token, 0)], [1]).to(f32)
            chosen = chosen - most - tilus.log(tilus.sum(masses, 0, keepdims=True))
            tilus.store(logprobs, [request], tilus.where(tilus.full([1], broken) > 0.0, math.nan, chosen))


def weights_of(row: Any, most: Any, rate: Any) -> Any:
    """weigh(slice, j) of `Row.measure`: 2^(rate (logit - most))."""

    def weigh(i: Any, j: Any) -> Any:
        return tilus.exp2((row.slices[i][j] - most) * rate)

    return weigh


def filtered(
    row: Any, most: Any, least: Any, finite: Any, rate: Any, top_k: Any, top_p: Any, min_p: Any, pivots: Any
) -> Any:  # fmt: skip
    """The least logit that top_k, top_p and min_p keep, a scalar.

    most, least, finite: the largest finite logit, the least one, and how many there are. rate: log2(e) / temperature.
    """
    bound = least
    if top_k > 0 and float(top_k) < finite:
        counts, _ = row.measure([most])
        (counts,) = row.ask(counts)
        bound = most
        if total(counts) < float(top_k):
            bound = threshold(row, None, float(top_k), least, most, finite, pivots)
    if top_p < 1.0:
        weigh = weights_of(row, most, rate)
        if row.plan.keeps_weights:
            known = [[weigh(i, j) for j in range(QUAD)] for i in range(row.plan.slices)]

            def weigh(i: Any, j: Any) -> Any:
                return known[i][j]

        _, weights = row.measure([bound, most], weigh)
        kept, best = row.ask(weights)
        target = total(kept) * top_p
        lowest = bound
        bound = most
        if total(best) < target:
            bound = threshold(row, weigh, target, lowest, most, finite, pivots)
    if min_p > 0.0:
        bound = min(max(bound, most + tilus.item(tilus.log2(tilus.full([1], min_p))) / rate), most)
    return bound


def threshold(row: Any, weigh: Any, target: Any, lowest: Any, highest: Any, finite: Any, pivots: Any) -> Any:
    """The bound whose set of logits not below it is the smallest that weighs at least `target`.

    weigh: as in `Row.measure`. lowest: a bound whose set weighs enough. highest: one whose set does
    not. finite: how many logits there are. The search ends when the set weighs exactly the target, when one logit or none lies
    between the two bounds, or no number of the type of the logits does.
    """
    kinds = 1 if weigh is None else 2
    box = row.box(2 * pivots * kinds)
    low, high = lowest, highest
    weight, many, few, trip = target + 1.0, finite, 0.0, 0
    middle = row.representable(low * 0.5 + high * 0.5)
    while low < middle and middle < high and weight != target and many - few > 1.0:
        points = [
            row.representable(low * (1 - (i + 1) / (pivots + 1)) + high * ((i + 1) / (pivots + 1)))
            for i in range(pivots)
        ]
        counts, weights = row.measure(points, weigh)
        parts = counts if weigh is None else counts + weights
        sums = [total(part) for part in row.ask_again(box, trip, parts)]
        for i in range(pivots):
            count, found = sums[i], sums[i + pivots * (kinds - 1)]
            enough = found >= target
            low, weight, many = (
                (points[i] if enough else low), (found if enough else weight), (count if enough else many),
            )  # fmt: skip
        for i in reversed(range(pivots)):
            count, found = sums[i], sums[i + pivots * (kinds - 1)]
            high, few = (high if found >= target else points[i]), (few if found >= target else count)
        trip = trip + 1
        middle = row.representable(low * 0.5 + high * 0.5)
    return low


def raced(row: Any, i: Any, bound: Any, most: Any, rate: Any, key: Any, position: Any) -> list[Any]:
    """What decides the race, for the four tiles of a slice: minus infinity where a logit is below the bound."""
    zero = tilus.zeros([1, 1, 1], uint32)
    first, second = [tilus.reshape(tilus.select(key, 0, half), [1, 1, 1]) for half in range(2)]
    words = philox((row.quads[i].to(uint32), tilus.reshape(position, [1, 1, 1]), zero, zero), (first, second))
    return [
        tilus.where(tile >= bound, (tile - most) * rate - log2_exponential(word), -math.inf)
        for tile, word in zip(row.slices[i], words)
    ]


def sample(
    logits: Any, *, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seeds: Any, positions: Any,
    return_logprobs: bool = False, device: str | None = None,
) -> Any:  # fmt: skip
    """One token for each request, from its logits.

    One launch, for sm_90 and later. The host reads nothing, so that it can be captured in a CUDA graph.

    logits: f16, bf16 or f32 [R, V] with V up to 262144. For each request, [R]: temperature f32, up to 1e-30 for the largest
    logit, the lowest token on ties; top_k int32, 0 for no limit; top_p f32, 1 for no limit; min_p f32, 0 for no limit; seeds
    int64 or uint64; positions int32 or uint32, the counter of the request's random numbers, for example how many tokens it has.
    Torch tensors or numpy arrays. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    The filters apply one after the other, as in Hugging Face's transformers: logits are divided by the temperature; top_k keeps
    the logits that are not below the k-th largest; top_p keeps those above which less than top_p of what is left then has
    gathered; min_p keeps those of at least min_p times the largest probability. Equal logits are kept or dropped together.
    (transformers breaks up ties at the border of top_p, as its sort has them.) Sums are f32.

    A token is a function of the logits of its row, the parameters, the seed and the position: the number of token i is word i % 4
    of Philox 4x32-10 with the seed as its key and the counter (i // 4, position, 0, 0).

    Returns: int32 [R], -1 for a row with NaN or plus infinity or without any finite logit; minus infinity is never chosen. With
    return_logprobs also f32 [R], the natural logarithm of the token's probability in the softmax of the logits as they are, NaN
    where there is no token.
    Raises: TilusError when shapes or dtypes do not fit together.
    """
    _check(logits, temperature, top_k, top_p, min_p, seeds, positions)
    tokens = empty(logits, (logits.shape[0],), "int32")
    logprobs = empty(logits, (logits.shape[0],), "float32") if return_logprobs else None
    plan = plan_of(int(logits.shape[1]), place(device, is_cuda(logits)) in ("cuda", "emulator"))
    launch(logits, temperature, top_k, top_p, min_p, seeds, positions, tokens, logprobs, plan, device)
    return (tokens, logprobs) if return_logprobs else tokens


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


def launch(
    logits: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seeds: Any, positions: Any, tokens: Any, logprobs: Any,
    plan: RowPlan, device: str | None, pivots: int = PIVOTS,
) -> None:  # fmt: skip
    """By a given plan."""
    sample_kernel.on(device)(
        logits, temperature, top_k, top_p, min_p, _words(seeds, 2), _words(positions, 1), tokens, logprobs, plan=plan,
        pivots=pivots,
    )  # fmt: skip


def plan_of(vocabulary: int, has_clusters: bool) -> RowPlan:
    """A function of the vocabulary alone, so that no sum depends on the batch."""
    fours = -(-vocabulary // QUAD)
    cluster = CLUSTER if has_clusters and vocabulary > SMALL else 1
    warps = min(WARPS, power_of_two(-(-fours // (32 * cluster))))
    if has_clusters and fours > 32 * WARPS * CLUSTER * MOST_KEPT:
        warps = WARPS // 2  # a thread's own registers are fewer beside more logits
    quads = -(-fours // (32 * warps * cluster))
    return RowPlan(cluster, warps, quads, quads if has_clusters else 1, quads <= MOST_KEPT)


def _words(array: Any, count: int) -> Any:
    """Integers as words of 32 bits, [requests, 2] of 64, [requests] of 32."""
    if is_torch(array):
        import torch

        words = array.view(torch.uint32)
    else:
        words = array.view(np.uint32)
    return words.reshape(-1, 2) if count == 2 else words
