"""Frames of a model's caches: they are those of its own keys and values, and change nothing but what rounding does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_llama import CPU, write_tiny
from torch import Tensor
from torch_kernels import TorchKernels

from serving import build
from serving.config import ServerConfig
from serving.core import Batch, BatchItem, SamplingParams
from serving.execution import choose_execution
from serving.kernels import default_kernels
from serving.kv_frames import with_frames
from serving.kv_pool import KvPool, PageShape
from serving.loader import Checkpoint
from serving.model import Model, load_model
from serving.runner import step_tensors
from serving.shards import Share
from serving.weight_cache import WeightCache

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


def test_frames_are_fitted_once(tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start finds the bits that the first one has kept; a damaged entry is made again."""
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path))
    (tmp_path / "model").mkdir()
    model = load_model(tiny_checkpoint, TorchKernels(), CPU)
    kept = WeightCache(tmp_path / "model", "int8", "", "frames")
    assert kept.path.parent == tmp_path / "frames"
    shown: list[int] = []

    def start(cache: WeightCache | None) -> list[Tensor]:
        framed = with_frames(
            model, tiny_checkpoint.tokenizer, 256, CPU, lambda done, _: shown.append(done), cache=cache
        )
        frames = [layer.frame for layer in framed.layers]
        return [part for frame in frames if frame is not None for part in (frame.queries, frame.keys)]

    wanted = start(None)
    assert len(wanted) == 4 and shown == [0, 1, 2]
    for fitted in (6, 6):  # by the first start; the second one fits nothing
        assert all(map(torch.equal, start(kept), wanted)) and len(shown) == fitted
    kept.path.write_bytes(kept.path.read_bytes()[:-1])
    assert all(map(torch.equal, start(kept), wanted)) and len(shown) == 9


def test_a_server_keeps_the_frames_of_both_of_its_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the draft model, which has fewer layers, are apart from the model's. Dummies and parts of --tp keep none."""
    monkeypatch.setenv("TILUS_DEVICE", "reference")
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "cache"))
    large, small = write_tiny(tmp_path / "large"), write_tiny(tmp_path / "small", num_hidden_layers=1)

    def fitted(group: Any = None, **options: object) -> int:
        """How many models' frames a start fits, of --tp one process that does without the other's sums."""
        config = ServerConfig(**({
            "model": str(large), "draft_model": str(small), "drafts": 4, "kv_dtype": "int4", "max_batch": 2, "num_pages": 16,
        } | options))  # fmt: skip
        path, checkpoint = build.open_model(config)
        parts = config, path, checkpoint, default_kernels(), choose_execution("auto")
        if group is None:
            build.build_engine(*parts)
        else:
            build.build_runner(*parts, group)
        return sum(line.endswith(" s") for line in capsys.readouterr().err.splitlines() if "fitting the cache" in line)

    half = SimpleNamespace(share=Share(0, 2), sum=lambda part: part, least=lambda number: number)
    assert fitted(dummy=True) == 2 and fitted(half) == 1 and not (tmp_path / "cache").exists()
    assert [fitted(), fitted()] == [2, 0]
    assert len(list((tmp_path / "cache" / "frames").iterdir())) == 2
    assert [fitted(max_model_len=128), fitted(max_model_len=128)] == [2, 0]


def test_everything_that_decides_frames_is_in_their_key(tiny_directory: Path, tmp_path: Path) -> None:
    def key(path: Path = tiny_directory, max_model_len: int = 256, form: str = "", **options: object) -> str:
        config = ServerConfig(**({"weight_dtype": "int8", "kv_dtype": "int4"} | options))  # pyright: ignore[reportArgumentType]
        return build._frames(path, config, max_model_len, form).key

    others = key(write_tiny(tmp_path / "other")), key(max_model_len=128), key(form="another"), key(group=64)
    assert len({key(), *others, key(weight_dtype="uint4"), key(kv_dtype="int8")}) == 7 and key() == key()
