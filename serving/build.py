"""From a checkpoint to an engine: memory planned, weights from the cache or packed, everything put together."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

import tilus
from serving.config import MAX_DRAFTS, EngineConfig, ServerConfig
from serving.core import Runner
from serving.cost_model import CostModel
from serving.dummy import open_dummy
from serving.engine import Engine
from serving.execution import Execution, choose_execution
from serving.grammar import Grammars
from serving.host_memory import available_nbytes
from serving.kernels import Kernels, default_kernels
from serving.kv import PageTables
from serving.kv_frames import has_frames, with_frames
from serving.loader import Checkpoint, default_model, open_checkpoint
from serving.memory import PAGE_SIZE, MemoryPlan, expected_size, free_nbytes, plan, size_of
from serving.model import build_model
from serving.packing import FUSED, PackedWeights, pack_weights
from serving.progress import progress, say
from serving.quantize import DENSE, weight_type
from serving.rehearsal import rehearsal
from serving.request_log import RequestLog
from serving.runner import TorchRunner
from serving.shards import columns_of, shard
from serving.speculation import Drafter, DraftModel, PromptLookup
from serving.step_shapes import GraphLimits
from serving.tensor_parallel import Group, ParallelRunner, Ranks
from serving.trace import Trace
from serving.weight_cache import WeightCache, moved, packed_form
from tilus.config import autotune, cache_dir, debug
from tilus.errors import TilusError


def open_model(config: ServerConfig) -> tuple[Path, Checkpoint]:
    """What --model says, and where it is."""
    path = Path(config.model) if config.model else default_model()
    opened = open_dummy if config.dummy else open_checkpoint
    return path, opened(path, weight_type(config.weight_dtype), config.group)


def build_engine(
    config: ServerConfig, path: Path, checkpoint: Checkpoint, kernels: Kernels, execution: Execution,
    ranks: Ranks | None = None,
) -> Engine:  # fmt: skip
    """The engine that serves a checkpoint, read from `path`. Says on stderr what happens and what it takes of the memory.

    ranks: the processes that hold a part of the model each, this one the first.
    Raises: TilusError when the model does not fit, or --max-model-len is more than it was made for.
    """
    group = None if ranks is None else ranks.group
    drafter = _drafter(config, checkpoint, kernels, execution)  # first: the model's cache takes what is left
    trace = Trace(Path(config.trace)) if config.trace is not None else None
    runner, limits = build_runner(config, path, checkpoint, kernels, execution, group, trace)
    page_copy_seconds = 0.0 if runner.swapper is None else runner.swapper.seconds_a_page()
    cost = CostModel(_steps_file(config, checkpoint, execution), page_copy_seconds, runner.rows)
    engine = Engine(
        runner if ranks is None else ParallelRunner(runner, ranks.others), checkpoint.tokenizer, limits, time.monotonic,
        Grammars(checkpoint.tokenizer).matcher, drafter=drafter, trace=trace, cost=cost,
    )  # fmt: skip
    engine.observers += [RequestLog()] if config.log_requests else []
    return engine


def _drafter(config: ServerConfig, checkpoint: Checkpoint, kernels: Kernels, execution: Execution) -> Drafter | None:
    """What --drafts and --draft-model ask for. A draft model's cache holds half of what the largest batch may need.

    Raises: TilusError when the draft model has other tokens.
    """
    if not config.drafts:
        return None
    if config.draft_model is None:
        return PromptLookup()
    path, small = open_model(replace(config, model=config.draft_model))
    if small.tokenizer.vocab_size != checkpoint.tokenizer.vocab_size:
        raise TilusError(
            f"the draft model has {small.tokenizer.vocab_size} tokens, {checkpoint.name} has {checkpoint.tokenizer.vocab_size}",
            hint="--draft-model must be of the same family",
        )
    length = min(config.max_model_len or checkpoint.config.max_positions, small.config.max_positions)
    # Its first step after a check has what the check kept, too.
    tokens = max(config.max_step_tokens, config.max_batch * (MAX_DRAFTS + 1))
    num_pages = -(-length // PAGE_SIZE) * max(1, config.max_batch // 2)
    options = replace(
        config, max_model_len=length, num_pages=num_pages, drafts=0, swap_space=0.0, max_step_tokens=tokens
    )
    runner, limits = build_runner(options, path, small, kernels, execution)
    return DraftModel(runner, PageTables(num_pages, PAGE_SIZE), limits.max_step_tokens)


def rank_runner(config: ServerConfig, group: Group) -> Runner:
    """The runner of another process of --tp."""
    path, checkpoint = open_model(config)
    return build_runner(
        config, path, checkpoint, default_kernels(config.batch_invariant), choose_execution(config.device), group
    )[0]


def build_runner(
    config: ServerConfig,
    path: Path,
    checkpoint: Checkpoint,
    kernels: Kernels,
    execution: Execution,
    group: Group | None = None,
    trace: Trace | None = None,
) -> tuple[TorchRunner, EngineConfig]:
    """What runs a checkpoint's steps in this process, and the limits that follow from the memory of all."""
    columns = None
    if group is not None:  # sums of parts would have other bits than those of one device
        columns = columns_of(checkpoint, group.share) if config.batch_invariant else None
        checkpoint = shard(checkpoint, group.share, parts_of_sums=columns is None)
    max_model_len, device = _max_model_len(config, checkpoint), execution.device
    _announce(config, checkpoint, execution, group)
    packed, memory = _packed_weights(config, path, checkpoint, kernels, device, group)
    limits = _limits(config, memory, max_model_len, device)
    model = build_model(checkpoint.config, kernels, packed, None if group is None else group.sum, columns)
    if has_frames(config.kv_dtype):
        form = packed_form(kernels, device) if _may_be_kept(config, group) else None
        kept = None if form is None else _frames(path, config, max_model_len, form)
        with progress("fitting the cache", "layer") as show:
            model = with_frames(model, checkpoint.tokenizer, max_model_len, device, show, kept)
    pages = min(limits.num_pages, -(-max_model_len // PAGE_SIZE))
    captures = kernels is default_kernels(config.batch_invariant) and can_capture(execution, group is not None)
    graphs = GraphLimits(config.max_batch, pages, config.max_step_tokens, config.drafts)
    runner = TorchRunner(
        model, limits.num_pages, limits.page_size, device, kv_dtype=config.kv_dtype,
        max_rows=config.max_batch * (1 + config.drafts), graphs=graphs if captures else None,
        num_host_pages=limits.num_host_pages, trace=trace,
    )  # fmt: skip
    if captures:
        if group is not None:
            group.before_leaving(runner.drop_graphs)
        _prepare_steps(runner, limits, device, group)
    return runner, limits


def _announce(config: ServerConfig, checkpoint: Checkpoint, execution: Execution, group: Group | None) -> None:
    """What will run where. Raises TilusError for weights that nothing multiplies there."""
    parts = "" if group is None else f"s of {group.share.count} processes"
    say(f"loading {checkpoint.name} on {execution.device.type}{parts}")
    if not execution.is_compiled:
        say(f"kernels are interpreted ({execution.way}), which is slow")
    if config.weight_dtype == DENSE and execution.way != "cuda":
        raise TilusError(
            f"--weight-dtype {DENSE} is for GPUs, but the model runs on {execution.way}", hint="take int8 or fewer bits"
        )


def _packed_weights(
    config: ServerConfig,
    path: Path,
    checkpoint: Checkpoint,
    kernels: Kernels,
    device: torch.device,
    group: Group | None,
) -> tuple[PackedWeights, MemoryPlan]:
    """From the cache or packed, when it is known that they fit; the cache has as many pages as the smallest memory holds."""
    is_kept = _may_be_kept(config, group) and config.weight_dtype != DENSE
    cache = _cache(path, _rounding(config), checkpoint, kernels, device) if is_kept else None
    kept = None if cache is None else cache.load()
    size = expected_size(checkpoint, kernels, device) if kept is None else size_of(kept)
    memory = plan(checkpoint.config, size, config, free_nbytes(device), device)
    say(memory.table())
    memory = memory if group is None else replace(memory, num_pages=group.least(memory.num_pages))
    if kept is not None:
        return moved(kept, device), memory
    with progress("packing weights", "layer") as show:
        packed = pack_weights(checkpoint, kernels, device, show)
    return packed if cache is None else cache.store(packed), memory


def _limits(config: ServerConfig, memory: MemoryPlan, max_model_len: int, device: torch.device) -> EngineConfig:
    return EngineConfig(
        num_pages=memory.num_pages,
        max_model_len=max_model_len,
        page_size=PAGE_SIZE,
        max_batch=config.max_batch,
        max_step_tokens=config.max_step_tokens,
        request_timeout=config.request_timeout,
        prefix_cache=not config.no_prefix_cache,
        num_drafts=config.drafts,
        overlap=device.type == "cuda" and not config.no_overlap,  # a launch on a CPU ends when the step does
        itl_slo=None if config.itl_slo is None else config.itl_slo / 1e3,
        admission=config.admission,
        schedule=config.schedule,
        num_host_pages=_num_host_pages(config.swap_space, memory.page_nbytes),
    )


def _may_be_kept(config: ServerConfig, group: Group | None) -> bool:
    """Whether what is made of a model is of use to a later start: not of random weights, nor of a part of --tp."""
    return not config.dummy and group is None


def _max_model_len(config: ServerConfig, checkpoint: Checkpoint) -> int:
    limit = checkpoint.config.max_positions
    if config.max_model_len is not None and config.max_model_len > limit:
        raise TilusError(
            f"--max-model-len is {config.max_model_len}, but the model was made for at most {limit} tokens"
        )
    return config.max_model_len or limit


def can_capture(execution: Execution, is_parallel: bool) -> bool:
    """Whether steps of tilus' kernels can be captured: on a CPU without sums of several processes, on a GPU without indices that
    are checked on the host (TILUS_DEBUG=1)."""
    return (execution.way == "cpu" and not is_parallel) or (execution.way == "cuda" and not debug())


def _prepare_steps(runner: TorchRunner, limits: EngineConfig, device: torch.device, group: Group | None) -> None:
    """Compile kernels and, on a GPU, capture steps, in all processes of --tp alike: their sums meet."""
    on_gpu = device.type == "cuda"
    if group is None:  # else a dry run would wait for sums
        with progress("compiling kernels", "kernel") as show:
            tilus.compile_ahead(lambda: runner.rehearse(() if on_gpu else rehearsal(limits)), done=show)
    if on_gpu:
        with progress(f"{'tuning and ' * autotune()}capturing steps", "step") as show:
            runner.capture(show)


def _num_host_pages(swap_space: float, page_nbytes: int) -> int:
    """How many pages so many GiB hold, which the host must have."""
    nbytes, left = int(swap_space * 2**30), available_nbytes()
    if nbytes > left:
        raise TilusError(
            f"--swap-space is {swap_space:g} GiB, but the host has {left / 2**30:.1f} GiB left",
            hint="take less; requests that lose their place and find no room there are computed again",
        )
    return nbytes // page_nbytes


def _steps_file(config: ServerConfig, checkpoint: Checkpoint, execution: Execution) -> Path:
    """Where the times of steps are kept, by what they depend on."""
    on_gpu = execution.device.type == "cuda"
    device = torch.cuda.get_device_name(execution.device) if on_gpu else f"{platform.node()} {os.cpu_count()}"
    parts = (
        checkpoint.name,
        checkpoint.config,
        _rounding(config),
        config.kv_dtype,
        config.batch_invariant,
        config.tp,
        execution.way,
        device,
    )
    return cache_dir() / "steps" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"


def _rounding(config: ServerConfig) -> str:
    return f"{config.weight_dtype} in groups of {config.group}"


def _cache(
    path: Path, rounding: str, checkpoint: Checkpoint, kernels: Kernels, device: torch.device
) -> WeightCache | None:
    """On a GPU only for weights that are quantised while loading: it packs others faster than a disk reads."""
    if device.type != "cpu" and not any(
        checkpoint.weights.stored(f"blk.0.{part}").is_float for part in chain(*FUSED.values())
    ):
        return None
    form = packed_form(kernels, device)
    return None if form is None else WeightCache(path, rounding, form)


def _frames(path: Path, config: ServerConfig, max_model_len: int, form: str) -> WeightCache:
    """Where the frames of the model at `path` are kept, which may be the draft model."""
    return WeightCache(path, _rounding(config), f"{config.kv_dtype}, {max_model_len} tokens, {form}", "frames")
