"""The tiny model, made once for all tests of the server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import CPU, write_tiny
from torch_kernels import TorchKernels

from serving.loader import Checkpoint, open_checkpoint
from serving.model import Model, load_model


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # more of them spin against each other on a busy machine


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_directory: Path) -> Checkpoint:
    return open_checkpoint(tiny_directory)


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Checkpoint) -> Model:
    return load_model(tiny_checkpoint, TorchKernels(), CPU)
