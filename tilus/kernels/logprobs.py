"""Log-probabilities of tokens: of those that were chosen and of the most probable ones, for the requests that ask.

Each block has a run of a row in registers and takes out the best token again and again; a last block does the same with what the
runs of a row found. Budget: a vocabulary of 128k is 32 runs, 20 tokens of each are 20 reductions of a block, about 10 us.
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.allocate import empty
from tilus.kernels.sampling_row import NO_TOKEN
from tilus.kernels.vectors import power_of_two

MOST = 20  # alternatives of a token
RUN = 4096  # tokens of a block
MOST_RUNS = 64
_PLACES = 32  # of a run's results: its alternatives, padded to a power of two


@tilus.kernel(varying=("rows", "requests"))
def runs_kernel(
    logits: Tensor["dtype", "rows", "vocabulary"],
    asking: Tensor[int32, "requests"],
    counts: Tensor[int32, "requests"],
    values: Tensor[f32, "requests", "runs", 32],
    tokens: Tensor[f32, "requests", "runs", 32],
    sums: Tensor[f32, "requests", 2, "runs"],
):
    """values, tokens: the best of each run, in order. sums: its largest logit, and the sum of exp(logit - largest)."""
    tilus.grid(values.shape[1], asking.shape[0], warps=8)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    run, request = tilus.block_id(0), tilus.block_id(1)
    numbers = tilus.arange(RUN, start=run * RUN)
    tile = tilus.load(logits, [asking[request], run * RUN], [RUN]).to(f32)
    tile = tilus.where(numbers < logits.shape[1], tile, -math.inf)
    most = tilus.max(tile, 0, keepdims=True)
    weights = tilus.where(tile > -math.inf, tilus.exp(tile - most), 0.0)
    tilus.store(sums, [request, 0, run], most)
    tilus.store(sums, [request, 1, run], tilus.sum(weights, 0, keepdims=True))
    for place in tilus.range(counts[request]):
        most = tilus.max(tile, 0, keepdims=True)
        token = tilus.min(tilus.where(tile == most, numbers.to(f32), NO_TOKEN), 0, keepdims=True)
        tilus.store(values, [request, run, place], most)
        tilus.store(tokens, [request, run, place], token)
        tile = tilus.where(numbers.to(f32) == token, -math.inf, tile)


@tilus.kernel(varying=("rows", "requests"))
def best_kernel(
    logits: Tensor["dtype", "rows", "vocabulary"],
    asking: Tensor[int32, "requests"],
    counts: Tensor[int32, "requests"],
    chosen: Tensor[int32, "rows"],
    values: Tensor[f32, "requests", "runs", 32],
    tokens: Tensor[f32, "requests", "runs", 32],
    sums: Tensor[f32, "requests", 2, "runs"],
    logprobs: Tensor[f32, "requests", 21],
    best: Tensor[int32, "requests", 20],
    *,
    padded_runs: Const,
):
    """A block a request."""
    tilus.grid(asking.shape[0], warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    request = tilus.block_id(0)
    there = tilus.arange(padded_runs) < values.shape[1]
    largest = tilus.where(there, tilus.load(sums, [request, 0, 0], [padded_runs]), -math.inf)
    weights = tilus.where(there, tilus.load(sums, [request, 1, 0], [padded_runs]), 0.0)
    most = tilus.max(largest, 0, keepdims=True)
    total = tilus.sum(tilus.where(weights > 0.0, weights * tilus.exp(largest - most), 0.0), 0, keepdims=True)
    norm = most + tilus.log(total)
    row = asking[request]
    logit = tilus.load(logits, [row, max(chosen[row], 0)], [1]).to(f32)
    tilus.store(logprobs, [request, 0], logit - norm)
    shape = [padded_runs, _PLACES]
    is_one = tilus.reshape(there, [padded_runs, 1]) & (
        tilus.reshape(tilus.arange(_PLACES), [1, _PLACES]) < counts[request]
    )
    tile = tilus.where(is_one, tilus.load(values, [request, 0, 0], shape), -math.inf)
    numbers = tilus.where(is_one, tilus.load(tokens, [request, 0, 0], shape), NO_TOKEN)
    for place in tilus.range(counts[request]):
        found = tilus.max(tile, (0, 1), keepdims=True)
        token = tilus.min(tilus.where(tile == found, numbers, NO_TOKEN), (0, 1), keepdims=True)
        tilus.store(logprobs, [request, place + 1], tilus.reshape(found, [1]) - norm)
        tilus.store(best, [request, place], tilus.reshape(token, [1]).to(int32))
        tile = tilus.where(numbers == token, -math.inf, tile)


def token_logprobs(
    logits: Any, chosen: Any, *, asking: Any, counts: Any, device: str | None = None
) -> tuple[Any, Any]:  # fmt: skip
    """Natural logarithms of probabilities in the softmax of logits, for the rows that ask. Two launches; the host reads nothing.

    logits: f16, bf16 or f32 [R, V] with V up to 262144. chosen: int32 [R], a token of each row. asking: int32 [A], rows. counts:
    int32 [A], how many of the most probable tokens each of them wants, up to 20 and up to V. Torch tensors or numpy arrays.
    device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Returns: (f32 [A, 21], int32 [A, 20]): at [a, 0] the logarithm of the chosen token, at [a, 1 + i] that of the i-th best token,
    which [a, i] of the second one names; the lower token is first on ties. What is behind counts[a] is undefined, and so is a row
    with NaN or plus infinity.
    Raises: TilusError when shapes do not fit together.
    """
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MOST_RUNS * RUN:
        raise TilusError(
            f"token_logprobs: logits of shape {list(logits.shape)}, expected [rows, vocabulary] of up to {MOST_RUNS * RUN}"
        )
    if list(chosen.shape) != [logits.shape[0]] or asking.ndim != 1 or asking.shape != counts.shape:
        raise TilusError(
            f"token_logprobs: chosen, asking and counts of shapes {list(chosen.shape)}, {list(asking.shape)} and "
            f"{list(counts.shape)}, expected [{logits.shape[0]}], and the same one-dimensional shape twice"
        )
    requests, runs = asking.shape[0], -(-logits.shape[1] // RUN)
    values, tokens = (empty(logits, (requests, runs, _PLACES), "float32") for _ in range(2))
    sums = empty(logits, (requests, 2, runs), "float32")
    logprobs, best = empty(logits, (requests, MOST + 1), "float32"), empty(logits, (requests, MOST), "int32")
    runs_kernel.on(device)(logits, asking, counts, values, tokens, sums)
    best_kernel.on(device)(
        logits, asking, counts, chosen, values, tokens, sums, logprobs, best, padded_runs=max(4, power_of_two(runs))
    )  # fmt: skip
    return logprobs, best
