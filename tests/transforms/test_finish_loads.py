"""Loads are finished in front of what hands shared memory on: on every path of random programs, and nowhere without a reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import tilus
from tilus import Const, Tensor, f32
from tilus.compiler import compile_function
from tilus.dtypes import boolean, int32
from tilus.instructions import INSTRUCTIONS
from tilus.instructions.barrier import FinishLoads
from tilus.ir.expr import Var, as_expr
from tilus.ir.function import Function
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.ir.stmt import EMPTY, Break, Continue, For, If, Inst, Return, Role, Seq, Stmt, While
from tilus.ir.visit import instructions
from tilus.target import DEFAULT_TARGET
from tilus.transforms import run_pipeline
from tilus.transforms.finish_loads import finish_loads

HANDS_ON = ("arrive", "sync", "copy_bulk")


@tilus.kernel
def program(x: Tensor[f32, 1024], y: Tensor[f32, 1024], *, body: Const):
    tilus.grid(1, warps=8)
    ring, full, empty = tilus.shared(f32, [2, 512]), tilus.mbarrier(2), tilus.mbarrier(2)
    body(x, y, ring, full, empty)


def lowered(body: Callable[..., None]) -> Function:
    return run_pipeline(program.specialize(body=body).function, DEFAULT_TARGET)


def order(body: Callable[..., None]) -> list[str]:
    """What stands where loads, arrivals, copies and fences do."""
    names = ("load_shared", "finish_loads", *HANDS_ON)
    found = [stmt.inst.mnemonic for stmt in instructions(lowered(body).body)]
    return [name for name in found[found.index("sync") + 1 :] if name in names]


def start(x, ring, full):
    tilus.arrive(full[0], nbytes=ring[0].nbytes)
    tilus.copy_bulk(ring[0], x, [0], barrier=full[0])


def consumer(x, y, ring, full, empty):
    with tilus.warps(0, 1):
        start(x, ring, full)
    with tilus.warps(4, 4):
        tilus.wait_barrier(full[0], 0)
        tile = tilus.load_shared(ring[0])
        tilus.arrive(empty[0])
        tilus.arrive(empty[1])
        tilus.store(y, [0], tile)


def without_copies(x, y, ring, full, empty):
    tilus.store_shared(ring[0], tilus.load(x, [0], [512]))
    tilus.sync()
    tile = tilus.load_shared(ring[0])
    tilus.arrive(empty[0])
    tilus.store(y, [0], tile)


def own_copy(x, y, ring, full, empty):
    start(x, ring, full)
    tilus.wait_barrier(full[0], 0)
    tile = tilus.load_shared(ring[0])
    tilus.copy_bulk(ring[0], x, [512], barrier=full[0])
    tilus.store(y, [0], tile)


def test_it_stands_in_front_of_the_first_arrival() -> None:
    """Of the role that loads; the other one knows nothing of its loads."""
    assert order(consumer) == ["arrive", "copy_bulk", "load_shared", "finish_loads", "arrive", "arrive"]


def test_it_stands_in_front_of_copies() -> None:
    assert order(own_copy) == ["arrive", "copy_bulk", "load_shared", "finish_loads", "copy_bulk"]


def test_there_is_none_where_only_threads_write() -> None:
    assert order(without_copies) == ["sync", "load_shared", "arrive"]


@pytest.mark.parametrize("body", [consumer, without_copies, own_copy])
def test_the_text_form_gives_the_same_kernel(body: Callable[..., None]) -> None:
    function = lowered(body)
    again = parse_function(print_function(function), INSTRUCTIONS)
    assert finish_loads(again, DEFAULT_TARGET) is again
    assert compile_function(again, DEFAULT_TARGET).ptx.count("fence.acquire.cta") == sum(
        isinstance(stmt.inst, FinishLoads) for stmt in instructions(function.body)
    )


# Random programs of the instructions above.

CONDITION = Var("c", boolean)
LEAVES = ("load_shared", "load_shared", "load_shared", "arrive", "arrive", "sync", "copy_bulk", "wait_barrier")
TAKEN = {stmt.inst.mnemonic: stmt for body in (consumer, own_copy) for stmt in instructions(lowered(body).body)}


class _Maker:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.left = self.rng.randint(2, 9)  # instructions

    def program(self) -> Stmt:
        stmts = [self.block(0)]
        if self.rng.random() < 0.4:
            stmts += [Role(0, 4, self.block(0)), Role(4, 4, self.block(0))]
        return Seq(tuple(stmts))

    def block(self, loops: int, depth: int = 0) -> Stmt:
        return Seq(tuple(self.statement(loops, depth) for _ in range(self.rng.randint(0, 3))))

    def statement(self, loops: int, depth: int) -> Stmt:
        kind = self.rng.choice(("leaf", "leaf", "if", "jump", "jump", "for", "while")) if depth < 3 else "leaf"
        match kind:
            case "if":
                return If(CONDITION, self.block(loops, depth + 1), self.block(loops, depth + 1))
            case "jump":
                ends: list[Stmt] = [Break(), Continue()] if loops else [Return()]
                last = (*((self.leaf(),) if self.rng.random() < 0.5 else ()), self.rng.choice(ends))
                return If(CONDITION, Seq(last), EMPTY)
            case "for":
                body = self.block(loops + 1, depth + 1)
                return For(Var("i", int32), as_expr(0), as_expr(9), 1, body)
            case "while":
                return While(CONDITION, self.block(loops + 1, depth + 1))
            case _:
                return self.leaf()

    def leaf(self) -> Stmt:
        self.left -= 1
        return Inst(TAKEN[self.rng.choice(LEAVES)].inst) if self.left >= 0 else EMPTY


Path = tuple[tuple[str, ...], type[Stmt] | None]
MOST_PATHS = 300


def paths(stmt: Stmt) -> set[Path]:
    """The instructions along every path, and the jump that it ends with; loops take up to two trips."""
    match stmt:
        case Seq(stmts):
            found: set[Path] = {((), None)}
            index = 0
            while index < len(stmts):
                count = 1
                while (
                    isinstance(stmts[index], Role)
                    and index + count < len(stmts)
                    and isinstance(stmts[index + count], Role)
                ):
                    count += 1
                choices = set[Path]().union(*(paths(one) for one in stmts[index : index + count]))
                found = joined(found, choices)
                index += count
            return found
        case For(body=body) | While(body=body):
            trip = {(names, None if end in (Continue, None) else end) for names, end in paths(body)}
            once = {((), None)} | trip
            both = once | joined(trip, trip)
            return {(names, None if end is Break else end) for names, end in both}
        case If(_, then, orelse):
            return paths(then) | paths(orelse)
        case Role(body=body):
            return {(names, None) for names, _ in paths(body)}
        case Inst(inst):
            return {((inst.mnemonic,), None)}
        case _:
            return {((), type(stmt))}


def joined(first: set[Path], second: set[Path]) -> set[Path]:
    done = {path for path in first if path[1] is not None}
    return done | {(a + b, end) for a, jump in first if jump is None for b, end in second}


def is_safe(path: Path) -> bool:
    pending = False
    for name in path[0]:
        if pending and name in HANDS_ON:
            return False
        pending = name != "finish_loads" and (pending or name == "load_shared")
    return True


def without(stmt: Stmt, gone: Inst) -> Stmt:
    match stmt:
        case Seq(stmts):
            return Seq(tuple(without(child, gone) for child in stmts))
        case For() | While() | Role():
            return replace(stmt, body=without(stmt.body, gone))
        case If():
            return replace(stmt, then=without(stmt.then, gone), orelse=without(stmt.orelse, gone))
        case _:
            return EMPTY if stmt is gone else stmt


def check(stmt: Stmt) -> None:
    """Every path is safe, and without any one of what was inserted some path is not."""
    whole = Seq((TAKEN["copy_bulk"], stmt))
    before = paths(whole)
    body = finish_loads(replace(lowered(consumer), body=whole), DEFAULT_TARGET).body
    after = paths(body)
    assert {(tuple(n for n in names if n != "finish_loads"), end) for names, end in after} == before
    assert all(is_safe(path) for path in after)
    for stmt in instructions(body):
        if isinstance(stmt.inst, FinishLoads):
            assert not all(is_safe(path) for path in paths(without(body, stmt)))


@given(st.integers(0, 2**32))
def test_on_every_path_and_for_a_reason(seed: int) -> None:
    stmt = _Maker(seed).program()
    assume(len(paths(stmt)) <= MOST_PATHS)
    check(stmt)


LOAD, ARRIVE = TAKEN["load_shared"], TAKEN["arrive"]


def loop(*stmts: Stmt) -> While:
    return While(CONDITION, Seq(stmts))


def branch(*stmts: Stmt) -> If:
    return If(CONDITION, Seq(stmts), EMPTY)


@pytest.mark.parametrize("stmts", [
    (loop(ARRIVE, LOAD),),
    (loop(LOAD), ARRIVE),
    (loop(ARRIVE, branch(LOAD, Continue()), ARRIVE),),
    (loop(ARRIVE, branch(LOAD, Break()), ARRIVE), ARRIVE),
    (loop(LOAD, loop(), ARRIVE, branch(LOAD, Break())), ARRIVE),
    (loop(loop(branch(LOAD, Break())), ARRIVE), ARRIVE),
    (branch(LOAD, Return()), ARRIVE),
    (LOAD, Role(0, 4, ARRIVE), Role(4, 4, ARRIVE)),
    (Role(0, 4, LOAD), Role(4, 4, Seq((ARRIVE, LOAD))), ARRIVE),
])  # fmt: skip
def test_paths_that_are_easily_forgotten(stmts: tuple[Stmt, ...]) -> None:
    check(Seq(stmts))
