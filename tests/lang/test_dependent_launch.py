"""Programmatic dependent launch: what the two instructions become, and what a kernel may do before it waits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.dtypes import int64
from tilus.instructions.dependent_launch import WaitDependencies
from tilus.instructions.memory import LoadScalar
from tilus.ir.dependencies import check_dependencies
from tilus.ir.expr import Var, as_expr
from tilus.ir.function import Function, TensorParam
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Seq, Stmt, While
from tilus.ir.tensor import GlobalTensor
from tilus.ptx.assembler import assemble
from tilus.target import get_target


@tilus.kernel
def scaled(x: Tensor[f32, "n"], w: Tensor[f32, "n"], y: Tensor[f32, "n"], offset: Tensor[f32, "n"] = None):
    tilus.grid(tilus.cdiv(x.shape[0], 64), warps=2)
    i = tilus.block_id(0) * 64
    tilus.launch_dependents()
    factors = tilus.load(w, [i], [64])
    tilus.wait_dependencies(constant=[w, offset])
    tilus.store(y, [i], tilus.load(x, [i], [64]) * factors)


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_kernel_computes_the_same(device: str) -> None:
    x, w, y = np.arange(100, dtype=np.float32), np.full(100, 3, np.float32), np.zeros(100, np.float32)
    scaled.on(device)(x, w, y)
    assert np.array_equal(y, 3 * x)


@pytest.mark.parametrize(("target", "count"), [("sm_80", 0), ("sm_89", 0), ("sm_90a", 1), ("sm_100a", 1)])
def test_older_targets_know_no_dependent_launch(target: str, count: int) -> None:
    ptx = scaled.ptx(target=target)
    assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == count
    assemble(ptx, get_target(target))


def test_only_what_is_constant_is_loaded_as_read_only() -> None:
    """Read-only loads may pass the wait, and x may still be written when the kernel starts."""
    loads = [line for line in scaled.ptx().splitlines() if "ld.global" in line]
    assert ["ld.global.nc" in line for line in loads] == [True, False]


@tilus.kernel
def early(x: Tensor[f32, "n"], y: Tensor[f32, "n"], *, mistake: Const):
    tilus.grid(1, warps=2)
    if mistake == "read":
        _ = tilus.load(x, [0], [64]) + tilus.load(y, [0], [64])
    if mistake == "write":
        tilus.store(y, [0], tilus.zeros([64]))
    if mistake == "update":
        tilus.atomic_add(y, [0], tilus.zeros([64]))
    if mistake == "end" and x.shape[0] > 7:
        return
    tilus.wait_dependencies(constant=[y] if mistake == "constant" else [])
    tilus.store(y, [0], tilus.load(x, [0], [64]))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("read", r"x is read before tilus.wait_dependencies(?s:.*)constant=\[x\](?s:.*)y is read before"),
        ("write", "y is written before tilus.wait_dependencies"),
        ("update", "y is written before tilus.wait_dependencies"),
        ("end", "a block may end before tilus.wait_dependencies"),
        ("constant", "y is written, but promised to be constant by tilus.wait_dependencies"),
    ],
)
def test_mistakes_are_refused_at_their_line(mistake: str, message: str) -> None:
    with pytest.raises(tilus.TilusError, match=message) as caught:
        early.ptx(mistake=mistake)
    assert "test_dependent_launch.py:" in str(caught.value)


@tilus.kernel
def with_roles(x: Tensor[int32, "n"], y: Tensor[int32, "n"], *, waiting: Const):
    tilus.grid(1, warps=2)
    if "block" in waiting:
        tilus.wait_dependencies()
    with tilus.warps(0, 1):
        if "first" in waiting or (x.shape[0] > 7 and "perhaps" in waiting):
            tilus.wait_dependencies()
        if "reads" in waiting:
            _ = x[0] + 1
    with tilus.warps(1, 1):
        if "second" in waiting:
            tilus.wait_dependencies()
        _ = x[1] + 1


@pytest.mark.parametrize(
    ("waiting", "message"),
    [
        ("block reads", None),
        ("first second reads", None),
        ("second", None),  # the block does not end before the warps that wait
        ("first", "x is read before"),  # by the other warps
        ("second reads", "x is read before"),
        ("perhaps", "x is read before(?s:.*)a block may end before"),
    ],
)
def test_each_role_waits_for_itself(waiting: str, message: str | None) -> None:
    if message is None:
        assemble(with_roles.ptx(waiting=waiting), get_target("sm_90a"))
    else:
        with pytest.raises(tilus.TilusError, match=message):
            with_roles.ptx(waiting=waiting)


def test_only_tensors_are_constant() -> None:
    @tilus.kernel
    def wrong(a: f32):
        tilus.grid(1)
        tilus.wait_dependencies(constant=[a])

    with pytest.raises(tilus.TilusError, match="constant has a Var, expected tensor parameters"):
        wrong.ir()


@tilus.kernel
def in_roles(
    x: Tensor[f32, "n"],
    y: Tensor[f32, "n"],
    *,
    first: Const,
    second: Const,
    leave: Const = False,
    behind: Const = False,
):
    tilus.grid(1, warps=2)
    with tilus.warps(0, 1):
        if leave and x.shape[0] > 7:
            return
        if first:
            tilus.wait_dependencies()
            tilus.store(y, [0], tilus.zeros([32]))
    with tilus.warps(1, 1):
        if second:
            tilus.wait_dependencies()
        if not leave:
            tilus.store(y, [32], tilus.zeros([32]))
    if behind:
        tilus.store(y, [64], tilus.zeros([32]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": True, "second": True}, None),
        ({"first": True, "second": False}, "y is written before tilus.wait_dependencies"),
        ({"first": True, "second": True, "leave": True}, None),
        ({"first": True, "second": False, "leave": True}, "a block may end before tilus.wait_dependencies"),
        ({"first": True, "second": True, "behind": True}, "y is written before tilus.wait_dependencies"),
    ],
)
def test_every_role_does_its_own_waiting(options: Any, message: str | None) -> None:
    """And one that waits on all of its ways keeps the block from ending."""
    if message is None:
        in_roles.ptx(**options)
    else:
        with pytest.raises(tilus.TilusError, match=message):
            in_roles.ptx(**options)


X = GlobalTensor(int32, (as_expr(8),), (as_expr(1),), Var("x_ptr", int64), name="x")
FLAG = Var("flag", int32)


def programs() -> st.SearchStrategy[Stmt]:
    """Statements that read, wait, branch, repeat and leave."""
    leaves: list[Any] = [
        st.builds(lambda: Inst(LoadScalar(Var("v", int32), X, (as_expr(0),)))),
        st.builds(lambda: Inst(WaitDependencies())),
        st.builds(Return),
    ]
    outside = st.one_of(leaves)
    return st.recursive(
        outside,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4).map(lambda stmts: Seq(tuple(stmts))),
            st.builds(lambda a, b: If(as_expr(FLAG), a, b), inner, inner),
            st.builds(looping, st.lists(inner, max_size=3), st.integers(0, 2**30)),
        ),
        max_leaves=8,
    )


def looping(stmts: list[Stmt], seed: int) -> Stmt:
    """A loop over the statements that breaks or continues somewhere, perhaps in a branch."""
    rng = random.Random(seed)
    jump: Stmt = rng.choice([Break(), Continue()])
    stmts.insert(rng.randrange(len(stmts) + 1), rng.choice([jump, If(as_expr(FLAG), jump, Seq(())), Seq(())]))
    body = Seq(tuple(stmts))
    return rng.choice([While(as_expr(FLAG), body), For(Var("i", int32), as_expr(0), as_expr(FLAG), 1, body)])


Path = tuple[
    str, str
]  # what a block does ("r": reads, "w": waits), and how it comes out: "", "break", "continue", "return"


def paths(stmt: Stmt) -> Iterator[Path]:
    """All ways through a statement; loops run up to twice, which is enough to come to every state."""
    match stmt:
        case Seq(stmts):
            yield from in_sequence(stmts)
        case Inst(inst):
            yield ("w" if isinstance(inst, WaitDependencies) else "r"), ""
        case If(_, then, orelse):
            yield from {*paths(then), *paths(orelse)}
        case For() | While():
            once = {(did, "" if end == "continue" else end) for did, end in paths(stmt.body)}
            twice = {(a + b, end) for a, go in once if not go for b, end in once}
            yield from {("", ""), *((did, "" if end == "break" else end) for did, end in once | twice)}
        case _:
            yield "", type(stmt).__name__.lower()


def in_sequence(stmts: tuple[Stmt, ...]) -> Iterator[Path]:
    if not stmts:
        yield "", ""
        return
    for did, end in set(paths(stmts[0])):
        rest = [("", end)] if end else in_sequence(stmts[1:])
        yield from {(shortened(did + more), last) for more, last in rest}


def shortened(did: str) -> str:
    """Only whether a read comes before the first wait matters."""
    before, wait, _ = did.partition("w")
    return before[:1] + wait


@settings(max_examples=500)
@given(program=programs())
def test_a_program_is_refused_exactly_when_a_path_does_something_too_early(program: Stmt) -> None:
    function = Function("k", (TensorParam("x", X),), (as_expr(1),), 1, program)
    ways = {did for did, _ in paths(program)}
    messages = " ".join(error.message for error in check_dependencies(function))
    if all("w" not in did for did in ways) and "WaitDependencies" not in repr(program):
        assert not messages
    else:
        assert ("is read before" in messages) == any(did.startswith("r") for did in ways)
        assert ("may end before" in messages) == any("w" not in did for did in ways)


@tilus.kernel
def mixed(x: Tensor[int32, "n"], weight: Tensor[int32, "n"], y: Tensor[int32, "n"]):
    """A block reads what the last block, of the kernel before, wrote."""
    tilus.grid(y.shape[0] // 1024, warps=4)
    tilus.launch_dependents()
    here, there = tilus.block_id(0) * 1024, (tilus.grid_dim(0) - 1 - tilus.block_id(0)) * 1024
    factor = tilus.load(weight, [here], [1024])
    tilus.wait_dependencies(constant=[weight])
    tilus.store(y, [here], (tilus.load(x, [there], [1024]) * factor + 1) & 0xFFFF)


@pytest.mark.gpu
def test_gpu_kernels_of_a_graph_see_what_the_ones_before_them_wrote() -> None:
    import torch

    steps, n = 2000, 64 * 1024
    rng = np.random.default_rng(0)
    weight, first = rng.integers(1, 2**15, n, np.int32), rng.integers(0, 2**16, n, np.int32)
    expected = first
    for _ in range(2 * steps):
        expected = (expected.reshape(-1, 1024)[::-1].reshape(-1) * weight + 1) & 0xFFFF
    w, x = torch.from_numpy(weight).cuda(), torch.from_numpy(first).cuda()
    y = torch.empty_like(x)
    mixed(x, w, y)  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            mixed(x, w, y)
            mixed(y, w, x)
    for _ in range(3):
        x.copy_(torch.from_numpy(first))
        graph.replay()
        assert np.array_equal(x.cpu().numpy(), expected)
