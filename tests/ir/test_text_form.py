"""The text form: what is printed parses to the same program, and mistakes in a text are shown where they are."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from random_programs import Programs

from tilus.compiler import compile_function
from tilus.errors import Loc, TilusError
from tilus.instructions import INSTRUCTIONS
from tilus.ir import parser
from tilus.ir.expr import Expr, Var
from tilus.ir.function import Function
from tilus.ir.printer import print_function
from tilus.ir.stmt import Inst, Seq
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.ir.visit import instructions
from tilus.layout import RegisterLayout, SharedLayout
from tilus.target import get_target
from tilus.transforms import PIPELINE, run_pipeline

AXPY = """\
# y = a * x + y
kernel axpy(
  %x: global f16[%n] strides[1] align 16,
  %y: global f32[%n] strides[1] align 16,
  %a: f32
) where %n: int32 >= 0 % 16 grid((%n + 1023) // 1024) warps(4) {
  %xs: f16[1024] in spatial(128).local(8) = load(src=%x, offsets=[block_id(0) * 1024], dims=[0], checked=true)
  %xf: f32[1024] = cast(src=%xs)
  %as: f32[1] = full(value=%a)
  %ax: f32[1024] = binary(op="*", lhs=%as, rhs=%xf)
  %ys: f32[1024] = load(src=%y, offsets=[block_id(0) * 1024], dims=[0])
  mut %acc: f32[1024] = assign(src=%ys)
  mut %i: int32 = 0
  for %k: int32 >= 0 in range(0, %n, 64) unroll 2 {
    if %k < 128 and not(%i == 3) {
      %sum: f32[1024] = binary(op="+", lhs=%acc, rhs=%ax)
      %acc = assign(src=%sum)
      %i = %i + 1
    } else {
      break
    }
  }
  while %i > 0 {
    %i = %i - 2
    continue
  }
  store(dst=%y, src=%acc, offsets=[block_id(0) * 1024], dims=[0])
}
"""


def parse(text: str, **options: Any) -> Function:
    return parser.parse_function(text, INSTRUCTIONS, **options)


def same(f: Any, g: Any, pairs: dict[Any, Any]) -> bool:
    """Whether two programs differ only in which objects (one for one) and names stand for their values."""
    if isinstance(f, (Var, RegisterTensor, SharedTensor, GlobalTensor)):
        if type(f) is not type(g):
            return False
        if not isinstance(f, GlobalTensor):  # of views only the contents matter
            if (f in pairs or g in pairs.values()) and pairs.get(f) is not g:
                return False
            pairs[f] = g
        if isinstance(f, GlobalTensor) and (
            f.base.name != g.base.name or pairs.setdefault(f.base, g.base) is not g.base
        ):
            return False
        names = [field.name for field in dataclasses.fields(f) if field.name not in ("name", "base", "origin")]
        return all(same(getattr(f, name), getattr(g, name), pairs) for name in names)
    if isinstance(f, Seq) and isinstance(g, Seq):
        return same(flat(f), flat(g), pairs)
    if isinstance(f, Loc) or isinstance(g, Loc):
        return True
    if isinstance(f, (RegisterLayout, SharedLayout)):
        return f == g
    if dataclasses.is_dataclass(f):
        names = [field.name for field in dataclasses.fields(f) if field.name != "loc"]
        return type(f) is type(g) and all(same(getattr(f, n), getattr(g, n), pairs) for n in names)
    if isinstance(f, tuple):
        return isinstance(g, tuple) and len(f) == len(g) and all(same(a, c, pairs) for a, c in zip(f, g, strict=True))
    return type(f) is type(g) and repr(f) == repr(g)


def flat(seq: Seq) -> tuple[Any, ...]:
    return tuple(x for child in seq.stmts for x in (flat(child) if isinstance(child, Seq) else (child,)))


@given(st.randoms(use_true_random=False))
def test_printing_and_parsing_is_the_identity(rng: random.Random) -> None:
    program = Programs(rng).function()
    text = print_function(program)
    again = parse(text)
    assert print_function(again) == text
    assert same(program, again, {})


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mnemonic", INSTRUCTIONS)
def test_every_instruction(mnemonic: str) -> None:
    """No instruction is left to chance."""
    for seed in range(10):
        programs = Programs(random.Random(f"{mnemonic}{seed}"))
        program = programs.function()
        body = Seq((program.body, Inst(programs.instruction(INSTRUCTIONS[mnemonic]))))
        program = dataclasses.replace(program, body=body)
        again = parse(print_function(program))
        assert same(program, again, {})
        assert [type(s.inst) for s in instructions(again.body)][-1] is INSTRUCTIONS[mnemonic]


def test_the_law_can_fail() -> None:
    """The comparison sees a changed constant, a changed layout and two variables that became one."""
    program = parse(AXPY)
    for old, new in (
        ("1023", "1022"), ("spatial(128).local(8)", "local(8).spatial(128)"), ("lhs=%acc", "lhs=%ax"),
        ("unroll 2", "unroll 4"), ("% 16", "% 8"), ("%i > 0", "%n > 0"), ("checked=true", "checked=false"),
        ("f16", "bf16"), ("strides[1] align 16,\n  %y", "strides[1] align 8,\n  %y"), ("mut %i", "%i"), ("break", "return"),
    ):  # fmt: skip
        changed = AXPY.replace(old, new)
        assert changed != AXPY
        if old == "mut %i":
            changed = changed.replace("%i = %i + 1", "").replace("%i = %i - 2", "")
        assert not same(program, parse(changed), {}), old


def test_a_program_compiles_to_the_same_text_at_every_stage() -> None:
    program = parse(AXPY)
    target = get_target("sm_90a")
    ptx = compile_function(program, target).ptx
    assert compile_function(parse(print_function(program)), target).ptx == ptx
    for step in PIPELINE:
        stage = run_pipeline(program, target, after=step.name)
        text = print_function(stage)
        again = parse(text)
        assert print_function(again) == text
        assert same(stage, again, {})
    assert compile_function(again, target).ptx == ptx


def test_what_is_printed() -> None:
    """Names, layouts, views and precedence as a reader expects them."""
    text = """\
kernel f(
  %x: global f16[%n, 64] strides[64, 1] align 16
) where %n: int32 >= 0 grid(%n) warps(1) {
  shared %s: f16[64] in row_major((64,))
  %i: int32 = load_scalar(src=%x as f16[64] strides[1] offset block_id(0) * 64 align 16, index=[0])
  %t: f16[64] in spatial(32).local(2) = full(value=%i)
  store_shared(dst=%s, src=%t, offsets=[0], dims=[0])
  %j: int32 = (%n - 1) * 2 - (3 - %n) // int32(int64(%n)) + min(%n, 4)
  %c: boolean = (%n < 3) == (%j < 4) or %n << 2 + %j > -5
}
"""
    assert print_function(parse(text)) == text


def test_views_are_shared() -> None:
    """Equal views are one object, so that what is known of one holds for all uses."""
    text = """
    kernel f(%x: global f16[4, 64] strides[64, 1] align 16) grid(1) warps(1) {
      %t: f16[64] = load(src=%x as f16[64] strides[1] offset 64 align 16, offsets=[0], dims=[0])
      store(dst=%x as f16[64] strides[1] offset 64 align 16, src=%t, offsets=[0], dims=[0])
    }"""
    load, store = (s.inst for s in instructions(parse(text).body))
    assert load.operands[0] is store.operands[0]


def test_locations_in_the_text() -> None:
    program = parse(AXPY, file="axpy.tir", locations=True)
    first = next(iter(instructions(program.body)))
    assert first.loc == Loc("axpy.tir", 7, 3)
    assert next(iter(instructions(parse(AXPY).body))).loc is None


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("%xs: f16", "%xs f16", 7, r"found 'f16', expected .*:"),
        ("warps(4) {", "warps(4)", 7, r"expected blocks_per_sm, cluster, ends_alone, \{"),
        ("store(", "stor(", 27, "unknown instruction stor"),
        (
            "load(src=%y",
            "load(dst=%y",
            11,
            "load has no field dst, or has it already; expected out, src, offsets, dims, checked",
        ),
        ("src=%xs", "src=%xss", 8, "unknown name %xss"),
        ("f16[1024]", "f17[1024]", 7, "unknown data type f17"),
        ("spatial(128).local(8)", "spatial(128).locl(8)", 7, "is not part of a layout expression"),
        ("spatial(128).local(8)", "spatial(0).local(8)", 7, "expected positive extents"),
        (
            "dims=[0], checked=true",
            "dims=[true], checked=true",
            7,
            r"dims of load is \[True\], expected tuple\[int, ...\]",
        ),
        ("lhs=%as", "lhs=%a", 10, "lhs of binary is a, expected RegisterTensor"),
        ('op="*"', "op=3", 10, "op of binary is 3, expected str"),
        ("%xf: f32[1024] =", "", 8, "cast has 1 results, found 0 names in front of it"),
        ("%xf: f32[1024] =", "%xf =", 8, "unknown name %xf"),
        ("mut %acc", "%acc", 17, "%acc is assigned a second time"),
        ("mut %i: int32 = 0", "%x: int32 = 0", 13, "%x is declared a second time"),
        ("%k < 128", "%k < %xs", 15, "%xs is a tensor, expected a scalar"),
        ("not(%i == 3)", "no(%i == 3)", 15, "no function no of 1 scalars"),
        ("%i > 0", "3 // 0 > %i", 23, "this constant has no value"),
        ("%i = %i + 1", "%acc = %i + 1", 18, "%acc is a tile, expected a scalar on the left"),
        ("src=%x,", "src=%x as f16[2] strides[] align 16,", 7, "0 strides of a tensor of rank 1"),
        ("range(0, %n, 64)", "range(0, %n, 1.5)", 14, "found 1.5, expected an integer"),
        ("%i = %i - 2", "%i = yes", 24, "found yes, expected a value"),
        ("lhs=%as, ", "", 10, "missing 1 required positional argument"),
    ],
)
def test_mistakes_have_a_place(old: str, new: str, line: int, message: str) -> None:
    text = AXPY.replace(old, new, 1)
    assert text != AXPY
    with pytest.raises(TilusError, match=message) as caught:
        parse(text, file="axpy.tir")
    assert caught.value.loc is not None
    assert (caught.value.loc.file, caught.value.loc.line) == ("axpy.tir", line)
    assert f"line {line}, column {caught.value.loc.column}" in caught.value.message


def test_cut_texts_never_crash() -> None:
    """Every prefix of a program is refused, with a place in it."""
    for length in range(len(AXPY.rstrip())):
        with pytest.raises(TilusError, match=r"line \d+, column \d+: ") as caught:
            parse(AXPY[:length])
        assert caught.value.loc is not None
        assert 1 <= caught.value.loc.line <= AXPY[:length].count("\n") + 1


@example(damage="\n", place=AXPY.index('"') + 1)
@example(damage="\\q", place=AXPY.index('"') + 1)
@given(
    damage=st.text(alphabet=st.sampled_from('%xk(){}[]=:,. "0123-+*/<>ain\n#'), max_size=40),
    place=st.integers(0, len(AXPY)),
)
def test_damaged_texts_never_crash(damage: str, place: int) -> None:
    try:
        parse(AXPY[:place] + damage + AXPY[place:])
    except TilusError as error:
        assert error.loc is not None


def test_a_foreign_pointer_has_no_text() -> None:
    program = parse(AXPY)
    body = program.body
    with pytest.raises(TilusError, match="is no parameter of axpy"):
        print_function(dataclasses.replace(program, params=program.params[1:], body=body))


def test_expressions_are_values() -> None:
    """Parsed expressions equal built ones: nothing is folded further and no type is lost."""
    rng = random.Random(0)
    for _ in range(300):
        programs = Programs(rng)
        program = programs.function()
        for ours, theirs in zip(program.grid, parse(print_function(program)).grid, strict=True):
            assert isinstance(theirs, Expr)
            assert ours.dtype == theirs.dtype
