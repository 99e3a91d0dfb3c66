"""The CUDA path on a real GPU (pytest -m gpu)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilus.ptx.assembler import assemble
from tilus.runtime import cuda, staging
from tilus.runtime.launch import Launcher, Parameter
from tilus.target import TARGETS

INCREMENT = """.version 8.0
.target sm_80
.address_size 64
.visible .entry increment(.param .u64 x, .param .s32 stride, .param .s32 count)
.reqntid 32, 1, 1
{
    .reg .b16 %h<2>;
    .reg .b32 %r<8>;
    .reg .b64 %d<4>;
    .reg .pred %p<2>;
    ld.param.u64 %d0, [x];
    ld.param.s32 %r0, [stride];
    ld.param.s32 %r1, [count];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ctaid.x;
    mad.lo.s32 %r4, %r3, 32, %r2;
    setp.ge.s32 %p0, %r4, %r1;
    @%p0 ret;
    mul.wide.s32 %d1, %r4, %r0;
    add.s64 %d2, %d0, %d1;
    ld.global.u8 %h0, [%d2];
    add.u16 %h1, %h0, 1;
    st.global.u8 [%d2], %h1;
    ret;
}
"""


def increment_on_gpu() -> Launcher:
    device = cuda.device()
    ptx = INCREMENT.replace("sm_80", device.target.name)
    if device.target.ptx_version > (8, 0):
        ptx = ptx.replace("8.0", "{}.{}".format(*device.target.ptx_version))
    kernel = cuda.load_kernel(assemble(ptx, device.target).cubin, "increment", device)
    kinds: list[tuple[Any, str]] = [("ptr", "x"), ("i32", "stride"), ("i32", "count")]
    return Launcher(kernel, [Parameter(kind, source) for kind, source in kinds], 32)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [np.s_[:], np.s_[3:50:7], np.s_[::-1], np.s_[55:2:-5], np.s_[5:5]])
def test_gpu_runs_numpy_views(index: slice) -> None:
    array = np.arange(60, dtype=np.uint8)
    expected = array.copy()
    expected[index] += 1
    view = array[index]
    with staging.staged([view]) as (address,):
        increment_on_gpu().launch(-(-view.size // 32), 1, 1, address, view.strides[0], view.size)
    assert np.array_equal(array, expected)


@pytest.mark.gpu
def test_gpu_reports_a_bad_access_with_a_hint() -> None:
    code = (
        "import test_cuda_gpu as t; from tilus.runtime import cuda\n"
        "t.increment_on_gpu().launch(1, 1, 1, 8, 1, 32)\n"
        "try: cuda.synchronize()\nexcept Exception as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS" in done.stdout, done.stderr
    assert "device='emulator'" in done.stdout


@pytest.mark.gpu
def test_gpu_launches_are_captured_into_a_graph() -> None:
    """Nothing in a launch is forbidden during capture; the graph then runs it again."""
    increment = increment_on_gpu()
    array = np.zeros(32, np.uint8)
    stream = int(cuda.call("cuStreamCreate", 1))
    with staging.staged([array], stream) as (address,):
        mode = cuda.driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        cuda.call("cuStreamBeginCapture", stream, mode)
        increment.launch_on(stream, 1, 1, 1, address, 1, 32)
        graph = cuda.call("cuStreamEndCapture", stream)
        executable = cuda.call("cuGraphInstantiate", graph, 0)
        for _ in range(3):
            cuda.call("cuGraphLaunch", executable, stream)
    assert array.tolist() == [3] * 32


def test_the_gpu_tests_kernel_assembles() -> None:
    assert assemble(INCREMENT, TARGETS["sm_80"]).kernel("increment").registers > 0
