"""The real launch path against a stub driver: functions named `in_stub_*` run in a process that loads the stub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from libcuda_stub import CUBIN, Stub, failure
from python_calls import MOST_CALLS, calls_of

from tilus.runtime import cuda
from tilus.runtime.launch import Launcher, Parameter

KINDS = ("ptr", "i32", "f32", "i64")
Run = Callable[..., Any]


def argument() -> st.SearchStrategy[tuple[str, int | float]]:
    return st.one_of(
        st.tuples(st.just("ptr"), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("i32"), st.integers(-(2**31), 2**31 - 1)),
        st.tuples(st.just("i64"), st.integers(-(2**63), 2**63 - 1)),
        st.tuples(st.just("f32"), st.floats(width=32)),
    )


def bits(kind: str, value: int | float) -> int:
    """What a parameter of that kind holds, from numpy rather than struct."""
    dtype = {"ptr": np.uint64, "i32": np.int32, "i64": np.int64, "f32": np.float32}[kind]
    return int.from_bytes(np.asarray(value, dtype).tobytes(), "little")


def in_stub_arguments(case: list[tuple[str, int | float]]) -> list[int]:
    stub = Stub()
    kinds, values = [kind for kind, _ in case], [value for _, value in case]
    stub.launcher(kinds).launch(1, 1, 1, *values)
    return list(stub.last.args[: len(case)])


@settings(max_examples=200)
@given(case=st.lists(argument(), max_size=16))
def test_arguments_arrive_bit_exact(in_stub: Run, case: list[tuple[str, int | float]]) -> None:
    assert in_stub(in_stub_arguments, case) == [bits(kind, value) for kind, value in case]


def in_stub_relaunch() -> None:
    """One launcher, several launches: nothing of an earlier one stays behind."""
    stub = Stub()
    launch = stub.launcher(KINDS).launch
    for n in range(5):
        launch(n + 1, n + 2, n + 3, n, -n, n / 2, -n)
        last = stub.last
        assert list(last.grid) == [n + 1, n + 2, n + 3]
        assert list(last.args[:4]) == [bits("ptr", n), bits("i32", -n), bits("f32", n / 2), bits("i64", -n)]


def test_a_launcher_is_reusable(in_stub: Run) -> None:
    in_stub(in_stub_relaunch)


def in_stub_threads() -> list[bool]:
    """Several threads launch through one launcher while the stub lingers before it reads the arguments."""
    stub = Stub()
    shared = stub.launcher(KINDS)
    stub.set("stub_delay_us", 300)
    correct = [False] * 4

    def work(number: int) -> None:
        right = True
        for n in range(20):
            shared.launch_on(number + 1, number + 1, 1, 1, number, n, number, n)
            own = stub.own
            expected = [number, n, bits("f32", number), n]
            right &= list(own.args[:4]) == expected and (own.stream, own.grid[0]) == (number + 1, number + 1)
        correct[number] = right

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return correct


def test_threads_do_not_share_arguments(in_stub: Run) -> None:
    assert in_stub(in_stub_threads) == [True] * 4


def in_stub_configuration() -> None:
    stub = Stub()
    plain = stub.launcher((), shared=200 * 1024)
    assert stub.counter("stub_shared_limit") == 200 * 1024
    plain.launch_on(0x57, 2**31 - 1, 65535, 65535)
    last = stub.last
    assert (last.function, last.stream, last.shared) == (0xF0, 0x57, 200 * 1024)
    assert list(last.grid) == [2**31 - 1, 65535, 65535] and list(last.block) == [128, 1, 1]
    assert last.attribute == -1
    stub.launcher((), programmatic=True).launch(1, 1, 1)
    assert (stub.last.attribute, stub.last.attribute_value) == (6, 1)  # programmatic stream serialization


def test_grid_block_shared_memory_stream_and_attributes(in_stub: Run) -> None:
    in_stub(in_stub_configuration)


def in_stub_empty_grids() -> None:
    stub = Stub()
    empty = stub.launcher(())
    before = stub.last.count
    for grid in [(0, 1, 1), (1, 0, 1), (1, 1, 0)]:
        empty.launch(*grid)
    assert stub.last.count == before


def test_an_empty_grid_launches_nothing(in_stub: Run) -> None:
    in_stub(in_stub_empty_grids)


def in_stub_current_stream() -> None:
    stub = Stub()
    launch = stub.launcher(()).launch
    launch(1, 1, 1)
    assert stub.last.stream == 0
    torch: Any = ModuleType("torch")
    sys.modules["torch"] = torch
    try:
        launch(1, 1, 1)  # torch is half-way through its import
        assert stub.last.stream == 0
        streams = iter([0x5A, 0x5B])
        torch.version = SimpleNamespace(cuda="13.0")
        torch._C = SimpleNamespace(_cuda_getCurrentRawStream=lambda index: next(streams) + index)
        torch.cuda = SimpleNamespace(current_stream=lambda index: SimpleNamespace(cuda_stream=0x77 + index))
        launch(1, 1, 1)
        assert stub.last.stream == 0x5A
        launch(1, 1, 1)
        assert stub.last.stream == 0x5B  # asked at every launch
        cuda._stream_of_torch = None
        torch._C = SimpleNamespace()
        launch(1, 1, 1)
        assert stub.last.stream == 0x77  # through the public function
        cuda._stream_of_torch = None
        torch.version.cuda = None
        launch(1, 1, 1)
        assert stub.last.stream == 0
    finally:
        del sys.modules["torch"]
        cuda._stream_of_torch = None


def test_launches_go_into_torchs_current_stream(in_stub: Run) -> None:
    in_stub(in_stub_current_stream)


def in_stub_two_devices() -> None:
    stub = Stub()
    stub.set("stub_devices", 2)
    first, second = cuda.device(0), cuda.device(1)
    stub.expect_parameters(())
    on_second = Launcher(cuda.load_kernel(CUBIN, "k", second), (), 32)
    first.make_current()
    on_second.launch_on(0, 1, 1, 1)
    assert stub.last.context == second.context
    assert cuda.current_device() is first  # the caller's choice is left alone
    cuda.load_kernel(CUBIN, "k", second)
    assert cuda.current_device() is first
    switches = stub.counter("stub_context_switches")
    on_second.launch_on(0x99, 1, 1, 1)  # a stream knows its context
    assert stub.counter("stub_context_switches") == switches


def test_the_default_stream_is_that_of_the_kernels_device(in_stub: Run) -> None:
    in_stub(in_stub_two_devices)


def in_stub_nothing_hidden() -> None:
    """A cached launch neither allocates nor synchronises nor touches the context."""
    stub = Stub()
    launch = stub.launcher(KINDS).launch
    names = ("stub_live_allocations", "stub_syncs", "stub_context_switches", "stub_waits")
    before = [stub.counter(name) for name in names]
    for _ in range(10):
        launch(1, 1, 1, 1, 2, 3.0, 4)
    assert [stub.counter(name) for name in names] == before


def test_a_launch_does_nothing_else(in_stub: Run) -> None:
    in_stub(in_stub_nothing_hidden)


def in_stub_calls() -> float:
    launch = Stub().launcher(("ptr", "ptr", "ptr", "i32", "i32", "i64", "f32")).launch
    return calls_of("launch(64, 2, 1, 1, 2, 3, 4, 5, 6, 7.0)", launch=launch)


def test_a_cached_launch_costs_little_python(in_stub: Run) -> None:
    assert in_stub(in_stub_calls) < MOST_CALLS


def in_stub_launch_errors() -> list[str]:
    stub = Stub()
    launch = stub.launcher(KINDS).launch
    good = (1, 2, 3.0, 4)
    before = stub.last.count
    messages = [
        failure(lambda: launch(1, 1, 1, *good[:3])),
        failure(lambda: launch(1, 1, 1, *good, 5)),
        failure(lambda: launch(1, 1, 1, -1, 2, 3.0, 4)),
        failure(lambda: launch(1, 1, 1, 1, 2**31, 3.0, 4)),
        failure(lambda: launch(1, 1, 1, 1, 2.5, 3.0, 4)),
        failure(lambda: launch(1, 1, 1, 1, 2, 1e39, 4)),
        failure(lambda: launch(1, 1, 1, 1, 2, 3.0, None)),
        failure(lambda: launch(-1, 1, 1, *good)),
        failure(lambda: launch(2**31, 1, 1, *good)),
        failure(lambda: launch(2**40, 1, 1, *good)),
    ]
    assert stub.last.count == before + 1  # only the grid of 2^31 reaches the driver, which refuses it on a real GPU
    return messages


def test_a_bad_argument_is_named_with_what_was_expected(in_stub: Run) -> None:
    count, more, negative, big, fraction, overflow, none, minus, _, huge = in_stub(in_stub_launch_errors)
    assert count == "kernel 'k' got 3 arguments, expected 4"
    assert more == "kernel 'k' got 5 arguments, expected 4"
    assert negative == "argument arg0 of kernel 'k' is -1, expected a value of ptr"
    assert big == "argument arg1 of kernel 'k' is 2147483648, expected a value of i32"
    assert fraction == "argument arg1 of kernel 'k' is 2.5, expected a value of i32"
    assert overflow == "argument arg2 of kernel 'k' is 1e+39, expected a value of f32"
    assert none == "argument arg3 of kernel 'k' is None, expected a value of i64"
    assert minus == "grid of kernel 'k' is -1 in x, expected 0 to 2147483647"
    assert huge == "grid of kernel 'k' is 1099511627776 in x, expected 0 to 2147483647"


def in_stub_driver_errors() -> list[str]:
    stub = Stub()
    some = stub.launcher((), shared=1024)
    messages: list[str] = []

    def failing(function: str, code: int, action: Callable[[], object]) -> None:
        stub.fail(function, code)
        messages.append(failure(action))

    failing("cuLaunchKernelEx", 1, lambda: some.launch(7, 1, 1))
    failing("cuMemAlloc_v2", 2, lambda: cuda.call("cuMemAlloc", 16))
    failing("cuStreamSynchronize", 700, cuda.synchronize)
    messages.append(failure(lambda: cuda.call("cuMemHostAlloc", 16, 0)))  # this driver has no such function
    messages.append(failure(lambda: cuda.load_kernel(CUBIN, "missing", cuda.device(0))))
    messages.append(failure(lambda: cuda.load_kernel(b"text", "k", cuda.device(0))))
    messages.append(failure(lambda: cuda.load_kernel(CUBIN, "k", cuda.device(0), 232449)))
    messages.append(failure(lambda: cuda.device(7)))
    stub.expect_parameters(("ptr", "i32"))
    kernel = cuda.load_kernel(CUBIN, "k", cuda.device(0))
    messages.append(failure(lambda: Launcher(kernel, [Parameter("ptr", "x"), Parameter("i64", "n")], 32)))
    return messages


def test_driver_errors_name_the_call_the_error_and_a_way_out(in_stub: Run) -> None:
    launch, memory, illegal, absent, missing, image, shared, device, parameters = in_stub(in_stub_driver_errors)
    assert "cannot launch kernel 'k' with grid (7, 1, 1), 128 threads a block and 1024 bytes" in launch
    assert "cuLaunchKernelEx failed with CUDA_ERROR_INVALID_VALUE (1): the stub's description" in launch
    assert "cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY (2)" in memory and "hint: free device memory" in memory
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in illegal and "device='emulator'" in illegal
    assert "cuMemHostAlloc is missing in this CUDA driver" in absent and "update the NVIDIA driver" in absent
    assert "cuLibraryGetKernel failed with" in missing and "(500)" in missing
    assert "cuLibraryLoadData failed with CUDA_ERROR_INVALID_IMAGE (200)" in image
    assert "needs 232449 bytes of dynamic shared memory, Stub GPU has 232448 a block" in shared
    assert "no CUDA device 7: this machine has 1" in device
    assert "do not match its cubin: sizes [8, 8] in bytes, expected [8, 4]" in parameters


def run_python(code: str, library_path: Path) -> str:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_missing_driver_is_explained(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("not a library")  # hides a real driver, should there be one
    code = (
        "from tilus.runtime import cuda\nassert not cuda.is_available()\n"
        "try: cuda.device()\nexcept Exception as e: print(type(e).__name__, e)"
    )
    out = run_python(code, tmp_path)
    assert out.startswith("TilusError no CUDA driver found (libcuda.so.1)")
    assert "tilus doctor" in out and "device='cpu'" in out


def test_importing_the_runtime_loads_neither_driver_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys, tilus.runtime.launch, tilus.runtime.cuda, tilus.runtime.staging, tilus.runtime.cache\n"
        "print([m for m in ('torch', 'cuda.bindings', 'cuda.bindings.driver') if m in sys.modules])"
    )
    assert run_python(code, tmp_path) == "[]\n"


def in_stub_device() -> None:
    stub = Stub()
    assert cuda.is_available()
    device = cuda.device()
    assert (device.name, device.capability, device.target.name) == ("Stub GPU", (9, 0), "sm_90a")
    assert (device.num_sms, device.max_shared_nbytes) == (132, 232448)
    assert cuda.driver_version() == (13, 0)
    device.make_current()
    switches = stub.counter("stub_context_switches")
    device.make_current()
    assert stub.counter("stub_context_switches") == switches  # it was already
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(cuda.current_device().index))  # has no context yet
    thread.start()
    thread.join()
    assert seen == [0]


def test_device_facts_and_contexts(in_stub: Run) -> None:
    in_stub(in_stub_device)


def in_stub_events() -> None:
    stub = Stub()
    launch = stub.launcher(()).launch
    times = cuda.measure_ms(lambda: [launch(1, 1, 1) for _ in range(3)], repeats=4)
    assert times == [3.0] * 4  # the stub's clock counts launches
    waits = stub.counter("stub_waits")
    cuda.order_after(1, 1)
    assert stub.counter("stub_waits") == waits
    cuda.order_after(1, 2)
    assert stub.counter("stub_waits") == waits + 1


def test_events(in_stub: Run) -> None:
    in_stub(in_stub_events)


def test_the_benchmark_writes_what_its_docstring_says(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks" / "launch.py"), "--stub", "--samples", "3"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([*command, "--out", str(tmp_path / "out.json")], env=environment, check=True)
    result = json.loads((tmp_path / "out.json").read_text())
    keys = {"device", "stub", "python", "cuda_bindings", "processor", "batch", "samples", "cases"}
    assert set(result) == keys and (result["device"], result["stub"]) == ("stub", True)
    assert all(0 < case["min_us"] <= case["median_us"] for case in result["cases"])
    assert {"matmul, launch", "matmul, unprepared"} <= {case["name"] for case in result["cases"]}
