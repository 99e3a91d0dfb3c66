"""Pipelines of asynchronous copies, as PTX text, from which tests take single instructions out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator import Result, run_kernel

HEADER = """.version 8.6
.target sm_90a
.address_size 64
.visible .entry kernel({params})
.reqntid {threads}, 1, 1
{{
.reg .pred %p<20>;
.reg .b16 %h<20>;
.reg .b32 %r<60>;
.reg .b64 %d<30>;
.shared .align 1024 .b8 smem[{shared}];
.shared .align 8 .b8 bars[256];
mov.u32 %r0, %tid.x;
shr.u32 %r1, %r0, 5;
setp.eq.u32 %p0, %r0, 0;
{body}
ret;
}}
"""


def kernel(
    body: str, *, params: str = ".param .u64 out, .param .u64 in0", threads: int = 32, shared: int = 4096
) -> str:
    """%r0 is the thread, %r1 its warp, %p0 whether it is thread 0; `smem` and `bars` are shared arrays."""
    return HEADER.format(params=params, threads=threads, shared=shared, body=body)


def run(
    body: str, *args: Any, seed: int | None = 0, grid: int = 1, max_blocks: int = 1_000_000, **options: Any
) -> Result:
    return run_kernel(kernel(body, **options), None, (grid, 1, 1), args, seed=seed, max_blocks=max_blocks)


INIT = """
@!%p0 bra READY;
{inits}
fence.mbarrier_init.release.cluster;
READY:
bar.sync 0;
"""

PIPELINE = """
ld.param.u64 %d0, [out];
ld.param.u64 %d1, [in0];
mov.u32 %r50, smem;
mov.u32 %r51, bars;
mov.u32 %r10, 0;
mov.u32 %r11, 0;
mov.u32 %r20, 0;
setp.eq.u32 %p1, %r1, 0;
@!%p1 bra CONSUMER;
elect.sync %r2|%p2, -1;
@!%p2 bra END;
mov.u32 %r12, 1;
PRODUCE:
mad.lo.u32 %r13, %r11, 8, %r51;
mad.lo.u32 %r14, %r11, {nbytes}, %r50;
EMPTY:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r13+64], %r12;
@!%p3 bra EMPTY;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r13], {nbytes};
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r14], [%d1], {nbytes}, [%r13];
add.s64 %d1, %d1, {nbytes};
add.u32 %r11, %r11, 1;
setp.eq.u32 %p4, %r11, {stages};
@%p4 mov.u32 %r11, 0;
@%p4 xor.b32 %r12, %r12, 1;
add.u32 %r10, %r10, 1;
setp.lt.u32 %p5, %r10, {steps};
@%p5 bra PRODUCE;
bra END;
CONSUMER:
mov.u32 %r12, 0;
sub.u32 %r15, %r0, 32;
rem.u32 %r16, %r15, {words};
shl.b32 %r16, %r16, 2;
CONSUME:
mad.lo.u32 %r13, %r11, 8, %r51;
mad.lo.u32 %r14, %r11, {nbytes}, %r50;
FULL:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r13], %r12;
@!%p3 bra FULL;
add.u32 %r17, %r14, %r16;
ld.shared.b32 %r18, [%r17];
mad.lo.u32 %r20, %r20, 3, %r18;
fence.acquire.cta;
bar.warp.sync -1;
elect.sync %r2|%p2, -1;
@%p2 mbarrier.arrive.shared::cta.b64 _, [%r13+64];
add.u32 %r11, %r11, 1;
setp.eq.u32 %p4, %r11, {stages};
@%p4 mov.u32 %r11, 0;
@%p4 xor.b32 %r12, %r12, 1;
add.u32 %r10, %r10, 1;
setp.lt.u32 %p5, %r10, {steps};
@%p5 bra CONSUME;
mad.wide.u32 %d2, %r15, 4, %d0;
st.global.b32 [%d2], %r20;
END:
"""


def pipeline(*, steps: int = 12, stages: int = 3, nbytes: int = 256, consumers: int = 2) -> str:
    """The body of a producer warp that fills stages by bulk copies, and of warps that fold what they find there."""
    inits = [f"mbarrier.init.shared::cta.b64 [bars+{8 * s}], 1;" for s in range(stages)]
    inits += [f"mbarrier.init.shared::cta.b64 [bars+{64 + 8 * s}], {consumers};" for s in range(stages)]
    text = INIT.format(inits="\n".join(inits)) + PIPELINE
    return text.format(nbytes=nbytes, stages=stages, steps=steps, words=nbytes // 4)


def pipeline_result(source: npt.NDArray[np.uint32], *, steps: int, nbytes: int, consumers: int) -> list[int]:
    words = source.reshape(steps, nbytes // 4)
    total = np.zeros(32 * consumers, np.uint32)
    for step in range(steps):
        total = total * np.uint32(3) + words[step][np.arange(32 * consumers) % (nbytes // 4)]
    return total.tolist()
