"""Tiles over the threads of a block such that a thread has whole vectors of neighbouring elements."""

from __future__ import annotations

import math

from tilus.layout import RegisterLayout, local, replicated, spatial


def power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def by_vector(rows: int, columns: int, vector: int, warps: int) -> RegisterLayout:
    """[rows, columns], neighbouring threads having neighbouring vectors; with too few of them threads repeat others."""
    threads, vectors = 32 * warps, columns // vector
    across = math.gcd(threads, vectors)
    down = math.gcd(threads // across, rows)
    copies = threads // (across * down)
    return replicated(copies, 2) * local(rows // down, vectors // across) * spatial(down, across) * local(1, vector)
