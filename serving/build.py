"""From a checkpoint to an engine: memory planned, weights from the cache or packed, everything put together."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

import torch

import tilus
from serving.config import EngineConfig, ServerConfig
from serving.core import MonotonicClock
from serving.decode_graph import GraphLimits
from serving.engine import Engine
from serving.execution import Execution
from serving.kernels import Kernels, default_kernels
from serving.loader import Checkpoint
from serving.memory import PAGE_SIZE, Wishes, expected_size, free_nbytes, plan, size_of
from serving.model import build_model
from serving.packing import FUSED, PackedWeights, pack_weights
from serving.progress import progress
from serving.rehearsal import rehearsal
from serving.runner import TorchRunner
from serving.weight_cache import WeightCache, moved, packed_form
from tilus.errors import TilusError


def build_engine(
    config: ServerConfig, path: Path, checkpoint: Checkpoint, kernels: Kernels, execution: Execution
) -> Engine:
    """The engine that serves a checkpoint, read from `path`. Says on stderr what happens and what it takes of the memory.

    Raises: TilusError when the model does not fit, or --max-model-len is more than it was made for.
    """
    model_limit = checkpoint.config.max_positions
    max_model_len = config.max_model_len or model_limit
    if max_model_len > model_limit:
        raise TilusError(f"--max-model-len is {max_model_len}, but the model was made for at most {model_limit} tokens")
    device = execution.device
    _say(f"loading {checkpoint.name} on {device.type}")
    if not execution.is_compiled:
        _say(f"kernels are interpreted ({execution.way}), which is slow")
    cache = None if config.dummy else _cache(path, config.weight_dtype, checkpoint, kernels, device)
    packed = cache.load() if cache is not None else None
    size = expected_size(checkpoint, kernels, device) if packed is None else size_of(packed)
    wishes = Wishes(config.max_batch, config.max_step_tokens, config.max_model_len, config.num_pages, config.kv_dtype)
    memory = plan(checkpoint.config, size, wishes, free_nbytes(device), device)
    _say(memory.table())
    packed = _pack(checkpoint, kernels, device, cache) if packed is None else moved(packed, device)
    limits = EngineConfig(
        num_pages=memory.num_pages,
        max_model_len=max_model_len,
        page_size=PAGE_SIZE,
        max_batch=config.max_batch,
        max_step_tokens=config.max_step_tokens,
        request_timeout=config.request_timeout,
        prefix_cache=not config.no_prefix_cache,
    )
    model = build_model(checkpoint.config, kernels, packed)
    pages = min(limits.num_pages, -(-max_model_len // PAGE_SIZE))
    # A capture sees no launches but those of tilus.
    captures = execution.is_compiled and kernels is default_kernels(config.batch_invariant)
    runner = TorchRunner(
        model, limits.num_pages, limits.page_size, device, kv_dtype=config.kv_dtype,
        graphs=GraphLimits(config.max_batch, pages) if captures else None,
    )  # fmt: skip
    if captures:
        with progress("compiling kernels", "kernel") as show:
            tilus.compile_ahead(lambda: runner.rehearse(rehearsal(limits)), done=show)
    return Engine(runner, checkpoint.tokenizer, limits, MonotonicClock())


def _cache(
    path: Path, weight_dtype: str, checkpoint: Checkpoint, kernels: Kernels, device: torch.device
) -> WeightCache | None:
    """On a GPU only for weights that are quantised while loading: it packs others faster than a disk reads."""
    if device.type != "cpu" and not any(
        checkpoint.weights.is_float(f"blk.0.{part}") for part in chain(*FUSED.values())
    ):
        return None
    form = packed_form(kernels, device)
    return None if form is None else WeightCache(path, weight_dtype, form)


def _pack(checkpoint: Checkpoint, kernels: Kernels, device: torch.device, cache: WeightCache | None) -> PackedWeights:
    with progress("packing weights", "layer") as show:
        packed = pack_weights(checkpoint, kernels, device, show)
    return packed if cache is None else cache.store(packed)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
