"""A sampler that has seen other rows before chooses what a new one chooses: what is kept between steps is never stale."""

from __future__ import annotations

import numpy as np
import torch

from serving.core import BatchItem, SampledToken, SamplingParams
from serving.sampling import Sampler

CPU, VOCABULARY = torch.device("cpu"), 288
GREEDY, WARM = SamplingParams(temperature=0), SamplingParams(temperature=1.2, seed=5)
FEW, TELLS = SamplingParams(temperature=1.2, top_k=3, seed=7), SamplingParams(temperature=0, logprobs=2)
PUSHED = SamplingParams(temperature=0, logit_bias=((11, 100.0),))


def chosen(
    sampler: Sampler, logits: torch.Tensor, params: list[SamplingParams], draw: int
) -> list[SampledToken | None]:
    items = [BatchItem(str(row), (1,), 0, (0,), p, draw) for row, p in enumerate(params)]
    sampler.write(items)
    assert sampler.is_plain == all(p.logprobs is None and not p.logit_bias for p in params)
    sampler.run(logits[: len(items)], len(items))
    return list(sampler.collect(items)())


def test_rows_change_from_step_to_step(monkeypatch) -> None:
    monkeypatch.delenv("TILUS_DEVICE", raising=False)
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (3, VOCABULARY)).astype(np.float32))
    used = Sampler(VOCABULARY, 3, CPU)
    steps = [[WARM, GREEDY], [WARM, GREEDY], [GREEDY, WARM, FEW], [FEW], [WARM, TELLS, PUSHED], [WARM, WARM, GREEDY]]
    for draw, params in enumerate(steps):
        found = chosen(used, logits, params, draw)
        assert found == chosen(Sampler(VOCABULARY, 3, CPU), logits, params, draw)
        for row, p in enumerate(params):
            if p is GREEDY:
                assert found[row] == SampledToken(int(logits[row].argmax()))
            if p is PUSHED:
                assert found[row] == SampledToken(11)
