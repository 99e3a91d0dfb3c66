"""A whole product on the emulator as kernels for this target are written: a warp that loads tiles by tensor copies, two
warpgroups that multiply them, mbarriers in between; and what goes wrong when one instruction of it is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wgmma_kernels import COMMIT, D, braces, matrix_of, store_rows

from tilus.ptx.module import Module
from tilus.runtime.emulator import EmulatorError, TensorMap, run_kernel

M, N, TILE, STAGES, TILES = 128, 32, 64, 2, 5
ROW = 2 * TILE  # bytes of a row of a tile: one row of the 128-byte swizzle
STAGE = (M + N) * ROW
HEADER = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out, .param .u64 in0, .param .u64 in1, .param .align 64 .b8 map_a[128],
 .param .align 64 .b8 map_b[128])
.reqntid 288, 1, 1
{{
.reg .pred %p<20>;
.reg .b32 %r<200>;
.reg .b64 %d<60>;
.shared .align 1024 .b8 smem[{shared}];
.shared .align 8 .b8 bars[{bars}];
ld.param.u64 %d0, [out];
mov.u32 %r0, %tid.x;
shr.u32 %r1, %r0, 5;
mov.u32 %r50, smem;
mov.u32 %r51, bars;
setp.eq.u32 %p0, %r0, 0;
@!%p0 bra READY;
{inits}fence.mbarrier_init.release.cluster;
READY:
bar.sync 0;
setp.eq.u32 %p1, %r1, 8;
@%p1 bra PRODUCER;
{consumer}bra END;
PRODUCER:
elect.sync %r2|%p2, -1;
@!%p2 bra END;
mov.b64 %d20, map_a;
cvta.param.u64 %d21, %d20;
mov.b64 %d22, map_b;
cvta.param.u64 %d23, %d22;
{producer}END:
ret;
}}
"""
EMPTY = 8 * STAGES  # offset of the second row of mbarriers


def wait(barrier: int, parity: int, label: str) -> str:
    return f"{label}:\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r51+{barrier}], {parity};\n@!%p3 bra {label};\n"


def producer() -> str:
    text = ""
    for tile in range(TILES):
        stage, turn = tile % STAGES, tile // STAGES
        text += wait(EMPTY + 8 * stage, (turn + 1) & 1, f"EMPTY{tile}")
        text += f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r51+{8 * stage}], {STAGE};\n"
        for name, offset in (("%d21", 0), ("%d23", M * ROW)):
            text += f"mov.u32 %r10, {TILE * tile};\nmov.u32 %r11, 0;\n"
            text += "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            text += f"[%r50+{STAGE * stage + offset}], [{name}, {{%r10, %r11}}], [%r51+{8 * stage}];\n"
    return text


def consumer() -> str:
    """Each warpgroup multiplies 64 rows; the last but one group of products may be in flight when a stage is given back."""
    fields = 64 << 32 | 1 << 62  # stride of 1024 bytes, swizzle of 128
    text = "shr.u32 %r3, %r1, 2;\nshl.b32 %r3, %r3, 13;\nadd.u32 %r3, %r3, %r50;\n"  # + 64 rows a warpgroup
    for register, base in (("%d10", "%r3"), ("%d11", "%r50")):
        text += f"shr.u32 %r4, {base}, 4;\ncvt.u64.u32 {register}, %r4;\nadd.u64 {register}, {register}, {fields};\n"
    for tile in range(TILES):
        stage, turn = tile % STAGES, tile // STAGES
        text += wait(8 * stage, turn & 1, f"FULL{tile}") + "wgmma.fence.sync.aligned;\n"
        for step in range(4):
            a, b = STAGE * stage + 32 * step, STAGE * stage + M * ROW + 32 * step
            text += f"add.u64 %d12, %d10, {a >> 4};\nadd.u64 %d13, %d11, {b >> 4};\n"
            text += f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.f16.f16 {braces(D, N // 2)}, %d12, %d13, "
            text += f"{int(tile + step > 0)}, 1, 1, 0, 0;\n"
        text += COMMIT + f"wgmma.wait_group.sync.aligned 0; // {tile}\n"
        text += f"elect.sync %r2|%p2, -1;\n@%p2 mbarrier.arrive.shared::cta.b64 _, [%r51+{EMPTY + 8 * stage}];\n"
    return text + store_rows("%d0", D, N // 2)


def text() -> str:
    inits = "".join(f"mbarrier.init.shared::cta.b64 [%r51+{8 * s}], 1;\n" for s in range(STAGES))
    inits += "".join(f"mbarrier.init.shared::cta.b64 [%r51+{EMPTY + 8 * s}], 8;\n" for s in range(STAGES))
    return HEADER.format(shared=STAGES * STAGE, bars=16 * STAGES, inits=inits, consumer=consumer(), producer=producer())


def run(source: str | Module, seed: int | None, swizzle: int = 128) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, (rows, TILE * TILES)).astype(np.float16) for rows in (M, N))
    maps = [
        TensorMap(param, 0, 2, 2, swizzle, (TILE * TILES, rows), (2 * TILE * TILES,), (swizzle // 2, rows))
        for param, rows in ((1, M), (2, N))
    ]
    out = np.zeros((256, N // 2), np.uint32)
    run_kernel(source, None, (1, 1, 1), [out, a, b, *maps], seed=seed)
    got = np.concatenate([matrix_of(out[128 * g : 128 * g + 128], N, np.float32) for g in range(2)])
    return got, a.astype(np.float64) @ b.astype(np.float64).T


@pytest.mark.parametrize("seed", [None, *range(6)])
def test_the_kernel(seed: int | None) -> None:
    got, want = run(text(), seed)
    assert got.tolist() == want.tolist()


EXPECT = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r51+0], {STAGE};\n"


def without(part: str) -> str:
    """Of what stands there for every tile of a stage, the first one goes."""
    assert text().count(part) == (-(-TILES // STAGES) if part == EXPECT else 1), part
    return text().replace(part, "", 1)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (wait(8, 0, "FULL1"), r"in flight|uninitialised|race"),
        (wait(EMPTY, 0, "EMPTY2"), r"race|in flight|orders it after|more arrivals"),
        ("wgmma.wait_group.sync.aligned 0; // 0\n", r"race: writes shared memory|in flight|is still"),
        ("wgmma.wait_group.sync.aligned 0; // 4\n", r"still in flight"),
        (EXPECT, r"lacks|bytes more than expected"),
        ("fence.mbarrier_init.release.cluster;\n", r"not visible to the asynchronous proxy"),
        ("bar.sync 0;\n", r"mbarrier"),
    ],
)  # fmt: skip
def test_the_kernel_without_one_instruction(part: str, message: str) -> None:
    wrong = without(part)
    for seed in (None, *range(4)):
        with pytest.raises(EmulatorError, match=message):
            run(wrong, seed)


def test_tensor_maps_and_descriptors_name_the_same_swizzle() -> None:
    """Tiles of 64-byte rows, half as many bytes, read as if they had 128."""
    halves = text().replace(f"], {STAGE};", f"], {STAGE // 2};")
    for seed in (None, 0, 1):
        with pytest.raises(
            EmulatorError, match=r"with a swizzle of 128 bytes, expected that of the tensor copy into it, 64"
        ):
            run(halves, seed, swizzle=64)
