"""The memory that is announced is the memory that is taken; what does not fit is refused with numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_serving_loader import write_gguf
from tiny_llama import CPU, tiny_tensors, write_tiny
from torch_kernels import TorchKernels

import tilus.kernels
from serving.config import ServerConfig
from serving.host_memory import available_nbytes
from serving.loader import Checkpoint, default_model, open_checkpoint
from serving.memory import MemoryPlan, ModelSize, activation_nbytes, expected_size, plan, size_of
from serving.model import load_model
from serving.offline.quantize_model import quantize_model
from serving.packing import pack_weights
from serving.quantize import WEIGHT_DTYPES
from serving.runner import TorchRunner
from tilus.dtypes import dtype
from tilus.errors import TilusError
from tilus.kernels.quantize import recipe

MIB = 2**20
GPU = torch.device("cuda")


def assert_exact(checkpoint: Checkpoint, kernels: object = tilus.kernels) -> None:
    assert expected_size(checkpoint, kernels, CPU) == size_of(pack_weights(checkpoint, kernels, CPU))


@pytest.mark.parametrize("name", WEIGHT_DTYPES)
def test_directories(tiny_directory: Path, name: str) -> None:
    assert_exact(open_checkpoint(tiny_directory, dtype(name)))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "F32", "BF16"])
def test_gguf_files(tmp_path: Path, kind: str) -> None:
    assert_exact(open_checkpoint(write_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType[kind])))


@pytest.mark.slow
def test_a_file_of_several_kinds() -> None:
    assert_exact(open_checkpoint(default_model()))


def test_an_untied_head_counts(tmp_path: Path, tiny_checkpoint: Checkpoint) -> None:
    directory = write_tiny(tmp_path / "untied", tie_word_embeddings=False)
    tensors = tiny_tensors()
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}, directory / "model.safetensors")
    assert_exact(open_checkpoint(directory))


def test_other_kernels_have_other_sizes(tiny_checkpoint: Checkpoint) -> None:
    assert_exact(tiny_checkpoint, TorchKernels())


def test_stored_quantised_weights_count_as_they_are_stored(tiny_directory: Path, tmp_path: Path) -> None:
    """Nothing is read; padding to whole tiles is all that is missing."""
    directory = tmp_path / "quantised"
    quantize_model(tiny_directory, directory, recipe("uint4", group=32))
    checkpoint = open_checkpoint(directory)
    expected, real = (
        expected_size(checkpoint, tilus.kernels, CPU),
        size_of(pack_weights(checkpoint, tilus.kernels, CPU)),
    )
    assert expected.embedding == real.embedding
    assert 0.5 * real.weights < expected.weights <= real.weights


def test_the_size_is_what_the_model_holds(tiny_checkpoint: Checkpoint) -> None:
    model = load_model(tiny_checkpoint, tilus.kernels, CPU)
    linears = [
        part
        for x in model.layers
        for f in (x.qkv, x.attn_output, x.feed_forward.gate_up, x.feed_forward.down)
        for part in f.parts
    ]
    weights = sum(part.nbytes for part in [*linears, model.head]) + model.norm.nbytes + model.layers[0].cos_sin.nbytes
    weights += sum(layer.attn_norm.weight.nbytes + layer.ffn_norm.weight.nbytes for layer in model.layers)
    embedding = model.embedding.table.nbytes + model.embedding.scales.nbytes
    assert expected_size(tiny_checkpoint, tilus.kernels, CPU) == ModelSize(weights, embedding)


def test_the_cache_is_what_the_runner_allocates(tiny_checkpoint: Checkpoint) -> None:
    found = plan(tiny_checkpoint.config, ModelSize(0, 0), ServerConfig(max_batch=4, max_step_tokens=64), 2**30, CPU)
    runner = TorchRunner(load_model(tiny_checkpoint, TorchKernels(), CPU), found.num_pages, 16, CPU)
    memory = runner.kv_pool.memory
    assert memory.nbytes == found.cache
    assert memory.data_ptr() % 4096 == 0
    assert not memory.any()


amounts = st.integers(0, 4 * 2**30)
wishes = st.builds(
    ServerConfig,
    max_batch=st.integers(1, 4096),
    max_step_tokens=st.integers(1, 8192),
    max_model_len=st.none() | st.integers(1, 256),
    num_pages=st.none() | st.integers(1, 10**6),
)


@given(amounts, amounts, amounts, wishes, st.sampled_from([CPU, GPU]))
def test_a_plan_fits_or_is_refused(
    tiny_checkpoint: Checkpoint,
    weights: int,
    embedding: int,
    available: int,
    wishes: ServerConfig,
    device: torch.device,
) -> None:
    config, size = tiny_checkpoint.config, ModelSize(weights, embedding)
    least = wishes.num_pages or -(-(wishes.max_model_len or 256) // 16)
    page = 16 * config.kv_values_per_token * 2
    activations = activation_nbytes(config, wishes.max_step_tokens, wishes.max_batch, device)
    left = available - weights - embedding - activations
    if left < least * page:
        with pytest.raises(TilusError, match="MiB are available"):
            plan(config, size, wishes, available, device)
        return
    found = plan(config, size, wishes, available, device)
    assert found.total <= available
    if wishes.num_pages:
        assert found.num_pages == wishes.num_pages
        return
    assert least <= found.num_pages <= wishes.max_batch * least
    if found.num_pages > least:
        assert found.cache <= (left * 0.9 if device == GPU else min(2**30, left / 2))


def test_the_table_and_the_refusal() -> None:
    config = open_checkpoint(default_model()).config
    size = ModelSize(100 * MIB, 30 * MIB)
    found = plan(config, size, ServerConfig(max_batch=1), 1000 * MIB, CPU)
    assert found == MemoryPlan(size, activation_nbytes(config, 512, 1, CPU), 512, 368640, 1000 * MIB)
    assert found.table() == (
        "memory in MiB\n"
        "  weights              100.0  packed\n"
        "  embedding             30.0\n"
        "  key-value cache      180.0  512 pages of 16 tokens, 368640 bytes each\n"
        f"  activations     {found.activations / MIB:10.1f}  at most, about\n"
        f"  total           {found.total / MIB:10.1f}  of 1000.0 available"
    )
    with pytest.raises(TilusError) as caught:
        plan(config, size, ServerConfig(max_batch=1, num_pages=4000), 1000 * MIB, CPU)
    assert str(caught.value).startswith(
        "the model needs 1548 MiB, but 1000 MiB are available\nmemory in MiB\n  weights"
    )
    assert str(caught.value).endswith(
        "\n  hint: take fewer bits with --weight-dtype (weights that are stored as floats) and --kv-dtype, a smaller cache "
        "with --num-pages or --max-model-len, smaller steps with --max-step-tokens and --max-batch, or end other programs"
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:  8000 kB\nCached: 5 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/user/session\n",
    "sys/fs/cgroup/user/session/memory.max": "max\n",
    "sys/fs/cgroup/user/session/memory.current": "1024\n",
    "sys/fs/cgroup/user/memory.max": "4096000\n",
    "sys/fs/cgroup/user/memory.current": "3000000\n",
    "sys/fs/cgroup/user/memory.stat": "anon 1\ninactive_file 500000\nactive_file 4\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n0::/\n",
    "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "2048000\n",
    "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "2000000\n",
    "sys/fs/cgroup/memory/a/memory.stat": "inactive_file 7\ntotal_inactive_file 1000\ntotal_active_file 24\n",
}
HUGE = {name: text.replace("2048000", str(2**63 - 4096)) for name, text in V1.items()}
USED_UP = {name: text.replace("2000000", "3000000") for name, text in V1.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 * 1024),
        (V2, 4096000 - 3000000 + 500004),
        (V1, 2048000 - 2000000 + 1024),
        (HUGE, 8000 * 1024),
        (USED_UP, 0),
    ],
    ids=["machine", "version 2", "version 1", "no limit", "used up"],
)
def test_the_least_of_machine_and_groups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_nbytes(write(tmp_path, MEMINFO | files)) == expected


def test_this_machine_has_memory() -> None:
    assert 2**20 < available_nbytes() < 2**50
