"""Mixtures of experts against float64, and the order of their rows against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import RELATIVE, float64
from weights import random_matrix

import tilus
from tilus import TilusError
from tilus.kernels import mixture
from tilus.kernels.mixture import places_kernel, route_kernel
from tilus.kernels.quantize import pack, stack


@pytest.mark.parametrize(
    ("tokens", "experts", "top", "normalized"), [(3, 8, 2, True), (1, 60, 4, False), (2, 1, 1, False)]
)
def test_routes(device: str, tokens: int, experts: int, top: int, normalized: bool) -> None:
    """The largest logits first, of equal ones those of the first experts; weights are a softmax over all or over the chosen."""
    logits = 4 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts))
    if experts > 2:
        logits[0, -1] = logits[0, 1] = logits[0].max() + 1
    ids, weights = torch.empty(tokens, top, dtype=torch.int32), torch.empty(tokens, top)
    route_kernel.on(device)(logits, ids, weights, experts=experts, top=top, normalized=normalized)
    exact = float64(logits)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :top]
    np.testing.assert_array_equal(ids, order)
    share = np.exp(exact - exact.max(1, keepdims=True))
    chosen = np.take_along_axis(share, order, 1)
    expected = chosen / (chosen if normalized else share).sum(1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=2.0**-17)


@pytest.mark.parametrize(("rows", "experts"), [(1, 3), (70, 5), (300, 128)])
def test_places_sort_rows_by_expert(device: str, rows: int, experts: int) -> None:
    """Rows of one expert stay in their order; experts without rows begin where the next one does."""
    ids = torch.randint(0, experts, (rows,), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
    found = torch.empty(rows + experts + 1, dtype=torch.int32)
    places_kernel.on(device)(ids, found)
    order = np.argsort(ids.numpy(), kind="stable")
    np.testing.assert_array_equal(found[:rows].numpy()[order], np.arange(rows))
    np.testing.assert_array_equal(found[rows:], np.searchsorted(np.sort(ids.numpy()), np.arange(experts + 1)))


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("tokens", "act"), [(1, torch.float16), (5, torch.bfloat16)], ids=str)
def test_mixture(device: str, tokens: int, act: torch.dtype) -> None:
    """Off by the rounding of each expert's products and activations to the type of x, which add up to at most three half steps of
    what is added up, and of the sum."""
    hidden, width, experts, top = 64, 64, 4, 2
    first = [random_matrix(tilus.int4, 2 * width, hidden, 32, seed=seed) for seed in range(experts)]
    second = [random_matrix(tilus.int8, hidden, width, 32, seed=seed) for seed in range(experts)]
    generator = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, hidden, generator=generator) / 8).to(act)
    logits = torch.randn(tokens, experts, generator=generator)
    on = "cpu" if device == "cpu" else None
    found = mixture(
        x, logits, *(stack([pack(matrix, on) for matrix in matrices]) for matrices in (first, second)), top=top,
        normalized=True, device=device,
    )  # fmt: skip
    assert found.dtype == act
    expected, size = np.zeros((tokens, hidden)), np.zeros((tokens, hidden))
    for token, row in enumerate(float64(x)):
        chosen = np.argsort(-logits[token].numpy())[:top]
        share = np.exp(float64(logits[token])[chosen])
        for expert, weight in zip(chosen, share / share.sum()):
            gate, up = np.split(float64(first[expert].dequantize()) @ row, 2)
            gated = gate / (1 + np.exp(-gate)) * up
            down = float64(second[expert].dequantize())
            expected[token] += weight * (down @ gated)
            # The gate and the factor are off by half a step each, which silu makes no more than doubled; so is their product.
            size[token] += weight * (
                4 * np.abs(down) @ (np.abs(gated) + np.abs(gate * up) * 0.1) + np.abs(down @ gated)
            )
    error = np.abs(float64(found) - expected)
    assert (error <= RELATIVE[act] * (size + np.abs(expected)) + 2.0**-20).all(), (error / size).max()


def test_a_row_has_the_same_bits_in_any_company() -> None:
    matrices = [random_matrix(tilus.int4, 128, 64, 32, seed=seed) for seed in range(3)]
    gate_up = stack([pack(matrix, "cpu") for matrix in matrices])
    down = stack([pack(random_matrix(tilus.int4, 64, 64, 32, seed=seed), "cpu") for seed in range(3)])
    x, logits = torch.randn(40, 64).half(), torch.randn(40, 3)
    options = {"top": 2, "normalized": False, "invariant": True, "device": "cpu"}
    together = mixture(x, logits, gate_up, down, **options)
    assert torch.equal(mixture(x[7:8], logits[7:8], gate_up, down, **options), together[7:8])


def test_no_tokens() -> None:
    gate_up, down = (pack(random_matrix(tilus.int4, n, 64, 32), "cpu") for n in (128, 64))
    x = torch.zeros(0, 64).half()
    assert mixture(x, torch.zeros(0, 1), gate_up, down, top=1, normalized=True, device="cpu").shape == (0, 64)


def test_mistakes_are_named_with_both_values() -> None:
    gate_up, down = (pack(random_matrix(tilus.int4, n, 64, 32), "cpu") for n in (128, 64))
    x = torch.zeros(2, 64).half()
    with pytest.raises(TilusError, match=r"x of shape \[2, 64\] and logits of shape \[3, 1\], expected"):
        mixture(x, torch.zeros(3, 1), gate_up, down, top=1, normalized=True)
    with pytest.raises(TilusError, match="top = 2 of 1 experts, expected 1 to 1"):
        mixture(x, torch.zeros(2, 1), gate_up, down, top=2, normalized=True)
