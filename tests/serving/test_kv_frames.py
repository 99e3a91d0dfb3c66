"""Frames of a model's caches: they are those of its own keys and values, and change nothing but what rounding does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_llama import CPU
from torch import Tensor
from torch_kernels import TorchKernels

from serving.core import Batch, BatchItem, SamplingParams
from serving.kernels import default_kernels
from serving.kv_frames import with_frames
from serving.kv_pool import KvPool, PageShape
from serving.loader import Checkpoint
from serving.model import Model, load_model
from serving.runner import step_tensors

PAGE, TOKENS = 16, 48


def logits(model: Model, kv_dtype: str) -> Tensor:
    """Of one sequence, read from the cache."""
    pool = KvPool(PageShape(model.config, PAGE, kv_dtype), TOKENS // PAGE, CPU)
    item = BatchItem("text", tuple(range(40, 40 + TOKENS)), 0, tuple(range(TOKENS // PAGE)), SamplingParams(), 0)
    step = replace(step_tensors(Batch((item,)), PAGE, CPU), last=None)
    return model.forward(step, pool.layers).double()


def test_frames_change_nothing_but_rounding(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of 8 bits leave a hundredth of the logits' size, with frames and without."""
    monkeypatch.setenv("TILUS_DEVICE", "reference")
    model = load_model(tiny_checkpoint, default_kernels(), CPU)
    framed = with_frames(model, tiny_checkpoint.tokenizer, tiny_checkpoint.config.max_positions, CPU)
    wanted = logits(model, "fp16")
    for other in (model, framed):
        assert (logits(other, "int8") - wanted).norm() < 0.02 * wanted.norm()
    assert all(layer.frame is not None and layer.frame.keys.any() for layer in framed.layers)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_keys_lose_their_mean_unless_scores_are_capped(tiny_checkpoint: Checkpoint, cap: float | None) -> None:
    """Tokens all alike have the same values, and at positions that do not turn keys of one kind: their centre, and the mean that
    reflections of values turn to equal elements, are these."""
    model = load_model(tiny_checkpoint, TorchKernels(), CPU)
    still = torch.cat([torch.ones(256, 8), torch.zeros(256, 8)], dim=1)
    model = replace(model, config=replace(model.config, attention_cap=cap))
    model = replace(model, layers=tuple(replace(layer, cos_sin=still) for layer in model.layers))
    table = model.embedding.table[:1].expand_as(model.embedding.table).contiguous()
    scales = model.embedding.scales
    scales = None if scales is None else scales[:1].expand_as(scales).contiguous()
    model = replace(model, embedding=replace(model.embedding, table=table, scales=scales))
    shown: list[tuple[int, int]] = []
    framed = with_frames(model, tiny_checkpoint.tokenizer, 256, CPU, lambda *done: shown.append(done))
    assert shown[0] == (0, 2) and shown[-1] == (2, 2)
    pool = KvPool(PageShape(model.config, PAGE), 1, CPU)
    item = BatchItem("token", (5, 5), 0, (0,), None, 0)
    model.forward(step_tensors(Batch((item,)), PAGE, CPU), pool.layers)
    for layer, cache in zip(framed.layers, pool.layers):
        assert layer.frame is not None
        keys, values = (cache[0, which, 0].double() for which in (0, 1))
        assert torch.allclose(layer.frame.keys[3].double(), keys if cap is None else keys * 0, atol=1e-6)
        mirror = layer.frame.keys[2].double()
        first = values - mirror * (mirror * values).sum(-1, keepdim=True)
        assert torch.allclose(first[:, 0].abs(), values.norm(dim=-1), rtol=1e-3)
