"""What the benchmark of caches' perplexity makes of two sets of expectations, counted another way."""

from __future__ import annotations

import math

import kv_perplexity
import numpy as np
import pytest
import torch

TOKENS, VOCABULARY = 40, 7


def expectations(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


@pytest.mark.parametrize("few", [1, 16, TOKENS - 1])
def test_rows_are_what_their_docstring_says(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(kv_perplexity, "FEW_TOKENS", few)
    monkeypatch.setattr(kv_perplexity, "CHUNK", 16)  # which does not divide the tokens
    windows = [np.random.default_rng(seed).integers(0, VOCABULARY, TOKENS).tolist() for seed in (0, 1)]
    pairs = [(expectations(seed), expectations(seed + 10)) for seed in (0, 1)]
    row = kv_perplexity.row_of(
        "int4", 4.5, [kv_perplexity.compared(*pair, window) for pair, window in zip(pairs, windows)]
    )

    wanted, found = (np.stack([pair[which].double().exp().numpy() for pair in pairs]) for which in (0, 1))
    changes, divergences, same = ([[] for _ in windows] for _ in range(3))
    product = 1.0
    for index, window in enumerate(windows):
        for at, token in enumerate(window[1:]):
            p, q = wanted[index, at], found[index, at]
            product *= q[token]
            changes[index].append(math.log(p[token] / q[token]))
            divergences[index].append(sum(a * math.log(a / b) for a, b in zip(p, q)))
            same[index].append(p.argmax() == q.argmax())
    count = 2 * (TOKENS - 1)
    assert row["perplexity"] == pytest.approx(product ** (-1 / count), abs=1e-4)
    assert row["same_top"] == pytest.approx(np.mean(same), abs=1e-4)

    def expected(first: int) -> dict[str, float]:
        """Of tokens from the one with this index on."""
        more = np.array(changes)[:, first - 1 :]
        return {
            "change": pytest.approx(math.exp(more.mean()) - 1, abs=2e-6),
            "deviation": pytest.approx(more.std(ddof=1) / more.size**0.5, abs=2e-6),
            "divergence": pytest.approx(np.array(divergences)[:, first - 1 :].mean(), abs=2e-6),
        }

    assert {name: row[name] for name in expected(1)} == expected(1)
    assert row["late"] == expected(few)


def test_windows_that_end_early_have_no_late_tokens() -> None:
    wanted = expectations(0)
    row = kv_perplexity.row_of("fp16", 16.0, [kv_perplexity.compared(wanted, wanted, [3] * TOKENS)])
    assert "late" not in row
    assert (row["change"], row["deviation"], row["divergence"], row["same_top"]) == (0, 0, 0, 1)
