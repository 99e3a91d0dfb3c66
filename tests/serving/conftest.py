"""The tiny model, made once for all tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from any_token_runner import AnyTokenRunner
from live_server import CONFIG, LiveServer, serve
from tiny_llama import CPU, write_tiny
from torch_kernels import TorchKernels

import tilus.kernels
from serving.loader import Checkpoint, open_checkpoint
from serving.model import Model, load_model
from serving.runner import TorchRunner


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


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run where their arguments are, natively."""
    monkeypatch.delenv("TILUS_DEVICE", raising=False)


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Checkpoint) -> Model:
    """The tiny model on the kernels of tilus."""
    return load_model(tiny_checkpoint, tilus.kernels, CPU)


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Model, tiny_checkpoint: Checkpoint) -> Iterator[LiveServer]:
    """One for all tests that leave it as they found it."""
    runner = TorchRunner(tiny_model, CONFIG.num_pages, CONFIG.page_size, CPU)
    with serve(runner, tiny_checkpoint, CONFIG) as live:
        yield live


@pytest.fixture(scope="session")
def any_token_server(tiny_checkpoint: Checkpoint) -> Iterator[LiveServer]:
    """The same without a model: answers are a function of the prompt, and cost nothing."""
    runner = AnyTokenRunner(CONFIG.page_size, tiny_checkpoint.tokenizer.vocab_size)
    with serve(runner, tiny_checkpoint, CONFIG) as live:
        yield live
