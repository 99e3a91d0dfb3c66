"""Tests that name a device by TILUS_DEVICE run there, whatever ran before them with the same arguments."""

from __future__ import annotations

import pytest
import torch

from tilus.kernels import silu_mul
from tilus.runtime import execute


def test_kernels_run_where_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[str]()
    for way in ("_reference", "_cpu"):
        real = getattr(execute, way)
        monkeypatch.setattr(execute, way, lambda call, way=way, real=real: (found.append(way), real(call))[1])
    x = torch.randn(2, 64).half()
    for device in ("reference", "cpu", "reference", "reference"):
        monkeypatch.setenv("TILUS_DEVICE", device)
        silu_mul(x)
    assert found == ["_reference", "_cpu", "_reference", "_reference"]
    silu_mul(x)
    assert len(found) == 4
