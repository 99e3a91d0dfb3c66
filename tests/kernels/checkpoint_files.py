"""Writing checkpoints for tests as their formats' own packers do, one code after the other, from published descriptions.

Nothing of `tilus` is used: files are written by the `safetensors` package, bits are placed with Python's integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file


def write(directory: Path, tensors: Mapping[str, Any], settings: Mapping[str, Any] | None) -> Path:
    """A directory with one file of weights; numpy arrays become tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {} if settings is None else {"quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(config))
    as_torch = {name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}
    save_file(as_torch, directory / "model.safetensors", {"format": "pt"})
    return directory


def words(codes: np.ndarray, nbits: int) -> np.ndarray:
    """int32 [rows, ceil(count * nbits / 32)]: each row of codes as one long integer, the first code in its lowest bits."""
    count = -(-codes.shape[1] * nbits // 32)
    rows: list[np.ndarray] = []
    for row in codes.tolist():
        number = sum(int(code) << (nbits * place) for place, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * count, "little"), "<i4"))
    return np.stack(rows)


def gptq_tensors(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray | None, nbits: int, version: int
) -> dict[str, np.ndarray]:
    """AutoGPTQ's tensors of a module. codes [N, K], zeros and scales [N, G], groups [K]."""
    stored = (zeros - (version == 1)) % (1 << nbits)
    found = {
        "qweight": np.ascontiguousarray(words(codes, nbits).T),
        "qzeros": words(np.ascontiguousarray(stored.T), nbits),
        "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
    }
    return found if groups is None else found | {"g_idx": groups.astype(np.int32)}


def awq_tensors(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """AutoAWQ's tensors of a module (gemm): nibble i of a word is column order[i] of its eight."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(values: np.ndarray) -> np.ndarray:
        eights = values.reshape(values.shape[0], -1, 8).astype(np.int64)
        packed = sum(eights[..., column] << (4 * nibble) for nibble, column in enumerate(order))
        return np.asarray(packed).astype(np.uint32).view(np.int32)

    return {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales.T.astype(np.float16)}


def random_module(n: int, k: int, group: int, nbits: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes uint8 [N, K], zeros [N, G] from 1 up (version 1 of GPTQ cannot store 0 unambiguously), scales float16 [N, G]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << nbits, (n, k), np.uint8)
    zeros = rng.integers(1, 1 << nbits, (n, k // group))
    return codes, zeros, (rng.uniform(0.5, 2, (n, k // group)) / 100).astype(np.float16)


def decoded(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """float64 [N, K]: scale * (code - zero), each column with its group's."""
    return scales.astype(np.float64)[:, groups] * (codes.astype(np.float64) - zeros[:, groups])
