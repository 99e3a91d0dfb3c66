"""Which device and which kernels an option means."""

from __future__ import annotations

import os

import pytest
import torch

from serving.execution import choose_execution
from tilus.errors import TilusError
from tilus.runtime import execute

CHOICES = [
    # --device, TILUS_DEVICE, a GPU is there; device, way with native code, TILUS_DEVICE afterwards
    ("auto", None, False, "cpu", "cpu", None),
    ("auto", None, True, "cuda", "cuda", None),
    ("auto", "auto", True, "cuda", "cuda", "auto"),
    ("auto", "reference", True, "cpu", "reference", "reference"),
    ("auto", "emulator", False, "cpu", "emulator", "emulator"),
    ("auto", "cuda", True, "cuda", "cuda", "cuda"),
    ("auto", "cpu", True, "cpu", "cpu", "cpu"),
    ("cpu", None, True, "cpu", "cpu", "auto"),
    ("cpu", "reference", False, "cpu", "cpu", "auto"),
    ("cuda", "reference", True, "cuda", "cuda", "cuda"),
    ("reference", None, True, "cpu", "reference", "reference"),
    ("reference", "cuda", False, "cpu", "reference", "reference"),
]


def choose(monkeypatch: pytest.MonkeyPatch, choice: str, variable: str | None, gpu: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("TILUS_DEVICE", "auto")  # so that what the choice sets is undone
    if variable is None:
        monkeypatch.delenv("TILUS_DEVICE")
    else:
        monkeypatch.setenv("TILUS_DEVICE", variable)
    return choose_execution(choice)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("choice", "variable", "gpu", "device", "way", "afterwards"), CHOICES)
def test_choices(
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    choice: str,
    variable: str | None,
    gpu: bool,
    device: str,
    way: str,
    afterwards: str | None,
) -> None:
    """Without a compiler, native code is taken only where it is named: there, the first kernel says what is missing."""
    monkeypatch.setattr(execute, "_cpu_or_reference", lambda: "cpu" if native else "reference")
    found = choose(monkeypatch, choice, variable, gpu)
    is_named = (choice, variable) == ("auto", "cpu")
    expected = "reference" if way == "cpu" and not native and not is_named else way
    assert (found.device.type, found.way) == (device, expected)
    assert found.is_compiled == (expected in ("cpu", "cuda"))
    assert os.environ.get("TILUS_DEVICE") == afterwards


@pytest.mark.parametrize(
    ("choice", "variable", "asked"), [("cuda", None, "--device cuda"), ("auto", "cuda", "TILUS_DEVICE=cuda")]
)
def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch, choice: str, variable: str | None, asked: str) -> None:
    with pytest.raises(TilusError) as caught:
        choose(monkeypatch, choice, variable, gpu=False)
    assert str(caught.value) == (
        f"{asked} was asked for, but torch {torch.__version__} finds no GPU\n"
        "  hint: check nvidia-smi and that torch is a CUDA build, or use --device cpu"
    )
