"""What kernels ask of the driver at their launch: functions named `in_stub_*` run against a stub driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from libcuda_stub import Stub, failure

import tilus
from tilus import Const, Tensor, config, f32

PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
Run = Callable[..., Any]


def double() -> Any:
    """A new kernel: one that has been launched before is not prepared again."""

    @tilus.kernel
    def kernel(x: Tensor[f32, "n"], *, waits: Const = False):
        tilus.grid(1, warps=1)
        if waits:
            tilus.wait_dependencies()
        tilus.store(x, [0], 2 * tilus.load(x, [0], [32]))

    return kernel


def in_stub_attribute(waits: bool, setting: str | None) -> tuple[int, int]:
    """The id and value of the launch attribute of a kernel (-1: there is none)."""
    stub = Stub()
    stub.expect_parameters(("ptr", "i32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TILUS_DEPENDENT_LAUNCH", raising=False)
        if setting is not None:
            patch.setenv("TILUS_DEPENDENT_LAUNCH", setting)
        double().on("cuda")(np.ones(32, np.float32), waits=waits)
    return stub.last.attribute, stub.last.attribute_value


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("setting", [None, "0", "1"])
def test_kernels_that_wait_may_start_early(in_stub: Run, waits: bool, setting: str | None) -> None:
    attribute, value = in_stub(in_stub_attribute, waits, setting)
    assert (attribute == PROGRAMMATIC) == (waits and setting != "0")
    assert value == (1 if attribute == PROGRAMMATIC else 0)


@pytest.mark.parametrize("value", ["", "yes", "2"])
def test_other_settings_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TILUS_DEPENDENT_LAUNCH", value)
    assert failure(config.dependent_launch) == f"TILUS_DEPENDENT_LAUNCH is {value!r}, expected 0 or 1"
