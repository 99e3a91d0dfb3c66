"""The model where kernels leave norms to the next linear layer: the same logits but for rounding, and nobody else reads them."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import CPU, TINY
from torch_kernels import TorchKernels

from serving.core import Batch, BatchItem, SamplingParams
from serving.dummy import open_dummy
from serving.kernels import default_kernels
from serving.layers import Norm
from serving.loader import Checkpoint
from serving.model import Model, load_model
from serving.step_inputs import step_tensors
from tilus.dtypes import dtype
from tilus.kernels import DeferredNorm, linear, linear_add_rms_norm, quantize
from tilus.kernels.linear_norm import deferred

LAYERS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of whole tiles: extents are multiples of 64."""
    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "intermediate_size": 192,
    }
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(TINY | sizes | {"num_hidden_layers": LAYERS}))
    return open_dummy(path, dtype("int4"), group=32)


class Deferring:
    """`tilus.kernels` as on Hopper: every norm that has a reader is left to it."""

    def __init__(self) -> None:
        self.left: list[tuple[DeferredNorm, Any]] = []
        self.read: list[tuple[DeferredNorm, Any]] = []

    @property
    def kernels(self) -> Any:
        packing = SimpleNamespace(pack=functools.partial(quantize.pack, order="mma"))
        changed = {"linear": self.linear, "linear_add_rms_norm": self.linear_add_rms_norm, "quantize": packing}
        return SimpleNamespace(**vars(default_kernels()) | changed)

    def linear(self, x: Any, weight: Any, **options: Any) -> torch.Tensor:
        if isinstance(x, DeferredNorm):
            self.read.append((x, weight))
        return linear(x, weight, device="reference", **options)

    def linear_add_rms_norm(self, *args: Any, reader: Any, scale: float, **options: Any) -> Any:
        if reader is None:
            return linear_add_rms_norm(*args, device="reference", **options)
        found = deferred(*args, scale=scale, device="reference", **options)
        self.left.append((found, reader))
        return found


def logits_of(model: Model, count: int) -> torch.Tensor:
    """Of the last of `count` tokens of one sequence, in one step."""
    item = BatchItem("r", tuple(range(1, count + 1)), 0, (0,), SamplingParams(temperature=0), 0)
    pool = torch.zeros(LAYERS, 1, 2, 16, 1, 64, dtype=torch.float16)
    return model.forward(step_tensors(Batch((item,)), 16, CPU), pool.unbind(0))


def test_logits(checkpoint: Checkpoint) -> None:
    """Each layer rounds at most 8 tensors to float16, as in test_serving_model.py, whichever way norms are taken."""
    exact, deferring = load_model(checkpoint, TorchKernels(), CPU), Deferring()
    model = load_model(checkpoint, deferring.kernels, CPU)
    expected, found = logits_of(exact, 9), logits_of(model, 9)
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < (8 * LAYERS + 2) * 2**-11
    assert len(deferring.left) == 2 * LAYERS - 1, "all but the first norm and that in front of the head"
    assert all(
        left[0] is read[0] and left[1] is read[1] for left, read in zip(deferring.left, deferring.read, strict=True)
    )


@given(st.floats(2**-20, 2**20, width=32))
def test_scales_of_the_stream(largest: float) -> None:
    """A power of two, no more than 1, that makes no element larger than it is, and little smaller than it could be."""
    norm = Norm.of(torch.tensor([largest / 2, -largest]))
    assert torch.frexp(torch.tensor(norm.scale)).mantissa == 0.5 and norm.scale <= 1
    assert norm.scale * largest <= 1
    assert largest <= 1 or norm.scale * largest > 0.5
