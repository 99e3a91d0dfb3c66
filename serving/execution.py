"""Where the model runs: which of torch's devices holds its tensors, and how the kernels are executed there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, cast

import torch

import tilus
from tilus import config
from tilus.errors import TilusError

Way = Literal["cuda", "cpu", "reference", "emulator"]


@dataclass(frozen=True)
class Execution:
    """device: of all tensors. way: how kernels run: compiled for a GPU or this machine (`cuda`, `cpu`), or interpreted."""

    device: torch.device
    way: Way

    @property
    def is_compiled(self) -> bool:
        """Whether kernels are compiled when they are first called, and fast from then on."""
        return self.way in ("cuda", "cpu")


def choose_execution(choice: str) -> Execution:
    """What `--device` asks for; auto does as TILUS_DEVICE says, and by default takes CUDA where there is a GPU.

    Sets TILUS_DEVICE, which the kernels read, when the choice is another one. Raises: TilusError without a GPU for cuda.
    """
    environment = config.device()
    wanted = environment if choice == "auto" else choice
    if wanted == "cuda" and not torch.cuda.is_available():
        asked = "--device cuda" if choice == "cuda" else "TILUS_DEVICE=cuda"
        raise TilusError(
            f"{asked} was asked for, but torch {torch.__version__} finds no GPU",
            hint="check nvidia-smi and that torch is a CUDA build, or use --device cpu",
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if choice != "auto":
        # For tensors on the CPU, auto is native code where it can be compiled, and the reference where it cannot.
        os.environ["TILUS_DEVICE"] = "auto" if choice == "cpu" else choice
    way = tilus.default_device() if wanted == "cpu" else wanted
    return Execution(torch.device("cuda" if wanted == "cuda" else "cpu"), cast(Way, way))
