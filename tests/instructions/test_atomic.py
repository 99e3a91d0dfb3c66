"""Atomic updates: every element once, whatever the layout and the order; counters that let the last block go on."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_programs import WARP_COUNTS, Array, Build, assembles, function, random_layout, run_all, tensor, values_of

from tilus.compiler import compile_function
from tilus.dtypes import DataType, bf16, f16, f32, int8, int32, uint32
from tilus.errors import TilusError
from tilus.instructions import atomic
from tilus.instructions.elementwise import binary_op
from tilus.instructions.fill import full
from tilus.instructions.memory import load, store
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import BlockId, Const, Expr, as_expr, binary
from tilus.ir.stmt import If, Seq
from tilus.ir.tensor import GlobalTensor, RegisterTensor
from tilus.layout import RegisterLayout, auto, local, replicated, spatial
from tilus.target import get_target

NUMPY = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
INTEGER_OPS = tuple(NUMPY)
GRID = 3


def small_values(rng: random.Random, dtype: DataType, shape: tuple[int, ...]) -> Array:
    """Whole numbers whose sums every type holds exactly, so that the order of additions does not matter."""
    if not dtype.is_float:
        return values_of(rng, dtype, shape)
    return np.random.default_rng(rng.getrandbits(32)).integers(-8, 9, shape).astype(np.float32)


def tile_program(layout: RegisterLayout, op: str, start: tuple[int, ...]) -> Build:
    """Every block updates y at `start` with its own tile of x."""

    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        zeros = [as_expr(0)] * layout.rank
        tile = load.build(b, x, [BlockId(0), *zeros], shape=layout.shape, layout=layout)
        getattr(atomic, f"atomic_{op}").build(b, y, list(start), tile)

    return build


def check(op: str, dtype: DataType, layout: RegisterLayout, num_warps: int, rng: random.Random, target: str) -> None:
    """The tile may stick out of the tensor on any side."""
    start = tuple(rng.choice([0, 0, 1, -1, -2]) for _ in layout.shape)
    size = tuple(max(1, n + rng.choice([0, 0, -1, 2])) for n in layout.shape)
    x = small_values(rng, dtype, (GRID, *layout.shape))
    y = small_values(rng, dtype, size)
    want = y.copy()
    for block in range(GRID):
        for index in np.ndindex(*layout.shape):
            place = tuple(i + s for i, s in zip(index, start, strict=True))
            if all(0 <= i < n for i, n in zip(place, size, strict=True)):
                want[place] = NUMPY[op](want[place], x[block][index])
    arrays = {"x": (dtype, x), "y": (dtype, y)}
    build = tile_program(layout, op, start)
    for found in run_all(build, arrays, num_warps, GRID, seed=rng.getrandbits(16), target=target):
        np.testing.assert_array_equal(found["y"], want)


@pytest.mark.parametrize("op", INTEGER_OPS)
@settings(max_examples=20)
@given(st.randoms(use_true_random=False), st.integers(1, 3), st.sampled_from(WARP_COUNTS))
def test_integers(op: str, rng: random.Random, rank: int, num_warps: int) -> None:
    layout = random_layout(rng, rank, num_warps, max_locals=6)
    check(op, rng.choice([int32, uint32]), layout, num_warps, rng, rng.choice(["sm_80", "sm_90a"]))


@pytest.mark.parametrize("dtype", (f32, f16, bf16))
@settings(max_examples=25)
@given(st.randoms(use_true_random=False), st.integers(1, 2), st.sampled_from(WARP_COUNTS))
def test_floats(dtype: DataType, rng: random.Random, rank: int, num_warps: int) -> None:
    layout = random_layout(rng, rank, num_warps, max_locals=6)
    target = "sm_90a" if dtype == bf16 else rng.choice(["sm_80", "sm_90a"])
    check("add", dtype, layout, num_warps, rng, target)


@pytest.mark.parametrize(
    ("dtype", "slots", "target", "opcode"),
    [
        (f32, 4, "sm_90a", "red.global.add.v4.f32"),
        (f32, 4, "sm_80", "red.global.add.f32"),
        (f16, 8, "sm_90a", "red.global.add.noftz.v4.f16x2"),
        (f16, 2, "sm_80", "red.global.add.noftz.f16x2"),
        (f16, 1, "sm_80", "red.global.add.noftz.f16"),
        (bf16, 4, "sm_90a", "red.global.add.noftz.v2.bf16x2"),
        (int32, 4, "sm_90a", "red.global.add.s32"),
    ],
)
def test_vectors_where_the_target_has_them(dtype: DataType, slots: int, target: str, opcode: str) -> None:
    layout = spatial(32).local(slots)
    arrays = {"x": (GRID, *layout.shape), "y": layout.shape}
    tensors = {name: tensor(name, dtype, shape) for name, shape in arrays.items()}
    fn = function(tile_program(layout, "add", (0,)), tensors, 1, GRID)
    assert f" {opcode} " in compile_function(fn, get_target(target)).ptx
    x = small_values(random.Random(slots), dtype, (GRID, *layout.shape))
    values = {"x": (dtype, x), "y": (dtype, np.ones(layout.shape, dtype.compute))}
    for found in run_all(tile_program(layout, "add", (0,)), values, 1, GRID, target=target):
        np.testing.assert_array_equal(found["y"], 1 + x.sum(axis=0, dtype=x.dtype))


def test_replicas_add_once() -> None:
    """Elements that many threads, and slots of a thread, hold."""
    layout = replicated(4, 1).spatial(32).local_replicated(2).local(2)
    check("add", int32, layout, 4, random.Random(0), "sm_90a")


@pytest.mark.parametrize("op", (*INTEGER_OPS, "exchange"))
@pytest.mark.parametrize("dtype", (int32, uint32, f32))
def test_scalar(op: str, dtype: DataType) -> None:
    """All threads of a block get the same old value, and the old values are those of some order of the blocks."""
    if dtype == f32 and op not in ("add", "exchange"):
        return
    grid = 5

    def build(b: IRBuilder, y: GlobalTensor, seen: GlobalTensor) -> None:
        value = binary("+", BlockId(0), 3)
        old = getattr(atomic, f"atomic_{op}").build(b, y, [1], as_expr(value) if dtype != f32 else _as_float(value))
        tile = full.build(b, (64,), old, dtype, layout=spatial(64))
        store.build(b, seen, [BlockId(0), 0], tile)

    y = np.array([100, 6, 100], dtype.compute)
    arrays = {"y": (dtype, y), "seen": (dtype, np.zeros((grid, 64), dtype.compute))}
    for found in run_all(build, arrays, 2, grid, seed=7):
        assert (found["seen"] == found["seen"][:, :1]).all()
        assert found["y"][0] == found["y"][2] == 100
        old = found["seen"][:, 0].tolist()
        assert _is_some_order(op, 6, [b + 3 for b in range(grid)], old, found["y"][1])


def _as_float(value: Expr) -> Expr:
    from tilus.ir.expr import cast

    return cast(value, f32)


def _is_some_order(op: str, start: int, values: list[int], old: list[int], final: int) -> bool:
    """Whether there is an order of the updates in which each finds the old value that it reported."""
    if not values:
        return start == final
    for i, value in enumerate(values):
        if old[i] == start:
            after = value if op == "exchange" else int(NUMPY[op](start, value))
            if _is_some_order(op, after, values[:i] + values[i + 1 :], old[:i] + old[i + 1 :], final):
                return True
    return False


def split_program(synchronised: bool) -> Build:
    """Blocks leave partial tiles in a workspace; the last one adds them up. Without the counter's ordering: a race."""

    def build(b: IRBuilder, x: GlobalTensor, partial: GlobalTensor, count: GlobalTensor, y: GlobalTensor) -> None:
        tile = load.build(b, x, [BlockId(0), 0], shape=(256,), layout=spatial(64).local(4))
        store.build(b, partial, [BlockId(0), 0], tile)
        if synchronised:
            old: Expr | None = atomic.atomic_add.build(b, count, [0], 1)
        else:
            old = BlockId(0)
        assert old is not None
        with b.block() as then:
            total: RegisterTensor = full.build(b, (256,), 0, int32)
            for block in range(GRID):
                # Another layout than that of the stores: values of other threads, and of other blocks.
                part = load.build(b, partial, [block, 0], shape=(256,), layout=local(4).spatial(64))
                total = _tile(binary_op(b, "+", total, part))
            store.build(b, y, [0], total)
        b.append(If(binary("==", old, GRID - 1), Seq(tuple(then)), Seq(())))

    return build


def _tile(value: RegisterTensor | Expr) -> RegisterTensor:
    assert isinstance(value, RegisterTensor)
    return value


def split_arrays() -> dict[str, tuple[DataType, Array]]:
    x = values_of(random.Random(0), int32, (GRID, 256))
    zeros = np.zeros((GRID, 256), np.int32)
    return {
        "x": (int32, x), "partial": (int32, zeros), "count": (int32, np.zeros(1, np.int32)),
        "y": (int32, np.zeros(256, np.int32)),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_last_block_sees_what_all_wrote(seed: int) -> None:
    arrays = split_arrays()
    for found in run_all(split_program(True), arrays, 2, GRID, seed=seed):
        np.testing.assert_array_equal(found["y"], arrays["x"][1].sum(axis=0, dtype=np.int32))
        assert found["count"][0] == GRID


def test_without_the_counter_parts_are_missing() -> None:
    """Some schedule must show the difference, or the test above shows nothing."""
    arrays = split_arrays()
    want = arrays["x"][1].sum(axis=0, dtype=np.int32)
    runs = [run_all(split_program(False), arrays, 2, GRID, seed=seed)[1] for seed in range(8)]
    assert any((found["y"] != want).any() for found in runs)


def test_scalar_stands_between_barriers() -> None:
    """The first barrier makes the block's writes part of the release, the second gives all threads the acquire."""
    tensors = {name: tensor(name, dtype, values.shape) for name, (dtype, values) in split_arrays().items()}
    ptx = compile_function(function(split_program(True), tensors, 2, GRID), get_target("sm_80")).ptx
    opcodes = re.findall(
        r"^ +(?:@\S+ )?(st\.global|bar\.sync|atom\S+|st\.shared|ld\.shared|ld\.global)", ptx, re.MULTILINE
    )
    at = opcodes.index("atom.acq_rel.gpu.global.add.s32")
    assert opcodes[at - 2 : at + 4] == [
        "st.global", "bar.sync", "atom.acq_rel.gpu.global.add.s32", "st.shared", "bar.sync", "ld.shared",
    ]  # fmt: skip


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
def test_ptx_assembles(target: str) -> None:
    """Every operation, type and vector width, tiles and scalars."""
    for op in INTEGER_OPS:
        for dtype in (int32, uint32, f32, f16, bf16):
            if (dtype.is_float and op != "add") or (dtype == bf16 and target == "sm_80"):
                continue
            for slots in (1, 2, 4, 8):

                def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor, slots: int = slots, op: str = op) -> None:
                    tile_program(spatial(32).local(slots), op, (0,))(b, x, y)
                    if y.dtype.nbits == 32:
                        getattr(atomic, f"atomic_{op}").build(b, y, [0], Const(1, y.dtype))
                        atomic.atomic_exchange.build(b, y, [1], Const(2, y.dtype))

                assembles(build, {"x": (dtype, (GRID, 32 * slots)), "y": (dtype, (32 * slots,))}, 1, target)


def test_fence() -> None:
    def build(b: IRBuilder, x: GlobalTensor, y: GlobalTensor) -> None:
        tile = load.build(b, x, [0], shape=(32,))
        atomic.fence.build(b)
        store.build(b, y, [0], tile)

    x = np.arange(32, dtype=np.int32)
    for found in run_all(build, {"x": (int32, x), "y": (int32, np.zeros(32, np.int32))}):
        np.testing.assert_array_equal(found["y"], x)
    tensors = {name: tensor(name, int32, (32,)) for name in "xy"}
    assert "fence.acq_rel.gpu;" in compile_function(function(build, tensors, 1), get_target("sm_80")).ptx


@pytest.mark.parametrize(
    ("op", "dtype", "value", "message"),
    [
        ("add", int8, int8, "atomic add on y of int8, expected int32, uint32, f32, f16, bf16"),
        ("add", f32, int32, "atomic add of int32 on y of f32"),
        ("max", f32, f32, "atomic max on y of f32: floats have add"),
    ],
)
def test_mistakes_are_named(op: str, dtype: DataType, value: DataType, message: str) -> None:
    b = IRBuilder()
    with pytest.raises(TilusError, match=message):
        getattr(atomic, f"atomic_{op}").build(b, tensor("y", dtype, (32,)), [0], b.tile(value, (32,)))


def test_scalar_mistakes_are_named() -> None:
    b = IRBuilder()
    with pytest.raises(TilusError, match="2 indices for y, which has rank 1"):
        atomic.atomic_add.build(b, tensor("y", int32, (32,)), [0, 0], 1)
    with pytest.raises(TilusError, match="atomic add of f32 on y of int32"):
        atomic.atomic_add.build(b, tensor("y", int32, (32,)), [0], 1.5)
    with pytest.raises(TilusError, match="atomic add on y of f16, expected int32, uint32, f32"):
        atomic.atomic_add.build(b, tensor("y", f16, (32,)), [0], Const(1.0, f16))
    with pytest.raises(TilusError, match="atomic exchange of a tile, expected a scalar"):
        atomic.atomic_exchange.build(b, tensor("y", int32, (32,)), [0], b.tile(int32, (32,)))


def test_bf16_needs_its_hardware() -> None:
    tensors = {"x": tensor("x", bf16, (GRID, 32)), "y": tensor("y", bf16, (32,))}
    fn = function(tile_program(auto((32,), 32), "add", (0,)), tensors, 1, GRID)
    with pytest.raises(TilusError, match="atomic add on y of bf16, which sm_80 does not have"):
        compile_function(fn, get_target("sm_80"))
