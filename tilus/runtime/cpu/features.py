"""What the compiler makes of this machine: the macros that it predefines when it compiles for it."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from dataclasses import dataclass

from tilus.errors import TilusError
from tilus.runtime.cpu import toolchain
from tilus.runtime.cpu.toolchain import CCompiler
from tilus.target import CpuTarget

_TIMEOUT_S = 60.0
_MACRO = re.compile(r"^#define (\w+)(?:\(.*?\))? ?(.*)$", re.MULTILINE)
_ARM = ("aarch64", "arm64", "armv7l", "armv8l")
_X86 = ("x86_64", "amd64", "i386", "i686")

# Instruction set extensions that generated code may ask for.
MACROS = frozenset(
    [f"__{name}__" for name in ("SSSE3", "SSE4_1", "SSE4_2", "AVX", "AVX2", "F16C", "FMA", "BMI2", "GFNI")]
    + [f"__AVX{name}__" for name in ("IFMA", "VNNI", "VNNIINT8", "NECONVERT")]
    + [f"__AVX512{name}__" for name in ("F", "BW", "CD", "DQ", "VL", "IFMA", "VBMI", "VBMI2", "VNNI", "BITALG")]
    + [f"__AVX512{name}__" for name in ("VPOPCNTDQ", "BF16", "FP16")]
    + ["__ARM_NEON"]
    + [f"__ARM_FEATURE_{name}" for name in ("FMA", "DOTPROD", "MATMUL_INT8", "SVE", "SVE2")]
    + [f"__ARM_FEATURE_{name}" for name in ("FP16_VECTOR_ARITHMETIC", "FP16_FML", "BF16", "BF16_VECTOR_ARITHMETIC")]
)
_AVX512 = {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"}
_AVX2 = {"__AVX2__", "__FMA__", "__F16C__"}


@dataclass(frozen=True)
class HostCpu:
    """This CPU as one compiler sees it.

    macros: those of MACROS that it predefines. fingerprint: sha256 over all that it predefines, so also over extensions
    that only the compiler's own choice of instructions depends on.
    """

    arch: str
    macros: frozenset[str]
    fingerprint: str

    @property
    def target(self) -> CpuTarget:
        lanes = 16 if self.macros >= _AVX512 else 8 if self.macros >= _AVX2 else 4
        return CpuTarget("cpu", self.arch, lanes, self.macros)


def host_target() -> CpuTarget:
    """The target that describes this machine. Raises: TilusError when there is no C compiler that knows it."""
    return host_cpu(toolchain.find_compiler()).target


def native_flags(compiler: CCompiler) -> tuple[str, ...]:
    """The flags that mean: for the CPU that this runs on. None where compilers have no such flag."""
    machine = platform.machine().lower()
    if compiler.is_zig or machine in _ARM:
        return ("-mcpu=native",)
    return ("-march=native",) if machine in _X86 else ()


@functools.lru_cache(maxsize=16)
def host_cpu(compiler: CCompiler) -> HostCpu:
    """This CPU, asked of the compiler once per process. Raises: TilusError when the compiler does not say."""
    command = [*compiler.command, *native_flags(compiler), "-dM", "-E", "-x", "c", "-"]
    status, output = toolchain.run(command, timeout_s=_TIMEOUT_S)
    macros = dict(_MACRO.findall(output))
    if status != 0 or "__STDC__" not in macros:
        raise TilusError(
            f"{compiler} does not say what this CPU can do (status {status}), expected its macros from "
            f"{' '.join(command)}:\n{output.strip()[-1000:]}",
            hint=toolchain.INSTALL_HINT,
        )
    return describe(macros)


def describe(macros: dict[str, str]) -> HostCpu:
    """The CPU for which a compiler predefines these macros."""
    arch = next((name for name in ("x86_64", "aarch64") if f"__{name}__" in macros), platform.machine().lower())
    text = "\n".join(f"{name} {value}" for name, value in sorted(macros.items()))
    return HostCpu(arch, MACROS & macros.keys(), hashlib.sha256(text.encode()).hexdigest())
