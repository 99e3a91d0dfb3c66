"""Disassembly: counts against nvdisasm's JSON, which is another printer; loops against kernels built to have them."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tilus.errors import TilusError
from tilus.ptx import toolchain
from tilus.ptx.assembler import assemble
from tilus.ptx.sass import SassInstruction, disassemble, find_disassembler, instruction_mix, parse
from tilus.target import TARGETS, Target

pytestmark = pytest.mark.slow


def module(target: Target) -> str:
    """Two kernels: `nest`, a rolled loop in a rolled loop, and `flat`, without loops."""
    version = "{}.{}".format(*max(target.ptx_version, (8, 0)))
    return f""".version {version}
.target {target.name}
.address_size 64
.visible .entry nest(.param .u64 x, .param .u32 n)
.reqntid 128, 1, 1
{{
    .reg .b16 %h<2>;
    .reg .b32 %r<16>;
    .reg .b64 %d<4>;
    .reg .pred %p<4>;
    .shared .align 16 .b8 s[1024];
    ld.param.u64 %d0, [x];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, 0;
    mov.u32 %r10, s;
    mov.b16 %h0, 3;
OUTER:
    .pragma "nounroll";
    mov.u32 %r3, 0;
    bar.sync 0;
INNER:
    .pragma "nounroll";
    ld.volatile.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d0];
    ld.volatile.shared.v2.u32 {{%r11, %r12}}, [%r10];
    st.volatile.shared.u32 [%r10], %r5;
    fma.rn.f32 %r8, %r4, %r11, %r6;
    st.volatile.global.u16 [%d0], %h0;
    st.volatile.global.u32 [%d0], %r8;
    st.volatile.global.u32 [%d0+4], %r12;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p0, %r3, %r1;
    @%p0 bra INNER;
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, %r1;
    @%p1 bra OUTER;
    ret;
}}
.visible .entry flat(.param .u64 x)
.reqntid 128, 1, 1
{{
    .reg .b32 %r<12>;
    .reg .b64 %d<2>;
    .shared .align 16 .b8 s[1024];
    ld.param.u64 %d0, [x];
    mov.u32 %r0, s;
    cp.async.cg.shared.global [%r0], [%d0], 16;
    cp.async.wait_all;
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r0];
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r5, %r6}}, [%r0+512];
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%r7, %r8, %r9, %r10}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}},
        {{%r1, %r2, %r3, %r4}};
    st.global.v4.b32 [%d0], {{%r7, %r8, %r9, %r10}};
    ret;
}}
"""


def opcodes_by_json(cubin: bytes, directory: Path) -> dict[str, Counter[str]]:
    """Full opcodes of each function, from `nvdisasm -json`."""
    path = directory / "k.cubin"
    path.write_bytes(cubin)
    command = [find_disassembler().path, "-c", "-json", path]
    _, functions = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    found: list[dict[str, Any]] = functions
    return {f["function-name"]: Counter(i["opcode"] for i in f["sass-instructions"]) for f in found}


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_every_instruction_is_found(target: Target, tmp_path: Path) -> None:
    cubin = assemble(module(target), target).cubin
    kernels = disassemble(cubin)
    assert {k.name: Counter(i.opcode for i in k.instructions) for k in kernels} == opcodes_by_json(cubin, tmp_path)
    for kernel in kernels:
        steps = {b.address - a.address for a, b in zip(kernel.instructions, kernel.instructions[1:])}
        assert steps == {16} and kernel.instructions[0].address == 0


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_the_innermost_loop_and_its_mix(target: Target) -> None:
    nest, flat = sorted(disassemble(assemble(module(target), target).cubin), key=lambda k: k.name, reverse=True)
    loop = nest.innermost_loop()
    mix = instruction_mix(loop)
    expected = {"LDG.128": 1, "LDS.64": 1, "STS.32": 1, "STG.16": 1, "STG.32": 2, "FFMA": 1, "BRA": 1, "BAR": 0}
    assert {kind: mix[kind] for kind in expected} == expected
    assert loop[-1].opcode.startswith("BRA")
    whole = instruction_mix(nest.instructions)
    assert whole["BAR"] == 1 and whole["LDG.128"] == 1  # the barrier is in the outer loop only
    assert flat.innermost_loop() == ()


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_classes_of_a_tensor_core_kernel(target: Target) -> None:
    kernels = {k.name: k for k in disassemble(assemble(module(target), target).cubin)}
    mix = instruction_mix(kernels["flat"].instructions)
    expected = {"HMMA": 1, "LDSM.4": 1, "LDSM.2": 1, "LDGSTS.128": 1, "STG.128": 1, "BAR": 1, "NOP": 0}
    assert {kind: mix[kind] for kind in expected} == expected


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("LDG.E", "LDG.32"),
        ("LDG.E.U8.CONSTANT", "LDG.8"),
        ("LDG.E.128.STRONG.SYS", "LDG.128"),
        ("LDSM.16.MT88.4", "LDSM.4"),
        ("LDSM.16.M88", "LDSM.1"),
        ("IMAD.MOV.U32", "IMAD.MOV"),
        ("IMAD.WIDE.U32", "IMAD"),
        ("HFMA2.MMA", "HFMA2"),
        ("LOP3.LUT", "LOP3"),
        ("PRMT", "PRMT"),
    ],
)
def test_kind(opcode: str, kind: str) -> None:
    assert SassInstruction(0, "", opcode, "").kind == kind


def test_the_deepest_loop_wins_then_the_longest() -> None:
    text = """
.text.k:
.L_x_0:
        /*0000*/                   NOP;
.L_x_1:
        /*0010*/                   FADD R0, R0, R1 ;
.L_x_2:
        /*0020*/              @!P0 FMUL R0, R0, R1 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   FFMA R0, R0, R1, R2 ;
        /*0050*/                   MUFU.EX2 R0, R0 ;
        /*0060*/               @P1 BRA `(.L_x_3) ;
        /*0070*/              @UP0 BRA `(.L_x_1) ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""
    (kernel,) = parse(text)
    assert [i.opcode for i in kernel.innermost_loop()] == ["FFMA", "MUFU.EX2", "BRA"]
    assert kernel.instructions[2].predicate == "@!P0" and kernel.instructions[7].predicate == "@UP0"
    assert str(kernel.instructions[2]) == "0020:  @!P0 FMUL R0, R0, R1"


def test_a_missing_disassembler_and_a_bad_cubin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(TilusError, match=r"nvdisasm .* failed: "):
        disassemble(b"no cubin")
    monkeypatch.setattr(toolchain, "_package_dirs", lambda package: [])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(TilusError, match=r"(?s)no disassembler found.*pip install 'tilus\[sass\]'"):
        find_disassembler()
