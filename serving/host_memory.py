"""How much memory this process may still take: what the machine has, and what its control groups allow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_nbytes(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping: MemAvailable, or less where a control group (version 1 or 2) of this
    process or one above it allows less. root: where /proc and /sys are."""
    found = re.search(r"^MemAvailable:\s*(\d+)", (root / "proc/meminfo").read_text(), re.MULTILINE)
    amounts = [int(found[1]) * 1024 if found else 0]
    amounts += [amount for group in _groups(root) if (amount := _left_in(group)) is not None]
    return max(0, min(amounts))


def _groups(root: Path) -> Iterator[Path]:
    """Directories of the control groups that limit this process's memory."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            mount = root / "sys/fs/cgroup" / controllers
            relative = PurePosixPath(group.lstrip("/"))
            yield from (mount / parent for parent in (relative, *relative.parents))


def _left_in(group: Path) -> int | None:
    """What a group has left; None where it sets no limit. Pages of files count as used, but give way."""
    # In version 1, amounts without "total_" leave out those of groups below.
    second, first = ("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    for limit_name, usage_name, prefix in (second, first):
        limit, usage = _text(group / limit_name), _text(group / usage_name)
        if limit.isdigit() and usage.isdigit():
            amounts = dict(line.split() for line in _text(group / "memory.stat").splitlines())
            files = sum(int(amounts.get(f"{prefix}{kind}", 0)) for kind in ("inactive_file", "active_file"))
            return int(limit) - int(usage) + files
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
