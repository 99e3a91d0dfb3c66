"""Causal attention in one pass over keys and values: a maximum and a sum that are corrected as better ones turn up.

The scores of a block of queries never leave the registers. For each tile of keys: scores by the tensor cores; if the maximum
of a row grows, what was summed so far shrinks by the ratio; the weights become the left operand of the product with the values
(M. Milakov and N. Gimelshein, arXiv 1805.02867; T. Dao et al., "FlashAttention", arXiv 2205.14135). The library's
`paged_attention` is this kernel with pages, ragged batches and shared key-value heads.
"""

import math

import numpy as np

import tilus
from tilus import Const, Tensor, f16, f32


@tilus.kernel
def attention(
    q: Tensor[f16, "heads", "tokens", 64],
    k: Tensor[f16, "heads", "tokens", 64],
    v: Tensor[f16, "heads", "tokens", 64],
    out: Tensor[f16, "heads", "tokens", 64],
    scale: f32,
    *,
    rows: Const = 64,
    columns: Const = 64,
):
    heads, tokens, _ = q.shape
    tilus.grid(tilus.cdiv(tokens, rows), heads, warps=4)
    first, head = tilus.block_id(0) * rows, tilus.block_id(1)
    queries = tilus.load(q, [head, first, 0], [rows, 64])
    k_tile = tilus.shared(f16, [columns, 64])
    v_tile = tilus.shared(f16, [columns, 64])
    row = first + tilus.arange(rows, shape=[rows, 1])
    highest = tilus.full([rows, 1], -1e30)
    total = tilus.zeros([rows, 1])
    acc = tilus.zeros([rows, 64])
    for start in tilus.range(0, min(first + rows, tokens), columns):
        tilus.copy_async(k, [head, start, 0], k_tile)
        tilus.copy_async(v, [head, start, 0], v_tile)
        tilus.commit()
        tilus.wait(0)
        tilus.sync()
        keys = tilus.load_shared(k_tile, shape=[64, columns], dims=[1, 0])
        scores = tilus.dot(queries, keys) * (scale * math.log2(math.e))
        column = start + tilus.arange(columns, shape=[1, columns], axis=1)
        scores = tilus.where(column <= row, scores, -math.inf)
        higher = tilus.maximum(highest, tilus.max(scores, 1, keepdims=True))
        shrink = tilus.exp2(highest - higher)
        weights = tilus.exp2(scores - higher)
        total = total * shrink + tilus.sum(weights, 1, keepdims=True)
        acc = tilus.dot(weights.to(f16), tilus.load_shared(v_tile), acc * shrink)
        highest = higher
        tilus.sync()
    tilus.store(out, [head, first, 0], (acc / total).to(f16))


def main(heads: int = 2, tokens: int = 100) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, heads, tokens, 64)).astype(np.float16)
    out = np.empty_like(q)
    attention(q, k, v, out, 64**-0.5)
    scores = np.float64(q) @ np.float64(k).transpose(0, 2, 1) / 8 + np.triu(np.full((tokens, tokens), -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ np.float64(v)
    # Weights and results are rounded to f16, to 2^-11 of their size.
    bound = 2**-10 * (weights / weights.sum(-1, keepdims=True) @ np.abs(np.float64(v)))
    assert np.all(np.abs(out - expected) <= bound + 2**-14)
    print(f"attention: {heads} heads of {tokens} tokens, largest error {np.abs(out - expected).max():.1e}")


if __name__ == "__main__":
    main()
