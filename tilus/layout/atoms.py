"""Register layouts that instructions prescribe: fragments of mma.sync, ldmatrix and wgmma.

Source: PTX ISA, "Warp-level matrix instructions" (fragments of mma.m16n8k*, ldmatrix) and "Asynchronous warpgroup level
matrix instructions" (register fragments of wgmma). One row of a fragment is 16 or 32 bytes whatever the element type,
so a fragment depends on the element only by its width: `nbits` is 4, 8, 16 or 32.
"""

from __future__ import annotations

from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout, column_spatial, local, replicated, spatial


def mma_a(nbits: int = 16, k: int | None = None) -> RegisterLayout:
    """A of mma.m16n8k{k}: shape [16, k]. k is 256 / nbits (the default) or half of it."""
    return local(1, _halves(nbits, k)).local(2, 1).spatial(8, 4).local(1, _per_register(nbits))


def mma_b(nbits: int = 16, k: int | None = None) -> RegisterLayout:
    """B of mma.m16n8k{k}: shape [k, 8]. k is 256 / nbits (the default) or half of it."""
    return local(_halves(nbits, k), 1).column_spatial(4, 8).local(_per_register(nbits), 1)


def mma_c() -> RegisterLayout:
    """C and D of every mma.m16n8k*: shape [16, 8]."""
    return local(2, 1).spatial(8, 4).local(1, 2)


def ldmatrix(nbits: int = 16) -> RegisterLayout:
    """One matrix of ldmatrix, 8 rows of 16 bytes: shape [8, 128 / nbits]. Lane 4r + c gets word c of row r."""
    if 32 % nbits:
        raise LayoutError(f"a word of ldmatrix cannot hold elements of {nbits} bits; expected 1, 2, 4, 8, 16 or 32")
    return spatial(8, 4).local(1, 32 // nbits)


def ldmatrix_trans() -> RegisterLayout:
    """One matrix of ldmatrix.trans, as its memory holds it (16-bit elements only): shape [8, 8]."""
    return column_spatial(4, 8).local(2, 1)


def wgmma_a(nbits: int = 16) -> RegisterLayout:
    """A of wgmma.m64n*k(256 / nbits) in registers: shape [64, 256 / nbits], four warps."""
    return spatial(4, 1) * mma_a(nbits)


def wgmma_d(n: int) -> RegisterLayout:
    """D of wgmma.m64nNk*: shape [64, n], four warps. It does not depend on the instruction's k."""
    if n % 8 or not 8 <= n <= 256:
        raise LayoutError(f"wgmma has no n = {n}; expected a multiple of 8 in 8..256")
    return spatial(4, 1).local(1, n // 8).local(2, 1).spatial(8, 4).local(1, 2)


def mma_layouts(
    m: int, n: int, k: int, warps: tuple[int, int], nbits: int = 16
) -> tuple[RegisterLayout, RegisterLayout, RegisterLayout]:
    """(A [m, k], B [k, n], C [m, n]) of a block-level product by mma.m16n8k(256 / nbits).

    warps: the grid (warps along m, warps along n), row-major. Warps along n hold the same A, warps along m the same B.
    Raises LayoutError where the tile is not a multiple of the warp grid times the instruction.
    """
    warps_m, warps_n = warps
    a, b, c = mma_a(nbits), mma_b(nbits), mma_c()
    steps = (16 * warps_m, 8 * warps_n, a.shape[1])
    if m % steps[0] or n % steps[1] or k % steps[2]:
        raise LayoutError(
            f"a product of m, n, k = {m}, {n}, {k} by {warps_m} x {warps_n} warps; expected multiples of {steps}",
            hint="choose another warp grid or a larger tile",
        )
    repeat_m, repeat_n, repeat_k = m // steps[0], n // steps[1], k // steps[2]
    return (
        spatial(warps_m, 1) * replicated(warps_n, 2) * local(repeat_m, repeat_k) * a,
        replicated(warps_m, 2) * spatial(1, warps_n) * local(repeat_k, repeat_n) * b,
        spatial(warps_m, warps_n) * local(repeat_m, repeat_n) * c,
    )


def _halves(nbits: int, k: int | None) -> int:
    """How many times k holds the 16 bytes of a row that one register a lane covers."""
    if k is not None and k * nbits not in (128, 256):
        raise LayoutError(f"mma.sync has no k = {k} on {nbits} bits; expected {128 // nbits} or {256 // nbits}")
    return 2 if k is None else k * nbits // 128


def _per_register(nbits: int) -> int:
    if nbits not in (4, 8, 16, 32):
        raise LayoutError(f"no matrix fragment has elements of {nbits} bits; expected 4, 8, 16 or 32")
    return 32 // nbits
