"""What code is generated for: one frozen table of GPUs with their capabilities and limits, and the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from tilus.errors import TilusError


@dataclass(frozen=True)
class Target:
    """One compilation target.

    name: as written by users and in PTX (`sm_90a`). `sm`: compute capability times ten. `ptx_version`: the lowest PTX
    ISA version that knows the target. `max_shared_nbytes`: dynamic shared memory one block may use (CUDA programming
    guide, compute capabilities table). The trailing `a` means architecture-specific features (wgmma, setmaxnreg).
    """

    name: str
    sm: int
    ptx_version: tuple[int, int]
    max_shared_nbytes: int
    max_registers_per_thread: int = 255
    max_threads_per_block: int = 1024
    registers_per_sm: int = 65536
    shared_nbytes_per_sm: int = 0
    arch_specific: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class CpuTarget:
    """A CPU that C is generated for.

    arch: `x86_64`, `aarch64` or what the system calls it. lanes: float32 elements of its widest vectors. features: the
    compiler's macros for the instruction set extensions that it has (`__AVX2__`, `__ARM_NEON`).
    """

    name: str
    arch: str
    lanes: int
    features: frozenset[str]

    def __str__(self) -> str:
        return self.name


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", 80, (7, 0), 163 * 1024, shared_nbytes_per_sm=164 * 1024),
        Target("sm_86", 86, (7, 1), 99 * 1024, shared_nbytes_per_sm=100 * 1024),
        Target("sm_89", 89, (7, 8), 99 * 1024, shared_nbytes_per_sm=100 * 1024),
        Target("sm_90a", 90, (8, 0), 227 * 1024, shared_nbytes_per_sm=228 * 1024, arch_specific=True),
        Target("sm_100a", 100, (8, 6), 227 * 1024, shared_nbytes_per_sm=228 * 1024, arch_specific=True),
    )
}

DEFAULT_TARGET = TARGETS["sm_90a"]


def get_target(name: str) -> Target:
    """The target of that name.

    Raises: TilusError naming the known targets.
    """
    if name not in TARGETS:
        raise TilusError(
            f"unknown target {name!r}", hint=f"known targets: {', '.join(TARGETS)}; `tilus compile` also knows cpu"
        )
    return TARGETS[name]


def target_of_capability(major: int, minor: int) -> Target:
    """The best target for a device of compute capability `major.minor`.

    Raises: TilusError when the device is older than sm_80.
    """
    sm = major * 10 + minor
    for target in TARGETS.values():
        if target.sm == sm:
            return target
    runnable = [t for t in TARGETS.values() if not t.arch_specific and t.sm <= sm and t.sm // 10 == major]
    if not runnable:
        raise TilusError(
            f"no target for a device of compute capability {major}.{minor}",
            hint=f"tilus supports {', '.join(TARGETS)}; use device='reference' to run without this GPU",
        )
    return max(runnable, key=lambda t: t.sm)
