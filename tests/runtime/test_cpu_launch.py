"""The device `cpu`: when it is taken, and that a call's values arrive in its kernel. The C texts are written by hand."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_programs import kernel, python
from hypothesis import given
from hypothesis import strategies as st

import tilus
from tilus.errors import TilusError
from tilus.ir.expr import Var
from tilus.ir.function import Function, TensorParam
from tilus.runtime import binaries, execute
from tilus.runtime.cpu import features, pool, toolchain
from tilus.runtime.launch_times import recording
from tilus.target import CpuTarget


@tilus.kernel
def scaled(x: tilus.Tensor[tilus.f32, "n"], y: tilus.Tensor[tilus.f32, "n"], a: tilus.f32, rows: tilus.int32):
    tilus.grid(tilus.cdiv(x.shape[0], 64), rows, warps=1)
    i = tilus.block_id(0) * 64
    tilus.store(y, [i], a * tilus.load(x, [i], shape=[64]))


def scaled_source(function: Function) -> str:
    """What the code generator would make of `scaled`; an extent of 1 is no parameter."""
    slots = [var.name for var in function.kernel_params()]
    (n,) = (param.tensor.shape[0] for param in function.params[:1] if isinstance(param, TensorParam))
    extent = f"(int64_t)args[{function.kernel_params().index(n)}]" if isinstance(n, Var) else str(n)
    return kernel(
        f"if (block >= grid[0]) continue; double a; memcpy(&a, &args[{slots.index('a')}], 8); const int64_t n = {extent};"
        "const float *x = (const float *)args[0]; float *y = (float *)args[1];"
        "for (int64_t i = 64 * block; i < n && i < 64 * block + 64; i++) y[i] = (float)a * x[i];",
        "#include <string.h>",
    )


@tilus.kernel
def fixed(x: tilus.Tensor[tilus.f32, 64], k: tilus.uint64, yes: tilus.boolean, y: tilus.Tensor[tilus.f32, 64] = None):
    tilus.grid(1, warps=1)
    if y is not None:
        tilus.store(y, [0], tilus.load(x, [0], shape=[64]))


class Generator:
    """Stands for the code generator; records what it was asked."""

    def __init__(self) -> None:
        self.source = scaled_source
        self.asked: list[tuple[Function, CpuTarget]] = []

    def compile_for_cpu(self, function: Function, target: CpuTarget) -> str:
        self.asked.append((function, target))
        return self.source(function)


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Generator]:
    generator = Generator()
    monkeypatch.setattr(binaries, "compile_for_cpu", generator.compile_for_cpu)
    monkeypatch.delenv("TILUS_DEVICE", raising=False)
    monkeypatch.delenv("TILUS_CC", raising=False)
    execute._cpu_or_reference.cache_clear()
    for each in (scaled, fixed, packs):
        each._launchers.clear()
        each._launch = each.on(None)
    yield generator
    execute._cpu_or_reference.cache_clear()


@given(st.integers(0, 300), st.floats(-8, 8, width=16), st.integers(0, 3))
def check_scaled(n: int, a: float, rows: int) -> None:
    x, y = np.arange(n, dtype=np.float32), np.full(n, -1, np.float32)
    scaled(x, y, a, rows)
    assert (y == (np.float32(a) * x if rows else -1)).all()
    tx, ty = torch.from_numpy(x), torch.full((n,), -1.0)
    for _ in range(2):  # prepared, then the quick way
        scaled(tx, ty, a, rows)
        assert (ty.numpy() == y).all()


def test_values_and_grid_arrive(generator: Generator) -> None:
    check_scaled()
    assert generator.asked[0][1] == features.host_target()
    assert generator.asked[0][0].name == "scaled"


@pytest.mark.parametrize("with_y", [True, False])
def test_an_absent_tensor_has_no_slot(generator: Generator, with_y: bool) -> None:
    count = 4 if with_y else 3
    generator.source = lambda function: kernel(f"for (int i = 0; i < {count}; i++) ((uint64_t *)args[0])[i] = args[i];")
    x, y = torch.zeros(64), torch.zeros(64) if with_y else None
    for yes in (True, False):
        fixed(x, 2**64 - 1, yes, y)
        pointers = [x.data_ptr()] if y is None else [x.data_ptr(), y.data_ptr()]
        assert x.numpy().view(np.uint64)[:count].tolist() == [*pointers, 2**64 - 1, int(yes)]


@tilus.kernel
def packs(x: tilus.Tensor[tilus.uint4, 64], y: tilus.Tensor[tilus.uint4, 64]):
    tilus.grid(1, warps=1)
    tilus.store(y, [0], tilus.load(x, [0], shape=[64]))


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def test_read_only_memory_is_read_and_not_written(generator: Generator) -> None:
    x, y = read_only(np.arange(64, dtype=np.float32)), np.zeros(64, np.float32)
    for _ in range(2):
        scaled(x, y, 2.0, 1)
        assert (y == 2 * x).all()
        with pytest.raises(TilusError, match="scaled: the kernel writes to argument 'y', which is read-only"):
            scaled(y, x, 2.0, 1)
    generator.source = lambda function: kernel("for (int i = 0; i < 32; i++) ((char *)args[1])[i] = 7;")
    locked, free = read_only(np.zeros(32, np.uint8)), np.zeros(32, np.uint8)
    packs(tilus.packed(locked, tilus.uint4, [64]), tilus.packed(free, tilus.uint4, [64]))
    assert (free == 7).all()
    for _ in range(2):
        with pytest.raises(TilusError, match="packs: the kernel writes to argument 'y', which is read-only"):
            packs(tilus.packed(free, tilus.uint4, [64]), tilus.packed(locked, tilus.uint4, [64]))
    assert (locked == 0).all()


def test_it_is_launched_once_prepared_from_several_threads(generator: Generator) -> None:
    results: list[bool] = []

    def launches(seed: int) -> None:
        x, y = torch.full((200,), float(seed)), torch.zeros(200)
        for _ in range(100):
            scaled(x, y, 2.0, 1)
            results.append(bool((y == 2 * seed).all()))

    threads = [threading.Thread(target=launches, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 400


def devices_of(run: Callable[[], None]) -> list[str]:
    with recording() as times:
        run()
    return [device for _, device in times]


def call(device: str | None = None) -> Any:
    return lambda: scaled.on(device)(np.zeros(4, np.float32), np.zeros(4, np.float32), 1.0, 1)


def test_the_default_is_the_cpu_where_there_is_a_compiler(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert devices_of(call()) == ["cpu"]
    assert devices_of(call("cpu")) == ["cpu"]
    assert devices_of(call("reference")) == ["reference"]
    monkeypatch.setenv("TILUS_DEVICE", "reference")
    assert devices_of(lambda: scaled.on("auto")(np.zeros(5, np.float32), np.zeros(5, np.float32), 1.0, 1)) == ["cpu"]
    scaled._launchers.clear()
    assert devices_of(call()) == ["reference"]
    monkeypatch.setenv("TILUS_DEVICE", "cpu")
    scaled._launchers.clear()
    assert devices_of(call()) == ["cpu"]


@pytest.fixture
def no_compiler(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(toolchain, "_candidates", lambda path: iter(()))
    toolchain._find.cache_clear()
    pool.library.cache_clear()
    yield
    toolchain._find.cache_clear()


def test_without_a_compiler_the_reference_runs_and_says_so_once(no_compiler: None) -> None:
    with pytest.warns(UserWarning, match="kernels run on the reference, which is slow: no C compiler found") as caught:
        assert devices_of(call()) == ["reference"]
    text = str(caught[0].message)
    assert all(way in text for way in ("install gcc or clang", "pip install ziglang", "TILUS_DEVICE=reference"))
    scaled._launchers.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices_of(call()) == ["reference"]


def test_asking_for_the_cpu_without_a_compiler(no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TilusError, match="no C compiler found"):
        call("cpu")()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv("TILUS_DEVICE", "reference")
        assert devices_of(call()) == ["reference"]


def test_a_compiler_without_headers_is_none(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise TilusError("cc failed with exit status 1 on pool.c, expected a library:\nno pthread.h\nand so on")

    monkeypatch.setattr(pool, "library", fails)
    with pytest.warns(UserWarning, match="which is slow: cc failed with exit status 1 on pool.c"):
        assert devices_of(call()) == ["reference"]


@pytest.mark.parametrize("variable", ["TILUS_CC", "TILUS_NUM_THREADS"])
def test_a_bad_setting_is_an_error_and_no_reason_for_the_reference(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "/nowhere")
    with pytest.raises(TilusError, match=f"{variable} is '/nowhere', expected"):
        call()()


def test_the_number_of_threads_is_that_of_the_setting(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    real = pool.Launcher

    def recorded(name: str, library: Any, parameters: Any, num_threads: int) -> pool.Launcher:
        numbers.append(num_threads)
        return real(name, library, parameters, num_threads)

    monkeypatch.setattr(pool, "Launcher", recorded)
    monkeypatch.setenv("TILUS_NUM_THREADS", "3")
    call()()
    assert numbers == [3]


def test_nothing_of_it_is_loaded_with_the_package() -> None:
    program = "import sys, tilus, tilus.cli; print([m for m in sys.modules if m.startswith('tilus.runtime.cpu')])"
    assert python(program) == "[]\n"


def test_the_command_line_offers_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import os; print(os.environ['TILUS_DEVICE'])")
    arguments = ["run", "--device", "cpu", str(tmp_path / "program.py")]
    assert python(f"from tilus.cli import main; main({arguments!r}, standalone_mode=False)") == "cpu\n"


@tilus.kernel
def many_arrays(x: tilus.Tensor[tilus.f32, "m", "n"], y: tilus.Tensor[tilus.f32, "k", "n"]):
    """Sixteen tiles of 256 KiB, all alive at once."""
    tilus.grid(1, warps=4)
    parts = [tilus.load(x, [part * 256, 0], [256, 256]) * 2.0 for part in range(16)]
    total = tilus.zeros([256, 256], tilus.f32)
    for part in parts:
        total = total + part + parts[0]
    tilus.store(y, [0, 0], total)


def test_a_small_stack_is_enough() -> None:
    x = np.random.default_rng(0).integers(-9, 9, (16, 256, 256)).astype(np.float32)
    y = np.zeros((256, 256), np.float32)
    default = threading.stack_size(1 << 20)
    try:
        thread = threading.Thread(target=lambda: many_arrays.on("cpu")(x.reshape(-1, 256), y))
        thread.start()
    finally:
        threading.stack_size(default)
    thread.join(60)
    assert (y == 2 * (x.sum(0) + 16 * x[0])).all()
