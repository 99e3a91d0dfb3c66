"""The report's bank conflicts are those that the emulator counts when it runs the kernel's PTX."""

from __future__ import annotations

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor, f16, f32
from tilus.codegen.bank_report import site_conflicts
from tilus.compiler import Compiled, compile_function
from tilus.dtypes import DataType
from tilus.layout import (
    RegisterLayout,
    SharedLayout,
    column_major,
    padded,
    replicated,
    row_major,
    spatial,
    strided,
    swizzled,
)
from tilus.runtime.emulator import run_kernel
from tilus.target import DEFAULT_TARGET

SHAPE = (32, 64)
READS = {
    "rows": spatial(2, 32).local(16, 2),
    "columns": spatial(32, 2).local(1, 32),
    "columns of single elements": spatial(1, 2).column_spatial(32, 1).local(1, 32),
    "replicated": spatial(8, 4).replicated(2).local(4, 16),
}
MEMORIES = {
    "row-major": row_major(SHAPE),
    "padded": padded(SHAPE, 8),
    "column-major": column_major(SHAPE),
    "swizzled": swizzled(SHAPE, 2),
}


@tilus.kernel
def through_shared(x: Tensor["t", "m", "n"], y: Tensor["t", "m", "n"], *, memory: Const, read: Const):
    tilus.grid(1, warps=2)
    s = tilus.shared(x.dtype, memory.shape, layout=memory)
    tilus.store_shared(s, tilus.load(x, [0, 0], shape=memory.shape))
    tilus.sync()
    tilus.store(y, [0, 0], tilus.load_shared(s, layout=read))


@tilus.kernel
def product(x: Tensor[f16, "m", "k"], y: Tensor[f32, "m", "m"], *, memory: Const):
    tilus.grid(1, warps=2)
    s = tilus.shared(f16, memory.shape, layout=memory)
    tilus.store_shared(s, tilus.load(x, [0, 0], shape=memory.shape))
    tilus.sync()
    b = tilus.transpose(tilus.load_shared(s))
    tilus.store(y, [0, 0], tilus.dot(tilus.load_shared(s), b, tilus.zeros([memory.shape[0], memory.shape[0]], f32)))


def reported(compiled: Compiled) -> tuple[int, int]:
    """(warp-wide accesses, extra wavefronts) of all sites, each of which runs once."""
    counts = [site_conflicts(site) for site in compiled.lowered.shared_sites]
    return sum(c.accesses for c in counts), sum(c.extra_wavefronts for c in counts)


def measured(compiled: Compiled, nbytes: tuple[int, int]) -> tuple[int, int]:
    """The same, counted while the emulator runs the kernel; a matrix of ldmatrix is an access of its own."""
    arrays = [np.zeros(n, np.uint8) for n in nbytes]
    stats = run_kernel(compiled.ptx, compiled.kernel_name, (1, 1, 1), arrays, profile=True).stats
    matrices = {"x1": 1, "x2": 2, "x4": 4}
    accesses = 0
    for site in stats.shared.values():
        parts = site.opcode.split(".")
        accesses += site.accesses * next((matrices[p] for p in parts if p in matrices), 1)
    return accesses, sum(site.conflicts for site in stats.shared.values())


def check(dtype: DataType, memory: SharedLayout, read: RegisterLayout) -> None:
    m, n = memory.shape
    kernel = through_shared.specialize(t=dtype, m=m, n=n, memory=memory, read=read)
    compiled = compile_function(kernel.function, DEFAULT_TARGET)
    nbytes = m * n * dtype.nbits // 8
    assert reported(compiled) == measured(compiled, (nbytes, nbytes))


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("dtype", [tilus.uint8, f16, f32], ids=str)
def test_loads_and_stores(dtype: DataType, read: RegisterLayout, memory: SharedLayout) -> None:
    check(dtype, memory, read)


@pytest.mark.parametrize("memory", [row_major(SHAPE), padded(SHAPE, 32)], ids=str)
@pytest.mark.parametrize("read", [spatial(4, 16).local(8, 4), spatial(32, 2).local(1, 32)], ids=str)
@pytest.mark.parametrize("dtype", [tilus.uint4, tilus.uint6, tilus.uint2], ids=str)
def test_loads_and_stores_of_whole_bytes(dtype: DataType, read: RegisterLayout, memory: SharedLayout) -> None:
    check(dtype, memory, read)


@pytest.mark.parametrize(
    ("memory", "expects_conflicts"),
    [(row_major(SHAPE), True), (padded(SHAPE, 8), False), (swizzled(SHAPE, 2), False), (padded(SHAPE, 32), True)],
    ids=["row-major", "padded", "swizzled", "padded by 64 bytes"],
)
def test_ldmatrix(memory: SharedLayout, expects_conflicts: bool) -> None:
    compiled = compile_function(product.specialize(m=32, k=64, memory=memory).function, DEFAULT_TARGET)
    sites = compiled.lowered.shared_sites
    matrices = [site for site in sites if site.rows_of_16_bytes]
    assert len(matrices) == 2
    assert any(site_conflicts(site).extra_wavefronts for site in matrices) == expects_conflicts
    assert reported(compiled) == measured(compiled, (32 * 64 * 2, 32 * 32 * 4))


@tilus.kernel
def two_rows(y: Tensor[f32, 2, 1], start: int, *, memory: Const, fixed: Const):
    tilus.grid(1, warps=1)
    s = tilus.shared(f32, memory.shape, layout=memory)
    row = start if fixed is None else fixed
    tile = tilus.load_shared(s, [row, 0], shape=[2, 1], layout=replicated(16, 2) * spatial(2, 1))
    tilus.store(y, [0, 0], tile)


def test_an_offset_of_run_time_counts_at_its_worst() -> None:
    """Rows 0 to 3 are words 0, 1, 33 and 34: only rows 1 and 2 share a bank."""
    memory = strided(((2, 2), 1), ((33, 1), 1))

    def extra(fixed: int | None) -> int:
        compiled = compile_function(two_rows.specialize(memory=memory, fixed=fixed).function, DEFAULT_TARGET)
        (site,) = compiled.lowered.shared_sites
        return site_conflicts(site).extra_wavefronts

    assert [extra(0), extra(1), extra(2), extra(None)] == [0, 1, 0, 1]
