"""Host time of one cached kernel launch: `python benchmarks/launch.py [--out FILE]`.

With a GPU the launches are real ones of an empty kernel; without one (or with --stub) they go to a stub libcuda.so.1,
which leaves the Python part alone, and the result says so. Batches are short enough never to fill the launch queue, and
the device is synchronised between them, outside of the timing.

Output, as JSON:
    device       name of the GPU, or "stub"
    stub         true when no real driver was involved: the times are Python's share only
    python, cuda_bindings, processor    versions and host
    batch        launches a sample
    samples      samples a case
    cases        list of {name, arguments, min_us, median_us}: microseconds a launch

Where torch has a GPU, two more cases time a whole call `axpy(x, y, 2.0)` of a cached kernel with torch tensors: as it is, and
with the driver's launch function replaced by one that returns at once, which leaves the Python time of the call.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tilus
from tilus.errors import TilusError
from tilus.ptx.assembler import assemble
from tilus.runtime import cuda
from tilus.runtime.launch import Launcher, Parameter, ParameterKind

sys.path.append(str(Path(__file__).parents[1] / "tests" / "runtime"))
from libcuda_stub import CUBIN, Stub, build

BATCH = 200
PTX_TYPES: dict[ParameterKind, str] = {"ptr": "u64", "i32": "s32", "i64": "s64", "f32": "f32"}
CASES: dict[str, tuple[ParameterKind, ...]] = {
    "no arguments": (),
    "axpy": ("ptr", "ptr", "f32", "i32"),
    "matmul": ("ptr", "ptr", "ptr", "i32", "i32", "i32", "i64"),
    "sixteen arguments": ("ptr", "i32") * 8,
}


def new_launcher(kinds: Sequence[ParameterKind], stub: Stub | None) -> Launcher:
    device = cuda.device()
    if stub is not None:
        stub.expect_parameters(kinds)
        machine_code = CUBIN
    else:
        major, minor = max(device.target.ptx_version, (8, 0))
        params = ", ".join(f".param .{PTX_TYPES[kind]} p{i}" for i, kind in enumerate(kinds))
        head = f".version {major}.{minor}\n.target {device.target.name}\n.address_size 64\n"
        machine_code = assemble(f"{head}.visible .entry empty({params})\n{{\nret;\n}}\n", device.target).cubin
    kernel = cuda.load_kernel(machine_code, "empty", device)
    return Launcher(kernel, [Parameter(kind, f"p{i}") for i, kind in enumerate(kinds)], 128)


def sample(action: Callable[..., object], arguments: Sequence[Any], samples: int) -> dict[str, float]:
    """Microseconds a call, over batches."""
    times: list[float] = []
    for _ in range(samples):
        start = time.perf_counter_ns()
        for _ in range(BATCH):
            action(*arguments)
        times.append((time.perf_counter_ns() - start) / BATCH / 1e3)
        cuda.synchronize()
    return {"min_us": round(min(times), 3), "median_us": round(statistics.median(times), 3)}


def unprepared_launch(launcher: Launcher) -> Callable[..., None]:
    """What a launcher without prepacked arguments would do: hand values and ctypes types to the bindings each time."""
    types = {"ptr": ctypes.c_void_p, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "f32": ctypes.c_float}
    kinds = tuple(types[parameter.kind] for parameter in launcher.parameters)
    function = cuda.driver().CUfunction(launcher.kernel.handle)

    def launch(grid_x: int, grid_y: int, grid_z: int, *values: int | float) -> None:
        cuda.call("cuLaunchKernel", function, grid_x, grid_y, grid_z, 128, 1, 1, 0, 0, (values, kinds), 0)

    return launch


def measure(stub: Stub | None, samples: int) -> dict[str, Any]:
    cases: list[dict[str, Any]] = []
    for name, kinds in CASES.items():
        launcher = new_launcher(kinds, stub)
        arguments = (1, 1, 1, *(0.5 if kind == "f32" else 4096 for kind in kinds))
        ways = {"launch": launcher.launch, "unprepared": unprepared_launch(launcher)}
        for way, action in ways.items():
            times = sample(action, arguments, samples)
            cases.append({"name": f"{name}, {way}", "arguments": len(kinds), **times})
    if stub is None:
        cases += measure_calls(samples)
    cases.append({"name": "current stream", "arguments": 0, **sample(cuda.current_stream, (0,), samples)})
    return {
        "device": "stub" if stub else cuda.device().name,
        "stub": stub is not None,
        "python": platform.python_version(),
        "cuda_bindings": importlib.metadata.version("cuda-bindings"),
        "processor": platform.processor() or platform.machine(),
        "batch": BATCH,
        "samples": samples,
        "cases": cases,
    }


@tilus.kernel
def axpy(x: tilus.Tensor[tilus.f32, "n"], y: tilus.Tensor[tilus.f32, "n"], a: tilus.f32, *, block: tilus.Const = 1024):
    tilus.grid(tilus.cdiv(x.shape[0], block), warps=4)
    start = tilus.block_id(0) * block
    tilus.store(y, [start], a * tilus.load(x, [start], shape=[block]) + tilus.load(y, [start], shape=[block]))


def measure_calls(samples: int) -> list[dict[str, Any]]:
    """Whole calls with torch tensors on the GPU, with and without the driver's share; none without such tensors."""
    try:
        import torch
    except ModuleNotFoundError:
        return []
    if not torch.cuda.is_available():
        return []
    x, y = torch.ones(4096, device="cuda"), torch.ones(4096, device="cuda")
    real = sample(axpy, (x, y, 2.0), samples)
    bindings = cuda.driver()
    launch, success = bindings.cuLaunchKernelEx, bindings.CUresult.CUDA_SUCCESS
    bindings.cuLaunchKernelEx = lambda config, function, arguments, extra: (success,)
    try:
        python = sample(tilus.kernel(axpy.python), (x, y, 2.0), samples)
    finally:
        bindings.cuLaunchKernelEx = launch
    return [
        {"name": "axpy, whole call", "arguments": 4, **real},
        {"name": "axpy, whole call without the driver", "arguments": 4, **python},
    ]


def restart_with_stub() -> None:
    """Start this program again in a process that finds the stub instead of a driver."""
    with tempfile.TemporaryDirectory(prefix="tilus-stub-") as directory:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(build(Path(directory))), "TILUS_LAUNCH_STUB": "1"}
        command = [sys.executable, *sys.argv]
        sys.exit(os.spawnve(os.P_WAIT, sys.executable, command, environment))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to the terminal")
    parser.add_argument("--stub", action="store_true", help="use the stub driver although there may be a GPU")
    parser.add_argument("--samples", type=int, default=200, help="batches a case (default 200)")
    options = parser.parse_args()
    inside_stub = "TILUS_LAUNCH_STUB" in os.environ
    if not inside_stub:
        try:
            cuda.device()
        except TilusError:
            restart_with_stub()
        if options.stub:
            restart_with_stub()
    text = json.dumps(measure(Stub() if inside_stub else None, options.samples), indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
