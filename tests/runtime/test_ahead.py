"""Kernels that are compiled before they are launched, and found again by other processes: which, and what becomes of mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tilus
from tilus.errors import TilusError
from tilus.kernels.activation import gated_kernel
from tilus.kernels.norm import rms_norm_kernel
from tilus.lang.kernel import Specialization
from tilus.ptx.assembler import SpillError
from tilus.runtime import ahead, binaries, compilations, cuda, execute
from tilus.runtime.autotune import chosen
from tilus.runtime.cpu import pool
from tilus.runtime.specialization_key import described, key
from tilus.runtime.tuned_plans import Key
from tilus.target import get_target

X = torch.linspace(-2, 2, 3 * 64).half().view(3, 2, 32)
SM_90A = get_target("sm_90a")


@pytest.fixture(autouse=True)
def _nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TILUS_DEVICE", raising=False)
    forget(monkeypatch)
    yield
    for found in (binaries.on_cpu, binaries.on_gpu, execute._gpu_launcher):
        found.cache_clear()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a new process, as far as these kernels go."""
    for found in (binaries.on_cpu, binaries.on_gpu, execute._gpu_launcher):
        found.cache_clear()
    for kernel in (gated_kernel, rms_norm_kernel):
        monkeypatch.setattr(kernel, "_launchers", {})
        monkeypatch.setattr(kernel, "_specializations", {})


def compiled_by(run: Callable[[], object]) -> int:
    before = compilations.num_compilations()
    run()
    return compilations.num_compilations() - before


def silu(out: torch.Tensor, count: int = 3) -> None:
    gated_kernel.on("cpu")(X[:count], out[:count])


def test_nothing_is_launched_and_later_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    out, steps = torch.full((3, 32), 7.0).half(), list[tuple[int, int]]()
    found = tilus.compile_ahead(lambda: silu(out), done=lambda *step: steps.append(step), processes=1)
    assert found == 1 and steps == [(1, 1)] and (out == 7.0).all()
    pool.library()  # of the threads, is none of the kernels
    assert compiled_by(lambda: silu(out)) == 0 and not (out == 7.0).any()
    out.fill_(7.0)
    assert tilus.compile_ahead(lambda: silu(out), processes=1) == 0
    assert (out == 7.0).all()  # though the launch was prepared
    forget(monkeypatch)
    monkeypatch.setattr(binaries, "compile_for_cpu", lambda *_: pytest.fail("translated again"))
    silu(out)
    assert not (out == 7.0).any()


def test_an_exception_ends_the_dry_run_and_launches_are_launched_again() -> None:
    out = torch.full((3, 32), 7.0).half()
    with pytest.raises(ZeroDivisionError):
        tilus.compile_ahead(lambda: (silu(out), 1 // 0), processes=1)
    silu(out)
    assert not (out == 7.0).any()
    with pytest.raises(TilusError, match="compile_ahead inside of compile_ahead"):
        tilus.compile_ahead(lambda: tilus.compile_ahead(lambda: None))


@pytest.mark.parametrize("damage", [b"", b"x" * 100])
def test_damaged_entries_are_made_again(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.zeros(3, 32).half()
    silu(out)
    (entry,) = (tmp_path / "kernels").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    forget(monkeypatch)
    silu(out)
    assert entry.read_bytes()[:1] == whole[:1] and len(entry.read_bytes()) == len(whole)


def test_a_disk_that_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot write the kernel cache"):
        assert tilus.compile_ahead(lambda: silu(torch.zeros(3, 32).half()), processes=1) == 1


def test_a_mistake_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise TilusError("no such instruction", hint="take another")

    monkeypatch.setattr(binaries, "compile_for_cpu", refuse)
    expected = (
        r"cannot compile the kernel gated_kernel of tilus.kernels.activation: no such instruction\n  hint: take another"
    )
    with pytest.raises(TilusError, match=expected):
        tilus.compile_ahead(lambda: silu(torch.zeros(3, 32).half()), processes=1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, for whatever launches nothing."""
    monkeypatch.setattr(cuda, "current_device", lambda: SimpleNamespace(index=0, target=SM_90A, num_sms=132))


@pytest.mark.usefixtures("gpu")
def test_where_registers_do_not_suffice_another_plan_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def assemble(ptx: str, target: object, **_: object) -> Any:
        asked.append(len(ptx))
        if len(asked) == 1:
            raise SpillError("kernel spills", hint="fewer stages")
        return real(ptx, target)

    real = binaries.cache.assemble
    monkeypatch.setattr(binaries.cache, "assemble", assemble)

    def run() -> None:
        out = torch.zeros(3, 32).half()
        try:
            gated_kernel.on("cuda")(X, out, block=1024)
        except SpillError:
            gated_kernel.on("cuda")(X, out, block=512)

    assert tilus.compile_ahead(run, processes=1) == 2
    forget(monkeypatch)
    assert tilus.compile_ahead(run, processes=1) == 0 and len(asked) == 2
    refused = gated_kernel.specialize(X, torch.zeros(3, 32).half(), block=1024)
    with pytest.raises(SpillError, match=r"kernel spills\n  hint: fewer stages"):
        binaries.on_gpu(refused, SM_90A)
    assert len(asked) == 2


@pytest.mark.usefixtures("gpu")
def test_what_is_found_is_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = X, torch.zeros(3, 32).half()
    first, code = binaries.on_gpu(gated_kernel.specialize(*arguments), SM_90A)
    forget(monkeypatch)
    monkeypatch.setattr(binaries, "compile_function", lambda *_: pytest.fail("translated again"))
    found, again = binaries.on_gpu(gated_kernel.specialize(*arguments), SM_90A)
    assert again == code and found is not first
    names = [[(type(p), p.name) for p in binary.interface.params] for binary in (first, found)]
    variables = [
        [(v.name, v.dtype, v.multiple_of) for v in binary.interface.kernel_params()] for binary in (first, found)
    ]
    assert names[0] == names[1] and variables[0] == variables[1]
    assert (found.kernel_name, found.waits, found.dynamic_nbytes) == (
        first.kernel_name,
        first.waits,
        first.dynamic_nbytes,
    )
    assert execute.sizes_of(found.interface, [*map(describe, arguments)])


def describe(tensor: torch.Tensor) -> Any:
    from tilus.lang.arguments import describe_argument

    return describe_argument(tensor)


def test_nothing_is_measured_in_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_AUTOTUNE", "1")
    asked = list[object]()
    tilus.compile_ahead(lambda: asked.append(chosen(Key("f", "d", "p"), (), lambda: pytest.fail("measured"))))
    assert asked == [None]


def specialization(kernel: tilus.Kernel, **consts: Any) -> Specialization:
    return kernel.specialize(X, torch.zeros(3, 32).half(), **consts)


def test_the_key_says_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [specialization(gated_kernel, block=block) for block in (1024, 512)]
    aligned = [key(each, ("sm_90a",)) for each in given]
    other = gated_kernel.specialize(X[:, :, :31], torch.zeros(3, 31).half())
    names = {*aligned, key(given[0], ("sm_80",)), key(other, ("sm_90a",))}
    assert None not in names and len(names) == 4
    forget(monkeypatch)
    assert key(specialization(gated_kernel, block=1024), ("sm_90a",)) == aligned[0]


def test_kernels_and_values_that_are_not_of_tilus_have_no_key() -> None:
    assert key(specialization(copied), ()) is None
    assert key(specialization(gated_kernel, block=Fraction(1024)), ()) is None
    assert key(specialization(gated_kernel, block=len), ()) is None
    assert key(specialization(gated_kernel, block=describe), ()) is None
    assert key(specialization(gated_kernel, block=ahead.is_dry), ()) is not None


@tilus.kernel
def copied(x: tilus.Tensor[tilus.f16, "n", 2, "k"], y: tilus.Tensor[tilus.f16, "n", "k"]):
    tilus.grid(1, warps=1)


def test_texts_tell_equal_values_of_different_types_apart() -> None:
    values = (1, 1.0, True, "1", b"1", None, (1,), ((1,),), (), int, float, tilus.f16, tilus.bf16, SM_90A)
    assert len({described(value) for value in values}) == len(values)
    assert described((1.5, "a", tilus.uint4)) == described((3 / 2, "".join(["a"]), tilus.dtype("uint4")))


def test_the_index_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_KERNEL_INDEX", "0")
    silu(torch.zeros(3, 32).half())
    assert not (tmp_path / "kernels").exists()
    monkeypatch.setenv("TILUS_KERNEL_INDEX", "yes")
    with pytest.raises(TilusError, match="TILUS_KERNEL_INDEX is 'yes', expected 0 or 1"):
        tilus.compile_ahead(lambda: silu(torch.zeros(3, 32).half(), 2))
