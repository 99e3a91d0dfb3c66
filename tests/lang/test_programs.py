"""What Python says is what happens: random programs mean in a kernel what Python makes of the same text.

The text is run by CPython once per block, with numbers and tuples of numbers, and as a kernel by the reference and as C.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written import write

import tilus

pytestmark = pytest.mark.slow

BLOCKS, WIDTH, SCALARS, TILES = 3, 4, 5, 2

HEADER = """
class Box:
    def __init__(self, a):
        self.a = a
        self.n = 0

    def bump(self, x):
        self.n += 1
        if x > self.a:
            self.a = x % 31
        return self.a + self.n

    @property
    def both(self):
        return self.a + self.n

def helper(x, y):
    x = x + 1
    for j in rng(y % 3):
        x += j * y
    return x % 53

def twice(f, x):
    return f(f(x) % 19)
"""

KERNEL = """
@tilus.kernel
def program(out: tilus.Tensor[tilus.int32, "n"], p: tilus.int32, q: int):
    tilus.grid({blocks}, warps=1)
    b = tilus.block_id(0)
    t0 = tilus.arange({width})
    t1 = tilus.full([{width}], b, tilus.int32)
{body}
    for index, value in enumerate((s0, s1, s2, c0, o.a)):
        tilus.store(out, [b * {size} + index], tilus.full([1], value, tilus.int32))
    for index, tile in enumerate((t0, t1)):
        tilus.store(out, [b * {size} + {scalars} + index * {width}], tile)
"""

PYTHON = """
def program(p, q, b, t0, t1):
{body}
    return s0, s1, s2, c0, o.a, *t0, *t1
"""

INIT = ["s0 = b", "s1 = p", "s2 = q - b", "c0 = 2", "o = Box(p % 7)"]


class Vec(tuple[int, ...]):
    """The tile of the oracle: a value with elementwise operators."""

    def _with(self, other: Vec | int, op: object) -> Vec:
        others = other if isinstance(other, Vec) else (int(other),) * len(self)
        return Vec(op(a, c) for a, c in zip(self, others, strict=True))  # type: ignore[operator]

    def __add__(self, other: Vec | int) -> Vec:  # type: ignore[override]
        return self._with(other, lambda a, c: a + c)

    def __sub__(self, other: Vec | int) -> Vec:
        return self._with(other, lambda a, c: a - c)

    def __rsub__(self, other: int) -> Vec:
        return self._with(other, lambda a, c: c - a)

    def __mul__(self, other: Vec | int) -> Vec:  # type: ignore[override]
        return self._with(other, lambda a, c: a * c)

    __radd__, __rmul__ = __add__, __mul__

    def __mod__(self, other: int) -> Vec:
        return self._with(other, lambda a, c: a % c)


ATOMS = ["s0", "s1", "s2", "c0", "o.a", "o.n", "o.both", "b", "p", "q", "-3", "0", "1", "7", "True"]


@st.composite
def scalar(draw: st.DrawFn, depth: int = 2, k: str | None = None) -> str:
    atoms = [*ATOMS, k] if k else ATOMS
    if depth == 0:
        return draw(st.sampled_from(atoms))

    def sub() -> str:
        return draw(scalar(depth=depth - 1, k=k))

    match draw(st.integers(0, 11)):
        case 0 | 1 | 2:
            return f"({sub()} {draw(st.sampled_from(['+', '-', '*']))} {sub()})"
        case 3:
            return f"({sub()} {draw(st.sampled_from(['//', '%']))} {draw(st.sampled_from(['3', '-4', '5']))})"
        case 4:
            return f"({sub()} // s1 if s1 != 0 else {sub()})"
        case 5:
            return f"{draw(st.sampled_from(['min', 'max']))}({sub()}, {sub()})"
        case 6:
            return f"({sub()} if {draw(condition(depth=1, k=k))} else {sub()})"
        case 7:
            return f"abs(-{sub()})"
        case 8:
            return f"helper({sub()} % 11, {sub()} % 5)"
        case 9:
            return f"twice(lambda x: x + {sub()}, {sub()} % 17)"
        case 10:
            return f"divmod({sub()}, 6)[{draw(st.integers(0, 1))}]"
        case _:
            return f"[{sub()}, {sub()}][c % 2]" if draw(st.booleans()) else f"sum(({sub()}, {sub()}, 1))"


@st.composite
def condition(draw: st.DrawFn, depth: int = 2, k: str | None = None) -> str:
    def number() -> str:
        return draw(scalar(depth=1, k=k))

    compare = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
    match draw(st.integers(0, 5 if depth else 2)):
        case 0 | 1:
            return f"({number()} {draw(compare)} {number()})"
        case 2:
            return f"({number()} {draw(compare)} {number()} {draw(compare)} {number()})"
        case 3:
            return f"({draw(condition(depth=depth - 1, k=k))} and {draw(condition(depth=depth - 1, k=k))})"
        case 4:
            return f"({draw(condition(depth=depth - 1, k=k))} or {draw(condition(depth=depth - 1, k=k))})"
        case _:
            return f"(not {number()})"


@st.composite
def tile(draw: st.DrawFn, k: str | None = None) -> str:
    a, c = draw(st.sampled_from(["t0", "t1"])), draw(st.sampled_from(["t0", "t1"]))
    match draw(st.integers(0, 3)):
        case 0:
            return a
        case 1:
            return f"(({a} {draw(st.sampled_from(['+', '-', '*']))} {c}) % 89)"
        case 2:
            return f"(({draw(scalar(depth=1, k=k))} % 13 - {a}) % 71)"
        case _:
            return f"({a} if {draw(condition(depth=1, k=k))} else ({c} + 1) % 83)"


@st.composite
def block(draw: st.DrawFn, depth: int, loop: bool, k: str | None = None) -> list[str]:
    lines: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        lines += draw(statement(depth, loop, k))
    return lines


def indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


@st.composite
def statement(draw: st.DrawFn, depth: int, loop: bool, k: str | None = None) -> list[str]:
    name = draw(st.sampled_from(["s0", "s1", "s2", "c0", "o.a"]))
    value = draw(scalar(k=k))
    match draw(st.integers(0, 15 if depth else 8)):
        case 0 | 1:
            return [f"{name} = {value} % 97"]
        case 2:
            return [f"{name} {draw(st.sampled_from(['+=', '-=', '*=']))} {value} % 7", f"{name} %= 97"]
        case 3:
            return ["s0, s1 = s1, s0 + 1"] if draw(st.booleans()) else ["t0, t1 = t1, t0"]
        case 4 | 5:
            return [f"{draw(st.sampled_from(['t0', 't1']))} = {draw(tile(k=k))}"]
        case 6:
            return [
                f"old, kept = {name}, t0",
                f"{name} = {value} % 61",
                "t0 = (t0 + 1) % 79",
                "s2 = old - s2 % 41",
                "t1 = kept",
            ]
        case 7:
            return [f"{name} = o.bump({value} % 37)"]
        case 8:
            if not loop:
                return ["pass"]
            return [f"if {draw(condition(k=k))}:", f"    {draw(st.sampled_from(['break', 'continue']))}"]
        case 9 | 10 | 11:
            lines = [f"if {draw(condition(k=k))}:", *indented(draw(block(depth - 1, loop, k)))]
            if draw(st.booleans()):
                lines += ["else:", *indented([*draw(block(depth - 1, loop, k)), "new = s0 + 1"])]
                lines.insert(lines.index("else:"), "    new = s1")
                lines.append("s2 = new - s2 % 17")
            return lines
        case 12 | 13:
            var = f"k{depth}"
            bounds = draw(st.sampled_from(["s0 % 4", "1, s1 % 5", "c0 % 3, 7, 2", "3"]))
            return [f"for {var} in rng({bounds}):", *indented(draw(block(depth - 1, True, var)))]
        case 14:
            trips = draw(st.sampled_from(["range(2)", "(1, 5)", "zip((1, 2), (3, 4))", "range(s1 % 3)"]))
            var = f"u{depth}, _w" if trips.startswith("zip") else f"u{depth}"
            return [f"for {var} in {trips}:", *indented(draw(block(depth - 1, False, f"u{depth}")))]
        case _:
            count = f"w{depth}"
            body = [f"{count} += 1", *draw(block(depth - 1, True, k))]
            return [f"{count} = 0", f"while {count} < 3 and {draw(condition(k=k))}:", *indented(body)]


def check(body: list[str], p: int, q: int) -> None:
    size = SCALARS + TILES * WIDTH
    text = "\n".join(indented([*INIT, *body]))
    oracle = write(HEADER + PYTHON.format(body=text), {"rng": range, "c": 1})["program"]
    expected = [oracle(p, q, b, Vec(range(WIDTH)), Vec([b] * WIDTH)) for b in range(BLOCKS)]
    source = HEADER + KERNEL.format(body=text, blocks=BLOCKS, width=WIDTH, size=size, scalars=SCALARS)
    kernel = write(source, {"tilus": tilus, "rng": tilus.range, "c": 1})["program"]
    for device in ("reference", "cpu"):
        out = np.full(BLOCKS * size, -1, np.int32)
        kernel.on(device)(out, p, q)
        np.testing.assert_array_equal(out.reshape(BLOCKS, size), np.array(expected, np.int64), err_msg="\n".join(body))


@settings(max_examples=100)
@given(body=block(depth=3, loop=False), p=st.integers(-20, 20), q=st.integers(-9, 9))
def test_random_programs_mean_what_python_says(body: list[str], p: int, q: int) -> None:
    check(body, p, q)
