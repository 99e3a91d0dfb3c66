"""PTX kernels around wgmma, and where the PTX ISA puts the elements of its operands, one element at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from emulator_kernels import run_body

from tilus.runtime.emulator import Result

Place = Callable[[int, int], int]

DTYPES: dict[str, Any] = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2, "s8": np.int8, "u8": np.uint8, "f32": np.float32, "s32": np.int32,
}  # fmt: skip


# "Canonical Layouts": ((8,m),(T,2k)):((1T,SBO),(1,LBO)) and so on, strides in elements, T = 128 bits of elements. The
# digits of an index are written here as the table has them; the swizzle is CuTe's Swizzle<bits, 4, 3> on bytes.
@dataclass(frozen=True)
class Layout:
    """A matrix of `mn` x `k` in shared memory. swizzle: bytes, 0 for none. nbytes: of an element."""

    mn: int
    nbytes: int
    swizzle: int = 0
    k_major: bool = True
    start: int = 0

    @property
    def t(self) -> int:
        return 16 // self.nbytes

    @property
    def k(self) -> int:
        return 32 // self.nbytes

    @property
    def strides(self) -> tuple[int, int]:
        """(LBO, SBO) in bytes: dense tiles, those of no-swizzle with a gap of one core matrix."""
        width = self.swizzle // 16
        if self.k_major:
            return (0, 8 * self.swizzle) if self.swizzle else (128, 384)
        if not self.swizzle:
            return -(-self.mn // self.t) * 256 + 128, 256  # k of 8 to the next, chunk of mn to the next
        atoms = -(-self.mn // (self.t * width))
        return 8 * self.swizzle, atoms * 8 * self.swizzle

    def byte(self, mn: int, k: int) -> int:
        """Offset from an aligned address of the first byte of an element."""
        lbo, sbo = self.strides
        t, width = self.t, max(1, self.swizzle // 16)
        if self.k_major:
            row, m, element, chunk = mn % 8, mn // 8, k % t, k // t
            offset = row * width * 16 + m * sbo + element * self.nbytes + chunk * (16 if self.swizzle else lbo)
        else:
            element, column, m, row, chunk = mn % t, mn // t % width, mn // t // width, k % 8, k // 8
            along_m, along_k = (lbo, sbo) if self.swizzle else (sbo, lbo)
            offset = element * self.nbytes + column * 16 + m * along_m + row * width * 16 + chunk * along_k
        offset += self.start
        return offset ^ ((offset >> 7) & (width - 1)) << 4

    @property
    def size(self) -> int:
        """Bytes up to the end of the last element, whole KiB."""
        last = max(self.byte(mn, k) for mn in range(self.mn) for k in (0, self.k - 1))
        return -(-(last + 16) // 1024) * 1024

    def image(self, matrix: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """The bytes of shared memory that hold a matrix [mn, k]."""
        image = np.zeros(self.size, np.uint8)
        data = np.ascontiguousarray(matrix).view(np.uint8).reshape(self.mn, self.k, self.nbytes)
        for mn in range(self.mn):
            for k in range(self.k):
                first = self.byte(mn, k)
                image[first : first + self.nbytes] = data[mn, k]
        return image

    def descriptor(self, base: int = 0) -> int:
        """The fields but the base address of the tile, which the kernel adds; `base` is added here."""
        lbo, sbo = self.strides
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[self.swizzle]
        return (base + self.start) >> 4 | lbo >> 4 << 16 | sbo >> 4 << 32 | mode << 62


# "Register Fragments": figures of A (m64k16, k8, k32) and D, for thread `thread` of the warpgroup.
def place_d(thread: int, i: int) -> tuple[int, int]:
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


def place_a(thread: int, i: int, per: int) -> tuple[int, int]:
    """per: elements in a 32-bit register."""
    warp, lane = thread // 32, thread % 32
    register, piece = i // per, i % per
    row = 16 * warp + lane // 4 + (8 if register in (1, 3) else 0)
    return row, lane % 4 * per + piece + (4 * per if register in (2, 3) else 0)


def a_words(matrix: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """[128, 4] registers of A."""
    per = 4 // matrix.dtype.itemsize
    places = [[place_a(thread, i, per) for i in range(4 * per)] for thread in range(128)]
    rows, columns = np.array(places).transpose(2, 0, 1)
    return np.ascontiguousarray(matrix[rows, columns]).view(np.uint32)


def d_index(n: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    places = np.array([[place_d(thread, i) for i in range(n // 2)] for thread in range(128)])
    return places[..., 0], places[..., 1]


def braces(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


FENCE = "fence.proxy.async;"
D, A = 100, 40  # first registers; those below 40 are scratch


def fill(nbytes: int) -> str:
    """Copies in0 to shared memory, 16 bytes a thread at a time."""
    return (
        "shl.b32 %r1, %r0, 4;\nmov.u32 %r2, smem;\nadd.u32 %r3, %r2, %r1;\nmad.wide.u32 %d20, %r0, 16, %d1;\n"
        f"FILL:\nsetp.lt.u32 %p1, %r1, {nbytes};\n@!%p1 bra FILLED;\n"
        "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%d20];\nst.shared.v4.b32 [%r3], {%r20, %r21, %r22, %r23};\n"
        "mov.u32 %r4, %ntid.x;\nshl.b32 %r4, %r4, 4;\nadd.u32 %r1, %r1, %r4;\nadd.u32 %r3, %r3, %r4;\n"
        "cvt.u64.u32 %d21, %r4;\nadd.u64 %d20, %d20, %d21;\nbra FILL;\nFILLED:\n"
    )


def descriptor(register: str, fields: int) -> str:
    """A descriptor from its fields and the address of the shared array (below 256 KiB, 1024-aligned)."""
    return (
        f"mov.u32 %r5, smem;\nshr.u32 %r5, %r5, 4;\ncvt.u64.u32 {register}, %r5;\n"
        f"add.u64 {register}, {register}, {fields};\n"
    )


def load_rows(pointer: str, first: int, count: int) -> str:
    """Registers first .. from the thread's row of an array [threads, count] of words."""
    lines = [f"mad.wide.u32 %d22, %r0, {4 * count}, {pointer};"]
    return "\n".join(lines + [f"ld.global.b32 %r{first + i}, [%d22+{4 * i}];" for i in range(count)]) + "\n"


def store_rows(pointer: str, first: int, count: int) -> str:
    lines = [f"mad.wide.u32 %d22, %r0, {4 * count}, {pointer};"]
    return "\n".join(lines + [f"st.global.b32 [%d22+{4 * i}], %r{first + i};" for i in range(count)]) + "\n"


def wgmma(shape: str, d: int, a: str, b: str, tail: str) -> str:
    return f"wgmma.mma_async.sync.aligned.{shape} {braces(D, d)}, {a}, {b}, {tail};\n"


COMMIT, WAIT = "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n"
DONE = COMMIT + WAIT


def run_wgmma(body: str, out: npt.NDArray[Any], *inputs: npt.NDArray[Any], shared: int, **options: Any) -> Result:
    return run_body(body, out, *inputs, shared=shared, threads=options.pop("threads", 128), alignment=1024, **options)


def matrix_of(words: npt.NDArray[np.uint32], n: int, dtype: Any) -> npt.NDArray[Any]:
    """[64, n] from the registers [128, count] of the accumulators."""
    matrix = np.zeros((64, n), dtype)
    matrix[d_index(n)] = np.ascontiguousarray(words).view(dtype)
    return matrix


def words_of(matrix: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """[128, count] registers of accumulators."""
    return np.ascontiguousarray(matrix[d_index(matrix.shape[1])]).view(np.uint32)
