"""Every kernel test runs on the reference and the emulator; with `-m gpu` the same tests run on a GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(
    params=[
        "reference",
        "cpu",
        pytest.param("emulator", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """The name of an execution. Arguments may stay on the CPU in all of them: `cuda` copies them there and back."""
    return request.param


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)
