"""`--weight-dtype fp16`: weights stay what they are, rounded to float16 once, in whole models and in their parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import CPU, tiny_tensors, write_tiny

import tilus.kernels
from serving.dummy import open_dummy
from serving.loader import open_checkpoint
from serving.memory import expected_size, size_of
from serving.packing import pack_weights, stack_alike
from serving.quantize import weight_type
from serving.shards import Share, shard
from tilus.errors import TilusError
from tilus.kernels import DenseWeight
from tilus.kernels.quantize import DenseMatrix, QuantizedMatrix, quantize

F16 = weight_type("fp16")
PREFIX = "model.layers.1."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def test_linear_layers_hold_the_models_values(tiny: Path) -> None:
    """Queries, keys and values in one matrix, gates and factors in eights; the output layer is the embedding, always int8."""
    checkpoint, tensors = open_checkpoint(tiny, F16), tiny_tensors()
    packed = pack_weights(checkpoint, tilus.kernels, CPU)
    (qkv,), (down,), (head,) = (packed.linears[name] for name in ("blk.1.attn_qkv", "blk.1.ffn_down", "output"))
    parts = [tensors[f"{PREFIX}self_attn.{name}_proj.weight"].half() for name in "qkv"]
    assert isinstance(qkv, DenseWeight) and torch.equal(qkv.values, torch.cat(parts))
    assert torch.equal(down.values, tensors[f"{PREFIX}mlp.down_proj.weight"].half())
    (gate_up,) = packed.linears["blk.1.ffn_gate_up"]
    gate, up = (tensors[f"{PREFIX}mlp.{name}_proj.weight"].half().split(8) for name in ("gate", "up"))
    assert gate_up.is_gated and torch.equal(
        gate_up.values, torch.cat([rows for pair in zip(gate, up) for rows in pair])
    )
    assert head.dtype == tilus.int8
    assert size_of(packed) == expected_size(checkpoint, tilus.kernels, CPU)


def test_parts_of_several_devices_are_the_matrix(tiny: Path) -> None:
    whole = open_checkpoint(tiny, F16)
    parts = [shard(whole, Share(index, 2)) for index in range(2)]
    for axis, name in ((0, "attn_q"), (1, "attn_output"), (0, "ffn_up"), (1, "ffn_down")):
        found = np.concatenate([part.weights.matrix(f"blk.0.{name}").dequantize() for part in parts], axis)
        np.testing.assert_array_equal(found, whole.weights.matrix(f"blk.0.{name}").dequantize())


def test_only_alike_matrices_are_stacked() -> None:
    def dense(rows: int, columns: int) -> DenseMatrix:
        return DenseMatrix(np.arange(rows * columns, dtype=np.float16).reshape(rows, columns))

    codes = quantize(np.ones((2, 32), np.float32), tilus.int8, 32, search=False, name="w")
    stacked = stack_alike([dense(2, 32), dense(3, 32), codes, codes, dense(1, 32), dense(1, 64)])
    assert [matrix.shape for matrix in stacked] == [(5, 32), (4, 32), (1, 32), (1, 64)]
    assert [isinstance(matrix, QuantizedMatrix) for matrix in stacked] == [False, True, False, False]
    np.testing.assert_array_equal(stacked[0].dequantize()[2:], dense(3, 32).dequantize())
    np.testing.assert_array_equal(dense(3, 32).take_rows(np.array([2, 0])).values, dense(3, 32).values[[2, 0]])


def test_values_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_tiny(tmp_path / "large")
    tensors = load_file(path / "model.safetensors")
    tensors[f"{PREFIX}mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(TilusError, match=r"needs a value or scale of 1e\+06, but float16 holds at most 65504"):
        open_checkpoint(path, F16).weights.matrix("blk.1.ffn_up")


def test_random_models_may_be_dense(tiny: Path) -> None:
    matrix = open_dummy(tiny, F16).weights.matrix("blk.0.ffn_down")
    assert isinstance(matrix, DenseMatrix) and matrix.shape == (96, 160)
    assert matrix.dequantize().std() * 160**0.5 == pytest.approx(1, abs=0.05)
