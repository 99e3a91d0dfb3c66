"""Counts of instructions, bank conflicts and sectors for access patterns whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from emulator_kernels import run_body

from tilus.runtime.emulator import AccessStats

BASE = "mov.u32 %r2, smem;\nmul.lo.u32 %r1, %r0, {stride};\nadd.u32 %r3, %r2, %r1;\n"


def only(stats: dict[int, AccessStats]) -> AccessStats:
    (site,) = stats.values()
    return site


@pytest.mark.parametrize(
    ("words", "wavefronts"),
    [(1, 1), (2, 2), (4, 4), (3, 1), (32, 32), (33, 1), (16, 16), (8, 8), (0, 1), (5, 1), (6, 2)],
)
def test_word_stores_with_a_stride(words: int, wavefronts: int) -> None:
    """Lanes a stride of s words apart meet gcd(s, 32) times in a bank; a stride of zero is a broadcast."""
    body = BASE.format(stride=4 * words) + "st.shared.b32 [%r3], 1;"
    stats = run_body(body, np.zeros(1, np.uint32), shared=4224, profile=True).stats
    assert (only(stats.shared).transactions, only(stats.shared).accesses) == (wavefronts, 1)


@pytest.mark.parametrize(("vector", "nbytes"), [("v2", 8), ("v4", 16)])
def test_contiguous_vectors_run_in_phases_without_conflicts(vector: str, nbytes: int) -> None:
    values = ", ".join(["1"] * (nbytes // 4))
    body = BASE.format(stride=nbytes) + f"st.shared.{vector}.b32 [%r3], {{{values}}};"
    site = only(run_body(body, np.zeros(1, np.uint32), shared=2048, threads=64, profile=True).stats.shared)
    assert (site.accesses, site.transactions, site.conflicts) == (2, 2 * nbytes // 4, 0)


def test_phases_do_not_share_wavefronts() -> None:
    """Each half warp meets 16 times in a bank pair of its own: 16 + 16 wavefronts."""
    body = (
        "and.b32 %r1, %r0, 15;\nshl.b32 %r1, %r1, 7;\nshr.u32 %r4, %r0, 4;\nmad.lo.u32 %r1, %r4, 8, %r1;\n"
        "mov.u32 %r2, smem;\nadd.u32 %r3, %r2, %r1;\nst.shared.v2.b32 [%r3], {1, 1};"
    )
    site = only(run_body(body, np.zeros(1, np.uint32), shared=2048, profile=True).stats.shared)
    assert (site.transactions, site.ideal) == (32, 2)


@pytest.mark.parametrize(("row_nbytes", "wavefronts"), [(16, 4), (128, 32), (144, 4), (64, 16), (80, 4), (32, 8)])
def test_ldmatrix_counts_a_phase_of_eight_rows_per_matrix(row_nbytes: int, wavefronts: int) -> None:
    fill = BASE.format(stride=row_nbytes) + "st.shared.v4.b32 [%r3], {0, 0, 0, 0};\nbar.sync 0;\n"
    body = fill + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r3];"
    stats = run_body(body, np.zeros(1, np.uint32), shared=32 * row_nbytes, profile=True).stats
    site = next(site for site in stats.shared.values() if site.opcode.startswith("ldmatrix"))
    assert (site.transactions, site.ideal) == (wavefronts, 4)


@pytest.mark.parametrize(
    ("stride", "load", "sectors"), [(4, "b32", 4), (8, "b32", 8), (32, "b32", 32), (0, "b32", 1), (16, "v4.b32", 16)]
)
def test_global_sectors(stride: int, load: str, sectors: int) -> None:
    target = "%r10" if load == "b32" else "{%r10, %r11, %r12, %r13}"
    body = f"mad.wide.u32 %d5, %r0, {stride}, %d0;\nld.global.{load} {target}, [%d5];"
    site = only(run_body(body, np.zeros(512, np.uint32), profile=True).stats.global_)
    assert site.transactions == sectors
    assert site.ideal == (1 if stride == 0 else 16 if load != "b32" else 4)


def test_dynamic_instruction_counts() -> None:
    body = "mov.u32 %r1, 0;\nLOOP:\nadd.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 10;\n@%p1 bra LOOP;\n"
    stats = run_body(body, np.zeros(1, np.uint32), threads=96, grid=(2, 1, 1)).stats
    assert stats.instructions["add.u32"] == 10 * 3 * 2
    assert stats.instructions["ret"] == 3 * 2
    assert stats.shared == {}
