"""The doctor's report: what is there is found, what is missing comes with a way to get it, and nothing raises."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tilus import doctor
from tilus.doctor import Finding, render, report
from tilus.ptx import toolchain as ptx_toolchain
from tilus.runtime import cuda
from tilus.runtime.cpu import features, toolchain

NAMES = ["python", "numpy", "assembler", "disassembler", "cuda-bindings", "driver"]
NAMES += ["c-compiler", "cpu", "threads", "torch", "cache"]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def check_law(findings: list[Finding]) -> None:
    """Found things have no hint, missing ones have; everything is listed once."""
    assert [f.name for f in findings if not f.name.startswith("gpu")] == NAMES
    assert all(f.detail and bool(f.hint) != f.found for f in findings)


def test_this_machine() -> None:
    findings = by_name(report())
    check_law(list(findings.values()))
    for name in (
        "python",
        "numpy",
        "assembler",
        "disassembler",
        "cuda-bindings",
        "c-compiler",
        "cpu",
        "threads",
        "torch",
    ):
        assert findings[name].found
    assert findings["numpy"].detail == importlib.metadata.version("numpy")
    assert findings["torch"].detail.startswith(importlib.metadata.version("torch"))


def test_nothing_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_package(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    def no_driver() -> Any:
        raise RuntimeError("something that nobody foresaw")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(importlib.metadata, "version", no_package)
    monkeypatch.setattr(ptx_toolchain, "candidates", lambda name: iter(()))
    monkeypatch.delenv("TILUS_PTXAS", raising=False)
    monkeypatch.setattr(cuda, "driver", no_driver)
    monkeypatch.setenv("TILUS_CC", str(tmp_path / "none"))
    findings = report()
    check_law(findings)
    assert [f.name for f in findings if f.found] == ["python", "threads"]
    assert by_name(findings)["driver"].detail == "RuntimeError: something that nobody foresaw"
    text = render(findings)
    assert text.count("->") == len(findings) - 2
    assert "pip install ziglang" in text and "pip install 'tilus[sass]'" in text and "TILUS_CACHE_DIR" in text


def in_stub_report() -> str:
    from libcuda_stub import Stub

    stub = Stub()
    stub.set("stub_devices", 2)
    return render()


def test_gpus_and_driver(in_stub: Callable[..., str]) -> None:
    lines = in_stub(in_stub_report).splitlines()
    assert any(line.split() == ["ok", "driver", "supports", "CUDA", "13.0"] for line in lines)
    for index in range(2):
        assert any(
            f"gpu {index}" in line and "Stub GPU, capability 9.0, 132 SMs, target sm_90a" in line for line in lines
        )


def test_a_bad_setting_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"TILUS_PTXAS": "assembler", "TILUS_CC": "c-compiler", "TILUS_NUM_THREADS": "threads"}
    for variable in settings:
        monkeypatch.setenv(variable, "/no/such/thing")
    findings = by_name(doctor.report())
    for variable, name in settings.items():
        assert not findings[name].found and f"{variable} is '/no/such/thing'" in findings[name].detail


def test_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_NUM_THREADS", "7")
    findings = by_name(doctor.report())
    compiler, target = toolchain.find_compiler(), features.host_target()
    assert findings["c-compiler"].detail == f"{compiler.version} ({compiler.command[0]})"
    assert findings["cpu"].detail.startswith(f"{target.arch}, vectors of {target.lanes} float32, ")
    assert findings["threads"].detail.startswith("7 for device='cpu' (")
