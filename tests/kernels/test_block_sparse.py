"""block_sparse_attention against dense attention in float64 with everything outside of the blocks hidden."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attention_batches import Batch, limit_of, on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from tilus import TilusError
from tilus.kernels import block_sparse_attention, merge_states

Array = npt.NDArray[Any]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
SCALE = 0.125


def problem(
    rows: list[tuple[int, list[int]]], kv_heads: int, group: int, block: int, head_dim: int = 64
) -> list[torch.Tensor]:
    """(queries, blocks) of each row: q, a cache of ten blocks of which those that no row lists are NaN, and the lists."""
    generator = torch.Generator().manual_seed(len(rows))
    q = torch.randn(sum(n for n, _ in rows), kv_heads * group, head_dim, generator=generator).half()
    cache = torch.randn(10, 2, block, kv_heads, head_dim, generator=generator).half()
    listed = {b for _, blocks in rows for b in blocks}
    cache[[b for b in range(10) if b not in listed]] = torch.nan
    row_start = torch.tensor([0, *np.cumsum([n for n, _ in rows])], dtype=torch.int32)
    block_start = torch.tensor([0, *np.cumsum([len(b) for _, b in rows])], dtype=torch.int32)
    return [q, cache, row_start, block_start, torch.tensor([b for _, bs in rows for b in bs], dtype=torch.int32)]


def dense(tensors: list[torch.Tensor], lens: list[int] | None = None) -> tuple[Array, Array, Array]:
    """(result, sums of weight * |value|, logarithms) of all keys of the cache, weighted by how often a query's row lists them."""
    q, cache = (np.nan_to_num(t.double().numpy()) for t in tensors[:2])
    row_start, block_start, blocks = (t.numpy() for t in tensors[2:])
    count, _, block, kv_heads, _ = cache.shape
    keys, values = cache.swapaxes(0, 1).reshape(2, count * block, kv_heads, -1).repeat(q.shape[1] // kv_heads, axis=2)
    times = np.zeros((len(q), count * block))
    for row in range(len(row_start) - 1):
        tokens = [b * block + i for b in blocks[block_start[row] : block_start[row + 1]] for i in range(block)]
        np.add.at(times, (slice(row_start[row], row_start[row + 1]), tokens[: None if lens is None else lens[row]]), 1)
    scores = np.einsum("qhd,khd->hqk", q, keys) * SCALE
    with np.errstate(divide="ignore"):
        scores = scores + np.log(times)
    lse = np.logaddexp.reduce(scores, axis=2)
    weights = np.exp(scores - np.where(np.isneginf(lse), 0, lse)[..., None])
    return np.einsum("hqk,khd->qhd", weights, values), np.einsum("hqk,khd->qhd", weights, np.abs(values)), lse.T


def check(tensors: list[torch.Tensor], device: str, lens: list[int] | None = None) -> None:
    arguments = [on_gpu(t) for t in tensors] if device == "cuda" else tensors
    given_lens = None if lens is None else torch.tensor(lens, dtype=torch.int32, device=arguments[0].device)
    out, lse = block_sparse_attention(*arguments, SCALE, kv_lens=given_lens, return_lse=True, device=device)
    expected, size, expected_lse = dense(tensors, lens)
    batch = Batch(((1, tensors[1].shape[0] * tensors[1].shape[2] * 2),))
    assert (np.abs(out.cpu().double().numpy() - expected) <= limit_of(batch, expected, size)).all()
    found = lse.cpu().double().numpy()
    assert np.array_equal(np.isneginf(found), np.isneginf(expected_lse))
    finite = np.isfinite(expected_lse)
    assert np.abs(found[finite] - expected_lse[finite]).max(initial=0) < 2.0**-14


ROWS = [(40, [3, 7, 1]), (1, [9]), (0, [2]), (5, []), (130, [0, 1, 3, 8, 9, 2]), (16, [5, 4])]


@pytest.mark.parametrize("device", ["emulator", CUDA])
@pytest.mark.parametrize(
    ("block", "group"),
    [(16, 2), *(pytest.param(*kind, marks=pytest.mark.exhaustive) for kind in [(64, 1), (128, 4), (256, 3)])],
)
def test_rows_of_blocks(block: int, group: int, device: str) -> None:
    """Of many queries and few, without any, with empty lists; blocks in any order, shared by rows, never listed (NaN)."""
    check(problem(ROWS, 1, group, block), device)


@pytest.mark.parametrize("device", ["reference", CUDA])
def test_last_blocks_that_are_not_full(device: str) -> None:
    check(problem(ROWS, 2, 2, 32), device, [70, 1, 0, 0, 192, 33])


@pytest.mark.exhaustive
@given(st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(0, 9), max_size=6)), min_size=1, max_size=5))
@settings(max_examples=8)
def test_any_lists(rows: list[tuple[int, list[int]]]) -> None:
    """Also with blocks that a list has twice."""
    if sum(n for n, _ in rows):
        check(problem(rows, 1, 2, 16), "reference")


def test_two_formats_compose() -> None:
    """What rows share by rows of many queries, what they have apart by rows of few: merged they are rows with both."""
    together, apart = [(24, [2, 5])], [(8, [1]), (8, [7, 4]), (8, [])]
    both = problem([(n, [2, 5, *blocks]) for n, blocks in apart], 1, 2, 16)
    states = list[torch.Tensor]()
    for rows in (together, apart):
        lists = problem(rows, 1, 2, 16)[2:]
        states += block_sparse_attention(both[0], both[1], *lists, SCALE, return_lse=True, device="reference")
    out, lse = merge_states(*states, device="reference")
    expected, size, expected_lse = dense(both)
    assert (np.abs(out.double().numpy() - expected) <= 2 * limit_of(Batch(((1, 64),)), expected, size)).all()
    assert np.abs(lse.double().numpy() - expected_lse).max() < 2.0**-13


def wrong(**change: Any) -> str:
    names = ("q", "kv_cache", "row_start", "block_start", "blocks")
    arguments = dict(zip(names, problem([(4, [1, 2]), (2, [3])], 1, 2, 16), strict=True))
    with pytest.raises(TilusError) as caught:
        block_sparse_attention(**{**arguments, **change}, scale=SCALE, device="reference")
    return str(caught.value)


def test_arguments_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes always; in the debug mode also lists that are not in order, and blocks that there are not."""
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    assert "block_sparse_attention: row_start, block_start and blocks of shapes [3], [2] and [3]" in wrong(
        block_start=ints(0, 3)
    )
    assert "block_sparse_attention: page_size 24" in wrong(kv_cache=torch.zeros(4, 2, 24, 1, 64).half())
    monkeypatch.setenv("TILUS_DEBUG", "1")
    assert "entry 1 of blocks is 10, expected 0 to 9" in wrong(blocks=ints(1, 10, -1))
    assert "row 1 has entries 2 to 4" in wrong(block_start=ints(0, 2, 4))
    assert "row 0 has entries 0 to 2 and kv_len 33" in wrong(kv_lens=ints(33, 1))
