"""How many threads run a kernel: the CPUs that this process may use, by affinity and by its cgroups' quotas."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tilus import config


def num_threads() -> int:
    """TILUS_NUM_THREADS, else `usable_cpus()`. Raises: TilusError for a bad value."""
    return config.num_threads() or usable_cpus()


def usable_cpus() -> int:
    """CPUs in this process' affinity mask, or fewer when a quota of a cgroup is less than that; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min(count, config.MAX_THREADS, *cgroup_quotas()))


def cgroup_quotas(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The CPUs, rounded up, that each cgroup of this process and each above it may use at a time, where there is a quota.

    In a container the paths are often those of the host, which do not exist inside; the root is that of the container.
    """
    try:
        lines = proc.read_text().splitlines()
    except OSError:  # no cgroups here
        return []
    quotas: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            quotas += _quotas(_groups(root, path), ("cpu.max",))
        elif "cpu" in controllers.split(","):
            quotas += _quotas(_groups(root / "cpu", path), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return quotas


def _groups(root: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part]
    return [root.joinpath(*parts[:n]) for n in range(len(parts) + 1)]


def _quotas(groups: list[Path], names: tuple[str, ...]) -> Iterator[int]:
    """Version 2 has quota and period in one file, version 1 in two; no quota is `max` in the one and -1 in the other."""
    for group in groups:
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
        except (OSError, ValueError):  # not a group with quotas
            continue
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield max(1, -(-int(quota) // int(period)))
