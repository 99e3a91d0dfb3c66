"""The check of machine code finds loads that are on their way, over loops and branches, and no others."""

from __future__ import annotations

import pytest
import scoreboards

from tilus.ptx.assembler import assemble
from tilus.target import get_target

pytestmark = pytest.mark.slow

HEAD = """.version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 out, .param .u32 n)
.reqntid 128, 1, 1
{
.reg .b32 %r<20>;
.reg .b64 %d<4>;
.reg .pred %p<6>;
.shared .align 16 .b8 s[4096];
.shared .align 8 .b8 bar[64];
ld.param.u64 %d0, [out];
ld.param.u32 %r9, [n];
mov.u32 %r5, %tid.x;
mul.wide.u32 %d1, %r5, 4;
add.u64 %d0, %d0, %d1;
shl.b32 %r6, %r5, 4;
mov.u32 %r0, s;
add.u32 %r0, %r0, %r6;
mov.u32 %r10, bar;
mov.u32 %r1, 0;
setp.lt.u32 %p1, %r5, %r9;
"""
LOAD, USE = "ld.shared.b32 %r1, [%r0];\n", "st.volatile.global.b32 [%d0], %r1;\n"
MATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0];\n"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r10];\n"
COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%d0], 16, [%r10];\n"
FENCE = "fence.acquire.cta;\n"


def loop(body: str) -> str:
    return f'LOOP:\n.pragma "nounroll";\n{body}add.u32 %r9, %r9, -1;\nsetp.ne.u32 %p2, %r9, 0;\n@%p2 bra LOOP;\n'


def branch(body: str) -> str:
    return f"@%p1 bra SKIP;\n{body}SKIP:\n"


FOUND = {
    "in a row": LOAD + ARRIVE + USE,
    "matrices": MATRIX + ARRIVE + USE,
    "in front of a copy": LOAD + COPY + USE,
    "behind a barrier": LOAD + "bar.sync 0;\n" + ARRIVE + USE,
    "from the trip before": loop(ARRIVE + USE + LOAD),
    "from in front of a loop": LOAD + loop(ARRIVE) + USE,
    "from a branch": branch(LOAD) + "bar.sync 0;\n" + ARRIVE + USE,
}
NOT_FOUND = {
    "used": LOAD + USE + ARRIVE,
    "fenced": LOAD + FENCE + ARRIVE + USE,
    "matrices": MATRIX + FENCE + ARRIVE + USE,
    "fenced in front of a copy": LOAD + FENCE + COPY + USE,
    "behind the arrival": ARRIVE + LOAD + USE,
    "from the trip before": loop(FENCE + ARRIVE + USE + LOAD),
    "from a branch": branch(LOAD) + FENCE + ARRIVE + USE,
}


def under_way(body: str) -> list[str]:
    found = scoreboards.loads_under_way(assemble(HEAD + body + "ret;\n}\n", get_target("sm_90a")).cubin)
    return [str(one) for one in found]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    found = under_way(FOUND[name])
    assert found
    assert all("LDS" in line and " is under way at " in line for line in found)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NOT_FOUND)
def test_not_found(name: str) -> None:
    assert under_way(NOT_FOUND[name]) == []
