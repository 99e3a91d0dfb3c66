"""`dot` with layouts that are already known: what an instruction's fragments divide stays where it is."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tile_programs import random_blocks

import tilus
from tilus import Const, Tensor, f16, f32
from tilus.instructions import INSTRUCTIONS
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.ir.visit import instructions
from tilus.layout import RegisterLayout, local, replicated, spatial
from tilus.layout.atoms import mma_a, mma_b, mma_c


@tilus.kernel
def square(a: Tensor[f16, 32, 32], c: Tensor[f32, 32, 32]):
    tilus.grid(1, warps=2)
    tile = tilus.load(a, [0, 0], shape=[32, 32])
    tilus.store(c, [0, 0], tilus.dot(tile, tile))


@tilus.kernel
def pinned(
    x: Tensor[f16, "m", "k"], y: Tensor[f16, "k", "n"], z: Tensor[f32, "m", "n"],
    *, shape: Const, warps: Const, a: Const = None, b: Const = None, c: Const = None,
):  # fmt: skip
    tilus.grid(1, warps=warps)
    m, n, k = shape
    left = tilus.load(x, [0, 0], shape=[m, k], layout=a)
    right = tilus.load(y, [0, 0], shape=[k, n], layout=b)
    tilus.store(z, [0, 0], tilus.dot(left, right, tilus.zeros([m, n], f32, layout=c)))


def mnemonics(name: str, **values: object) -> list[str]:
    return [stmt.inst.mnemonic for stmt in instructions(pinned.ir(after=name, **values).body)]


def check_product(device: str, shape: tuple[int, int, int], warps: int, **layouts: RegisterLayout) -> None:
    m, n, k = shape
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-8, 9, extents).astype(np.float16) for extents in ((m, k), (k, n)))
    z = np.zeros((m, n), np.float32)
    pinned.on(device)(x, y, z, shape=shape, warps=warps, **layouts)
    assert np.array_equal(z, x.astype(np.float32) @ y.astype(np.float32))  # integers: exact in any order


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator"])
def test_both_operands_are_one_tile(device: str) -> None:
    a = np.random.default_rng(0).integers(-8, 8, (32, 32)).astype(np.float16)
    c = np.zeros((32, 32), np.float32)
    square.on(device)(a, c)
    assert np.array_equal(c, a.astype(np.float32) @ a.astype(np.float32))


@pytest.mark.parametrize("seed", range(30))
def test_a_layout_that_the_fragment_divides_is_kept(seed: int) -> None:
    """Whatever the order in which warps and repeats tile the operand or the result: nothing is converted."""
    rng = random.Random(seed)
    warps = rng.choice([1, 2, 4, 8])
    which = rng.choice("abc")
    atom = {"a": mma_a(16, rng.choice([8, 16])), "b": mma_b(16, rng.choice([8, 16])), "c": mma_c()}[which]
    layout = random_blocks(rng, warps, {"a": 1, "b": 0, "c": None}[which]) * atom
    m, n, k = rng.choice([16, 32]), rng.choice([8, 16, 32]), rng.choice([8, 16, 24, 48])
    shape = {
        "a": (layout.shape[0], n, layout.shape[1]),
        "b": (m, layout.shape[1], layout.shape[0]),
        "c": (*layout.shape, k),
    }
    values = {"shape": shape[which], "warps": warps, which: layout}
    assert "convert" not in mnemonics("infer_layouts", **values)
    check_product("emulator", shape[which], warps, **{which: layout})


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        (replicated(4, 2), spatial(1, 4) * local(1, 2)),
        (replicated(2, 2) * spatial(2, 1), spatial(1, 2) * spatial(2, 1) * local(1, 4)),
        (spatial(2, 1) * replicated(2, 2), spatial(2, 2) * local(1, 4)),
        (replicated(2, 2) * spatial(2, 1) * replicated(2, 2), spatial(1, 2) * spatial(2, 2) * local(1, 2)),
        (replicated(16, 2), replicated(2, 2) * spatial(1, 8)),
    ],
    ids=str,
)
def test_warps_that_hold_the_same_operand_share_the_other_dimension(
    given: RegisterLayout, blocks: RegisterLayout
) -> None:
    """Warps with the same A compute other columns, as many as there are, instead of all of them the same."""
    values = {"shape": (16 * given.shape[0], 64, 16), "warps": given.num_threads, "a": given * mma_a()}
    function = pinned.ir(after="infer_layouts", **values)
    (result,) = (stmt.inst.out for stmt in instructions(function.body) if stmt.inst.mnemonic == "dot")
    assert result.layout == blocks * mma_c()
    check_product("emulator", values["shape"], values["warps"], a=values["a"])


@tilus.kernel
def accumulating(x: Tensor[f16, 16, "k"], y: Tensor[f16, "k", 16], z: Tensor[f32, 16, 16], *, c: Const):
    tilus.grid(1, warps=1)
    acc = tilus.zeros([16, 16], f32, layout=c)
    for k in tilus.range(0, x.shape[1], 16):
        acc = tilus.dot(tilus.load(x, [0, k], shape=[16, 16]), tilus.load(y, [k, 0], shape=[16, 16]), acc)
    tilus.store(z, [0, 0], acc)


def test_a_result_in_a_layout_that_no_fragment_divides_is_converted_around_the_product() -> None:
    """A variable keeps its layout, so it is moved into that of the product before, and back afterwards."""
    values = {"c": local(4, 1).spatial(4, 8).local(1, 2)}
    function = accumulating.ir(after="infer_layouts", **values)
    loop = [stmt.inst for stmt in instructions(function.body) if stmt.inst.mnemonic in ("convert", "dot")]
    assert [inst.mnemonic for inst in loop] == ["convert", "dot", "convert"]
    assert loop[0].operands[0].layout == loop[2].results[0].layout == values["c"]
    x, y = (np.random.default_rng(0).integers(-4, 5, shape).astype(np.float16) for shape in ((16, 32), (32, 16)))
    z = np.zeros((16, 16), np.float32)
    accumulating.on("emulator")(x, y, z, **values)
    assert np.array_equal(z, x.astype(np.float32) @ y.astype(np.float32))


def test_the_dump_names_the_instruction_and_is_read_back() -> None:
    function = pinned.ir(after="select_instructions", shape=(16, 8, 24), warps=1)
    text = print_function(function)
    assert 'mma_sync(a=%left, b=%right, acc=%t, atom="m16n8k8.f16.f16.f32")' in text
    assert print_function(parse_function(text, INSTRUCTIONS)) == text
