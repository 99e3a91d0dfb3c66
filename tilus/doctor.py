"""What of tilus' surroundings is on this machine, and how to get what is missing. Never raises: that is its purpose."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import runpy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tilus import config
from tilus.errors import TilusError
from tilus.ptx import assembler, sass
from tilus.runtime import cuda
from tilus.runtime.cpu import features, threads, toolchain


@dataclass(frozen=True)
class Finding:
    """One thing looked for. detail: version and place, or why it is missing. hint: how to get it; empty when found."""

    name: str
    found: bool
    detail: str
    hint: str = ""


def report() -> list[Finding]:
    """All findings, in the order in which one needs the other."""
    findings = [
        _look("python", platform.python_version, "install Python 3.11 or newer"),
        _look("numpy", lambda: importlib.metadata.version("numpy"), "pip install numpy"),
        _look("assembler", lambda: str(assembler.find_assembler()), "pip install 'nvidia-cuda-nvcc==13.0.*'"),
        _look("disassembler", lambda: str(sass.find_disassembler()), "pip install 'tilus[sass]'"),
        _look(
            "cuda-bindings", lambda: importlib.metadata.version("cuda-bindings"), "pip install 'cuda-python>=13,<14'"
        ),
        _look("driver", _driver, "install the NVIDIA driver; without one use device='cpu', 'reference' or 'emulator'"),
    ]
    findings += _gpus()
    return [
        *findings,
        _look("c-compiler", lambda: str(toolchain.find_compiler()), f"{toolchain.INSTALL_HINT} (for device='cpu')"),
        _look("cpu", _cpu, f"{toolchain.INSTALL_HINT}: it says what the CPU can do"),
        _look("threads", _threads, "unset TILUS_NUM_THREADS to use every CPU that this process may use"),
        _look("torch", _torch, "pip install torch (needed for serving, optional for kernels)"),
        _look("cache", _cache_directory, "set TILUS_CACHE_DIR to a writeable directory"),
    ]


def render(findings: list[Finding] | None = None) -> str:
    """The findings (default: a fresh report) as aligned text, a hint under each thing that is missing."""
    rows = report() if findings is None else findings
    width = max(len(row.name) for row in rows)
    lines: list[str] = []
    for row in rows:
        lines.append(f"{'ok' if row.found else '--'}  {row.name:<{width}}  {row.detail}")
        if row.hint:
            lines.append(f"    {'':<{width}}  -> {row.hint}")
    return "\n".join(lines)


def _look(name: str, probe: Callable[[], str], hint: str) -> Finding:
    """What `probe` says; whatever it raises becomes the reason why the thing is missing."""
    try:
        return Finding(name, True, probe())
    except TilusError as error:
        return Finding(name, False, error.message.splitlines()[0], hint)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", hint)
    except Exception as error:  # a broken installation may raise anything, and must still get a report
        return Finding(name, False, f"{type(error).__name__}: {error}", hint)


def _driver() -> str:
    major, minor = cuda.driver_version()
    return f"supports CUDA {major}.{minor}"


def _gpus() -> list[Finding]:
    try:
        count = cuda.device_count()
    except Exception:  # the driver's own finding says why
        count = 0
    if count == 0:
        return [Finding("gpu", False, "none", "every kernel also runs on device='cpu', 'reference' and 'emulator'")]
    return [
        _look(f"gpu {index}", lambda index=index: _gpu(index), "check CUDA_VISIBLE_DEVICES") for index in range(count)
    ]


def _gpu(index: int) -> str:
    device = cuda.device(index)
    major, minor = device.capability
    return f"{device.name}, capability {major}.{minor}, {device.num_sms} SMs, target {device.target}"


def _cpu() -> str:
    target = features.host_target()
    names = sorted(macro.removeprefix("__ARM_FEATURE_").strip("_") for macro in target.features)
    return f"{target.arch}, vectors of {target.lanes} float32, {' '.join(names)}"


def _threads() -> str:
    usable = threads.usable_cpus()
    return f"{threads.num_threads()} for device='cpu' ({usable} usable CPU{'s' if usable > 1 else ''})"


def _torch() -> str:
    """Version and CUDA version from torch's own version file: importing torch would take seconds."""
    version = importlib.metadata.version("torch")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise TilusError(f"torch {version} is installed but cannot be imported")
    built_for = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    return f"{version}, " + (f"CUDA {built_for}" if built_for else "CPU only")


def _cache_directory() -> str:
    directory = config.cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"x")
    return f"{directory} (writeable)"
