"""Several processes that hold a model together: parts of weights, and the answers of all of them together."""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from live_server import wait_until
from tiny_families import write_family
from tiny_llama import CPU, write_tiny
from torch_kernels import TorchKernels

from serving import tensor_parallel
from serving.build import build_engine, build_runner, rank_runner
from serving.config import ServerConfig
from serving.core import Request, Runner, SampledToken, SamplingParams
from serving.engine import Engine
from serving.execution import Execution
from serving.kernels import default_kernels
from serving.layers import Linear
from serving.loader import Checkpoint, open_checkpoint
from serving.shards import Share, shard
from serving.tensor_parallel import Group, ranks
from tilus.dtypes import uint4
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix

ROWS = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
COLUMNS = ("attn_output", "ffn_down")
WAY = Execution(CPU, "reference")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@given(number=st.integers(0, 50), count=st.integers(1, 9))
def test_shares_are_everything_once_and_as_equal_as_can_be(number: int, count: int) -> None:
    shares = [Share(index, count).of(number) for index in range(count)]
    assert [item for share in shares for item in share] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.weights.matrix(f"blk.1.{name}").dequantize()


def test_parts_are_the_matrices_of_the_model(tiny: Path) -> None:
    """Two key-value heads go to two devices; of 160 columns in groups of 32, one gets 64 and one 96."""
    whole = open_checkpoint(tiny)
    parts = [shard(whole, Share(index, 2)) for index in range(2)]
    assert [(p.config.num_heads, p.config.num_kv_heads, p.config.ffn_size) for p in parts] == [(3, 1, 64), (3, 1, 96)]
    for axis, names in enumerate((ROWS, COLUMNS)):
        for name in names:
            found = np.concatenate([values(part, name) for part in parts], axis)
            np.testing.assert_array_equal(found, values(whole, name))
            for part in parts:
                stored = part.weights.stored(f"blk.1.{name}")
                assert stored.first_row is not None
                assert stored.first_row.stacks_with(part.weights.matrix(f"blk.1.{name}"))
                assert stored.num_rows == len(values(part, name))
    np.testing.assert_array_equal(parts[1].weights.vector("output_norm"), whole.weights.vector("output_norm"))


def test_biases_go_with_their_rows(tmp_path: Path) -> None:
    """Of Qwen 2, which has them for queries, keys and values."""
    whole = open_checkpoint(write_family(tmp_path / "qwen", "qwen 2"))
    assert set(whole.config.biases) == {"attn_q", "attn_k", "attn_v"}
    parts = [shard(whole, Share(index, 2)) for index in range(2)]
    for name in whole.config.biases:
        bias = whole.weights.bias(f"blk.1.{name}")
        assert bias.any()
        np.testing.assert_array_equal(np.concatenate([part.weights.bias(f"blk.1.{name}") for part in parts]), bias)


def test_a_bias_is_added_to_the_whole_sum() -> None:
    """Not to the part of each device; and what is added up has not been rounded."""
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 32, generator=rng).double(), torch.randn(5, generator=rng)
    x = torch.randn(3, 32, generator=rng).half()
    found = Linear((weight,), bias)(TorchKernels(), x, lambda part: 2 * part)
    expected = (2 * (x.double() @ weight.T).float() + bias).half()
    assert found.dtype == torch.float16 and torch.equal(found, expected)


def test_more_devices_than_heads_are_refused(tiny: Path) -> None:
    with pytest.raises(TilusError, match="2 key-value heads, which 3 devices cannot share"):
        shard(open_checkpoint(tiny), Share(0, 3))


@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize(("start", "stop"), [(32, 96), (0, 48), (16, 80)])
def test_columns_of_a_matrix_keep_their_values(group: int, start: int, stop: int) -> None:
    rng = np.random.default_rng(0)
    codes, sets = rng.integers(0, 16, (3, 96), np.uint8), 96 // group
    scales, mins = (rng.normal(size=(3, sets)).astype(np.float32) for _ in range(2))
    matrix = QuantizedMatrix(codes, scales, mins, dtype=uint4, zeros=rng.integers(0, 8, (3, sets)).astype(np.int16))
    np.testing.assert_array_equal(matrix.take_columns(start, stop).dequantize(), matrix.dequantize()[:, start:stop])


def options(tiny: Path, **changes: object) -> ServerConfig:
    return ServerConfig(**({"model": str(tiny), "max_batch": 4, "max_step_tokens": 16, "num_pages": 24} | changes))


def oracle_runner(config: ServerConfig, group: Group) -> Runner:
    """What the other process runs."""
    return build_runner(
        config, Path(config.model or ""), open_checkpoint(Path(config.model or "")), TorchKernels(), WAY, group
    )[0]


def answers(engine: Engine) -> dict[str, list[SampledToken]]:
    tokens: dict[str, list[SampledToken]] = {}
    for index in range(5):
        prompt = tuple(np.random.default_rng(index).integers(0, 256, 5 + 9 * index).tolist())
        params = SamplingParams(
            max_tokens=8 + index, temperature=float(index % 2), seed=index, ignore_eos=True, logprobs=0
        )
        engine.add(Request(str(index), prompt, params))
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.tokens)
    engine.check()
    return tokens


def token_ids(tokens: list[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


def test_two_processes_answer_as_one(tiny: Path) -> None:
    """Greedy and random answers, prompts in chunks, a cache so small that sequences lose their pages."""
    torch.set_num_threads(1)
    checkpoint, kernels = open_checkpoint(tiny), TorchKernels()
    alone = answers(build_engine(options(tiny), tiny, checkpoint, kernels, WAY))
    expected = {name: token_ids(found) for name, found in alone.items()}
    config = options(tiny, tp=2)
    with ranks(config, CPU, oracle_runner) as both:
        together = answers(build_engine(config, tiny, checkpoint, kernels, WAY, both))
    assert {name: token_ids(found) for name, found in together.items()} == expected


def test_in_the_batch_invariant_mode_two_processes_compute_the_bits_of_one(tiny: Path) -> None:
    """With the library's kernels: log-probabilities are equal, not nearly. Heads and columns are not shared evenly."""
    torch.set_num_threads(1)
    checkpoint, way = open_checkpoint(tiny), Execution(CPU, "cpu")
    config = options(tiny, batch_invariant=True, device="cpu")
    alone = answers(build_engine(config, tiny, checkpoint, default_kernels(True), way))
    config = replace(config, tp=2)
    with ranks(config, CPU, rank_runner) as both:
        together = answers(build_engine(config, tiny, checkpoint, default_kernels(True), way, both))
    assert together == alone


def one_alone(tmp_path: Path) -> Group:
    return Group(Share(0, 1), CPU, tmp_path / "meeting")


def test_graphs_go_before_the_processes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    group, destroy = one_alone(tmp_path), dist.destroy_process_group
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (happened.append("parted"), destroy()))
    group.before_leaving(lambda: happened.append("graphs"))
    assert group.leave() and happened == ["graphs", "parted"]
    assert not dist.is_initialized()


def test_a_parting_that_does_not_end_ends_the_server(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not waited for, and the other process is gone."""
    stuck, destroy, ended = threading.Event(), dist.destroy_process_group, list[int]()
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (stuck.wait(60), destroy()))
    monkeypatch.setattr(tensor_parallel, "_STOP_TIMEOUT", 0.2)
    monkeypatch.setattr(os, "_exit", ended.append)
    with ranks(options(tiny, tp=2), CPU, oracle_runner):
        (other,) = (child for child in multiprocessing.active_children() if child.name == "rank 1")
    other.join(10)
    assert not other.is_alive() and ended == [1]
    assert "error: the processes of --tp did not part in time" in capsys.readouterr().err
    stuck.set()
    wait_until(lambda: not dist.is_initialized(), 10)
