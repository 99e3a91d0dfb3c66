"""The frames of a cache of 4 bits (`tilus.kernels.KvFrame`), fitted to what the model makes of a short text.

They depend on the model and its longest sequence alone: every start and every process finds the same ones, each of --tp those of
its own heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from serving.core import Batch, BatchItem
from serving.kernels import Kernels, KvCache
from serving.model import Model
from serving.packing import PackedWeights
from serving.runner import step_tensors
from serving.tokenizer import Tokenizer
from serving.weight_cache import WeightCache, moved
from tilus.kernels import KV_FORMATS, KvFrame, fit_kv_frame

_TEXT = Path(__file__).parent / "calibration.txt"
_PAGE = 16
_MAX_PART = 256  # tokens
# Where parts of the text start, in shares of the longest sequence: keys that turn slowly have another mean farther on, where most
# requests never come.
_STARTS = (0.0, 1 / 16, 1 / 8, 1 / 4)


def has_frames(kv_dtype: str) -> bool:
    return kv_dtype in KV_FORMATS and KV_FORMATS[kv_dtype].has_centre


@torch.inference_mode()
def with_frames(
    model: Model, tokenizer: Tokenizer, max_model_len: int, device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None, cache: WeightCache | None = None,
) -> Model:  # fmt: skip
    """The model with a frame in each layer. progress: called with (layers done, layers in all) while they are fitted. cache:
    where they are kept; what it has is not fitted again."""
    kept = None if cache is None else cache.load()
    if kept is None:
        kept = _fitted(model, tokenizer, max_model_len, device, progress)
        kept = kept if cache is None else cache.store(kept)
    parts = moved(kept, device).tensors
    frames = map(KvFrame, parts["queries"], parts["keys"])
    pairs = zip(model.layers, frames, strict=True)
    return replace(model, layers=tuple(replace(layer, frame=frame) for layer, frame in pairs))


def _fitted(
    model: Model, tokenizer: Tokenizer, max_model_len: int, device: torch.device, progress: Callable[[int, int], None]
) -> PackedWeights:
    """The frames of all layers, as `queries` [layers, 3, Hq, D] and `keys` [layers, 4, Hkv, D]."""
    ids = tokenizer.encode(_TEXT.read_text(encoding="utf-8"))
    size = max(1, min(len(ids) // len(_STARTS), max_model_len // len(_STARTS), _MAX_PART))
    pages = -(-size // _PAGE)
    items = tuple(
        BatchItem(str(part), ids[part * size :][:size], 0, tuple(range(part * pages, (part + 1) * pages)), None, 0)
        for part in range(len(_STARTS))
    )
    step = step_tensors(Batch(items), _PAGE, device)
    starts = torch.tensor([int(share * max_model_len) for share in _STARTS], dtype=torch.int32, device=device)
    step = replace(step, positions=step.positions + starts.repeat_interleave(size))
    watched = _Watched(model, progress)
    config = model.config
    dtype = torch.bfloat16 if config.architecture.wide else torch.float16
    shape = pages * len(items), 2, _PAGE, config.num_kv_heads, config.head_dim
    cache = torch.zeros(shape, dtype=dtype, device=device)  # the layers' in turn
    replace(model, kernels=cast(Kernels, watched)).forward(step, [cache] * config.num_layers)
    queries, keys = zip(*((frame.queries, frame.keys) for frame in watched.frames))
    return PackedWeights({"queries": torch.stack(queries), "keys": torch.stack(keys)}, {})


class _Watched:
    """A model's kernels, and the frames of what its layers append to their caches, in order."""

    def __init__(self, model: Model, progress: Callable[[int, int], None]) -> None:
        self.frames: list[KvFrame] = []
        self._kernels = model.kernels
        self._centred = model.config.attention_cap is None
        self._progress = lambda: progress(len(self.frames), model.config.num_layers)
        self._progress()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def rope_append(
        self, qkv: Tensor, positions: Tensor, cos_sin: Tensor, slots: Tensor, kv_cache: KvCache, **options: Any
    ) -> Tensor:
        q = self._kernels.rope_append(qkv, positions, cos_sin, slots, kv_cache, **options)
        assert isinstance(kv_cache, Tensor)
        keys, values = kv_cache[slots.long() // _PAGE, :, slots.long() % _PAGE].cpu().unbind(1)
        self.frames.append(fit_kv_frame(q.cpu(), keys, values, centred=self._centred))
        self._progress()
        return q
