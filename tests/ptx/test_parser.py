"""The parser: a round trip with the printer, foreign PTX, and errors that name the line."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilus.errors import Loc, TilusError
from tilus.ptx.builder import Builder
from tilus.ptx.module import (
    Address,
    Comment,
    FloatImm,
    Guard,
    Imm,
    Instr,
    Kernel,
    Label,
    LabelRef,
    Module,
    Operand,
    Pair,
    Param,
    Reg,
    RegClass,
    SharedArray,
    Special,
    Symbol,
    TensorAddress,
    Vector,
)  # fmt: skip
from tilus.ptx.parser import parse, parse_source
from tilus.ptx.printer import print_module
from tilus.target import TARGETS

registers = st.builds(Reg, st.sampled_from(RegClass), st.integers(0, 20))
predicates = st.builds(Reg, st.just(RegClass.PRED), st.integers(0, 9))
immediates = st.builds(Imm, st.integers(-(1 << 63), (1 << 64) - 1))
floats = st.one_of(
    st.builds(FloatImm, st.integers(0, (1 << 32) - 1)), st.builds(FloatImm, st.integers(0, (1 << 64) - 1), st.just(64))
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_$]{0,8}", fullmatch=True).filter(lambda name: name != "_")
specials = st.sampled_from(["%tid.x", "%ctaid.z", "%laneid", "%lanemask_lt", "%clock64"]).map(Special)
operands: st.SearchStrategy[Operand] = st.one_of(
    registers,
    immediates,
    floats,
    specials,
    st.builds(Symbol, names),
    st.builds(Address, st.one_of(registers, st.builds(Symbol, names)), st.integers(-5000, 5000)),
    st.builds(Vector, st.lists(st.one_of(registers, immediates, floats), min_size=1, max_size=8).map(tuple)),
    st.builds(
        TensorAddress,
        st.one_of(registers, st.builds(Symbol, names)),
        st.builds(Vector, st.lists(st.one_of(registers, immediates), min_size=1, max_size=5).map(tuple)),
    ),
    st.builds(Pair, registers, st.one_of(predicates, st.just(Special("_")))),
    st.builds(Guard, predicates, st.just(True)),
)
locations = st.one_of(
    st.none(),
    st.builds(
        Loc, st.sampled_from(["a.py", "/x/b c.py"]), st.integers(1, 99), st.integers(1, 9), st.sampled_from([None, 12])
    ),
)
opcodes = st.sampled_from(
    ["add.s32", "ld.shared::cta.v4.b32", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "ret"]
)
instructions = st.builds(
    Instr,
    opcodes,
    st.lists(operands, max_size=5).map(tuple),
    st.one_of(st.none(), st.builds(Guard, predicates, st.booleans())),
    locations,
)
branches = st.builds(Instr, st.sampled_from(["bra", "bra.uni"]), st.builds(lambda n: (LabelRef(n),), names))
comments = st.builds(Comment, st.from_regex(r"[a-z][a-z ;{}.]{0,20}[a-z]", fullmatch=True))
items = st.one_of(instructions, branches, comments, st.builds(Label, names))
shared_arrays = st.builds(
    SharedArray, st.sampled_from(["smem", "dyn"]), st.integers(1, 4096), st.sampled_from([4, 16, 128]), st.booleans()
)
params = st.one_of(
    st.builds(Param, names, st.sampled_from(["u64", "s32", "f32", "b8"])),
    st.builds(Param, names, st.just("b8"), st.integers(1, 128), st.sampled_from([None, 64])),
)
limits = st.one_of(st.none(), st.integers(1, 8))


@st.composite
def modules(draw: st.DrawFn) -> Module:
    kernels = [
        Kernel(
            name,
            tuple(draw(st.lists(params, max_size=3))),
            tuple(draw(st.lists(items, max_size=12))),
            tuple(draw(st.lists(shared_arrays, max_size=2, unique_by=lambda array: array.name))),
            draw(st.integers(1, 1024)),
            draw(limits),
            draw(limits),
        )
        for name in ("first", "second")[: draw(st.integers(1, 2))]
    ]
    return Module(draw(st.sampled_from([*TARGETS.values()])), tuple(kernels))


@given(modules())
def test_print_of_parse_is_the_same_text(module: Module) -> None:
    text = print_module(module)
    assert print_module(parse(text)) == text


@given(modules())
def test_parse_of_print_is_the_same_module(module: Module) -> None:
    """Up to what text does not hold: end columns, repeated positions, sizes of launch-sized arrays, order of arrays."""
    parsed = parse(print_module(module))
    for kernel, other in zip(module.kernels, parsed.kernels, strict=True):
        position: Loc | None = None
        for item, back in zip(kernel.body, other.body, strict=True):
            if isinstance(item, Instr):
                assert isinstance(back, Instr)
                position = item.loc or position
                assert (back.opcode, back.operands, back.guard) == (item.opcode, item.operands, item.guard)
                assert (back.loc and str(back.loc)) == (position and str(position))
            else:
                assert back == item
        assert (kernel.name, kernel.params, kernel.num_threads) == (other.name, other.params, other.num_threads)
        assert (kernel.min_blocks_per_sm, kernel.max_registers) == (other.min_blocks_per_sm, other.max_registers)
        static = [array for array in kernel.shared if not array.dynamic]
        assert [array for array in other.shared if not array.dynamic] == static
    assert parsed.target is module.target


FOREIGN = """
//
// Generated by some other compiler
//
.version 7.8
.target sm_80, debug
.address_size 64
	/* a comment
	of two lines */
.extern .shared .align 16 .b8 buffer[];
.visible .entry saxpy(
	.param .u64 .ptr .global .align 16 saxpy_param_0,
	.param .align 64 .b8 saxpy_param_1[128],
	.param .f32 saxpy_param_2
)
.maxntid 128, 1, 1
.minnctapersm 2
{
	.reg .pred 	%p<3>;
	.reg .f32 	%f<6>;
	.reg .b32 	%r<5>;
	.reg .b16 	%rs<4>;
	.reg .b64 	%rd<7>, %base;
	.shared .align 4 .f32 tile[32][4];
	.loc	1 10 3, function_name $L__info_string0, inlined_at 1 20 5
$L__func_begin0:
	ld.param.u64 	%rd1, [saxpy_param_0];	// trailing comment
	mov.u32 	%r1, %tid.x;
	setp.ge.s32	%p1, %r1, 0x10;
	@%p1 bra 	$L__BB0_2;
	{
	.reg .b32 t;
	.reg .pred %p<2>;
	mov.b32 t, 0xFFFFFFFFU;
	setp.eq.s32 %p1, t, 0;
	add.s32 %r2, t, -1;
	$done: bar.sync 0;
	bra $done;
	}
	{ .reg .b32 t; mov.b32 t, 2; $done: bra $done; }
	fma.rn.f32 	%f1, %f2, 0f3F800000, 0d3FF0000000000000;
	mul.f32 	%f3, %f1, -1.5;
	mov.b32 	%r3, {%rs1,%rs2};
	ld.global.L1::no_allocate.v2.b32 {%r3, _}, [%rd1+-8];
	shfl.sync.bfly.b32 %r4|%p2, %r3, 1, 31, -1;
$L__BB0_2:
	st.shared.f32 [tile+16], %f3;
	mov.u32 %r1, buffer;
	ret;
}
	.section	.debug_abbrev
	{
.b8 1
	}
	.file	1 "/some/where/saxpy.cu", 1700000000, 1234
"""


def test_foreign_ptx() -> None:
    module = parse(FOREIGN)
    (kernel,) = module.kernels
    assert (module.target.name, kernel.num_threads, kernel.min_blocks_per_sm) == ("sm_80", 128, 2)
    assert kernel.params == (
        Param("saxpy_param_0", "u64"),
        Param("saxpy_param_1", "b8", 128, 64),
        Param("saxpy_param_2", "f32"),
    )
    assert {array.name: (array.nbytes, array.dynamic) for array in kernel.shared} == {
        "buffer": (0, True),
        "tile": (512, False),
    }
    body = [item for item in kernel.body if isinstance(item, Instr)]
    assert body[0].loc == Loc("/some/where/saxpy.cu", 10, 3)
    assert body[1].operands == (Reg(RegClass.B32, 1), Special("%tid.x"))
    assert body[2].operands[2] == Imm(16)
    assert body[4].operands[1] == Imm(0xFFFFFFFF)
    fma = next(item for item in body if item.opcode == "fma.rn.f32")
    assert fma.operands[2:] == (FloatImm(0x3F800000), FloatImm(0x3FF0000000000000, 64))
    assert next(item for item in body if item.opcode == "mul.f32").operands[2] == FloatImm(
        int(np.float64(-1.5).view(np.uint64)), 64
    )
    load = next(item for item in body if item.opcode.startswith("ld.global"))
    assert load.operands == (Vector((Reg(RegClass.B32, 3), Special("_"))), Address(body[0].operands[0], -8))
    labels = [item.name for item in kernel.body if isinstance(item, Label)]
    assert len(set(labels)) == len(labels) == 4


def test_registers_of_different_names_stay_different() -> None:
    """%f1, %r1 and the inner t and %p1 share register classes with others, but not an index."""
    body = [item for item in parse(FOREIGN).kernels[0].body if isinstance(item, Instr)]
    inner, outer = body[5].operands[0], body[2].operands[0]
    assert inner != outer
    seen = {
        "%r1": body[1].operands[0],
        "%r2": body[6].operands[0],
        "t": body[4].operands[0],
        "second t": body[9].operands[0],
    }
    assert len(set(seen.values())) == len(seen)
    assert all(isinstance(reg, Reg) and reg.cls is RegClass.B32 for reg in seen.values())


def test_lines_of_instructions() -> None:
    text = FOREIGN
    source = parse_source(text)
    lines = text.split("\n")
    for item, line in zip(source.module.kernels[0].body, source.lines["saxpy"], strict=True):
        if isinstance(item, Instr):
            assert item.opcode in lines[line - 1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("setp.ge.s32	%p1, %r1, 0x10;", "setp.ge.s32	%p1, %r1, 0x10", r"expected ';', found '@'"),
        ("%r1, %tid.x", "%r9, %tid.x", "register '%r9' is not declared"),
        (".reg .b32 t;", ".reg .b128 t;", "register of type '.b128', expected"),
        ("@%p1 bra", "@%r1 bra", "expected a declared predicate register, found '%r1'"),
        ("[%rd1+-8]", "[%rd1*8]", "unexpected character"),
        (".shared .align 4", ".tex .align 4", "unsupported directive '.tex'"),
        (".maxntid 128, 1, 1", ".maxntid 16, 16, 1", "expected a one-dimensional block"),
        (".target sm_80, debug", ".target tesla", "target 'tesla', expected sm_NN"),
        (".address_size 64", ".address_size 32", "address size 32, expected 64"),
        (".loc	1 10 3", ".loc	7 10 3", "names file 7, expected one of"),
    ],
)
def test_errors_name_the_line(old: str, new: str, message: str) -> None:
    text = FOREIGN.replace(old, new, 1)
    line = 1 + text[: text.index(new)].count("\n")
    with pytest.raises(TilusError, match=message) as caught:
        parse(text)
    number = int(str(caught.value).partition("PTX line ")[2].partition(":")[0])
    assert line <= number <= line + 1


def test_truncated_text_is_an_error_wherever_it_is_cut() -> None:
    whole = FOREIGN.rstrip().rpartition("ret;")[0]
    for end in range(whole.index(".visible") + 10, len(whole), 7):
        with pytest.raises(TilusError):
            parse(whole[:end])


def test_two_thousand_lines_parse_in_less_than_150_ms() -> None:
    builder = Builder()
    for index in range(400):
        builder.loc = Loc("kernel.py", index + 1, 5)
        value = builder.emit("mad.lo.s32", builder.const(index), Imm(-5), builder.const(7))
        wide = builder.emit("mul.wide.u32", value, Imm(4))
        builder.emit("ld.global.nc.v4.b32", Address(wide, 16))
        builder.emit_to("st.shared.v2.b32", Address(Symbol("smem"), 4 * index), Vector((value, value)))
    kernel = Kernel("big", (Param("x", "u64"),), builder.finish(), (SharedArray("smem", 4096),), 128)
    text = print_module(Module(TARGETS["sm_90a"], (kernel,)))
    assert text.count("\n") >= 2000
    best = min(_cpu_seconds(text) for _ in range(3))
    assert best < 0.15
    assert print_module(parse(text)) == text


def _cpu_seconds(text: str) -> float:
    start = time.process_time()
    parse(text)
    return time.process_time() - start
