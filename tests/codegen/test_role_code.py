"""The code of roles: their threads, hardware barriers, scratch memory and registers are their own."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor, f16, f32
from tilus.codegen.shared_plan import plan_shared
from tilus.compiler import compile_function
from tilus.ir.visit import by_warps
from tilus.layout import spatial
from tilus.ptx.assembler import assemble
from tilus.target import get_target
from tilus.transforms.layout_shared import uses

SM_90A = get_target("sm_90a")


@tilus.kernel
def three(x: Tensor[f32, "m", "n"], y: Tensor[f32, "m", "n"], z: Tensor[f32, "k"]):
    """Roles that need barriers, scratch memory of the role and of warps, and threads counted from 0, at the same time."""
    tilus.grid(2, warps=8)
    s = tilus.shared(f32, [64, 64])
    row = tilus.block_id(0) * 128
    with tilus.warps(1, 4):
        t = tilus.load(x, [row, 0], shape=[64, 64])
        for _ in tilus.range(3):
            t = tilus.with_layout(tilus.transpose(t), spatial(64, 2).local(1, 32))
        tilus.store_shared(s, t)
        tilus.sync()
        tilus.store(y, [row, 0], tilus.transpose(tilus.load_shared(s)) + 1)
    with tilus.warps(5, 2):
        t = tilus.load(x, [row + 64, 0], shape=[64, 64])
        tilus.store(y, [row + 64, 0], t - tilus.sum(t, axis=0))
    with tilus.warps(7, 1):
        tilus.store(z, [tilus.block_id(0) * 32], tilus.cumsum(tilus.arange(32), axis=0).to(f32))
        tilus.sync()


@pytest.mark.parametrize("device", ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_roles_do_not_meet(device: str) -> None:
    x = np.random.default_rng(0).integers(0, 100, (256, 64)).astype(np.float32)
    y, z = np.zeros_like(x), np.zeros(64, np.float32)
    three.on(device)(x, y, z)
    parts = x.reshape(2, 2, 64, 64)
    expected = np.stack(
        [parts[:, 0].transpose(0, 2, 1).transpose(0, 2, 1) + 1, parts[:, 1] - parts[:, 1].sum(1, keepdims=True)], 1
    )
    np.testing.assert_array_equal(y.reshape(2, 2, 64, 64), expected)
    np.testing.assert_array_equal(z, np.tile(np.cumsum(np.arange(32)), 2))


def test_barriers_are_those_of_the_role() -> None:
    """Every group of warps has a number of its own and counts its own threads; one warp needs none."""
    found = re.findall(r"bar\.sync ([^;]+);", three.ptx())
    assert set(found) == {"1, 128", "2, 64"}
    assert three.ptx().count("bar.warp.sync") > 0


def test_scratch_memory_is_not_shared() -> None:
    function = compile_function(three.ir(), SM_90A).function
    plan = plan_shared(function)
    needed: dict[range, int] = {}
    for stmt, warps in by_warps(function.body, function.warps):
        needed[warps] = max(needed.get(warps, 0), stmt.inst.scratch_nbytes(32 * len(warps)))
    assert sum(nbytes > 0 for nbytes in needed.values()) >= 2
    regions = [(plan.scratch_offsets[warps], nbytes) for warps, nbytes in needed.items()]
    regions += [(offset, tensor.nbytes) for tensor, offset in plan.offsets.items()]
    regions += [(plan.warp_scratch_offset, plan.warp_scratch_nbytes * function.num_warps), (plan.nbytes, 0)]
    regions.sort()
    assert all(start + nbytes <= after for (start, nbytes), (after, _) in itertools.pairwise(regions))


@tilus.kernel
def turned(x: Tensor[f32, "m", "n"], y: Tensor[f32, "m", "n"]):
    """Two roles whose warps turn tiles in the scratch memory of each warp."""
    tilus.grid(1, warps=6)
    with tilus.warps(0, 2):
        _turn(x, y, 0, 2)
    with tilus.warps(2, 4):
        _turn(x, y, 64, 4)


@tilus.inline
def _turn(x: Any, y: Any, row: int, warps: int) -> None:
    for _ in tilus.range(3):
        t = tilus.load(x, [row, 0], [32 * warps, 32], layout=spatial(warps, 1) * spatial(32, 1).local(1, 32))
        tilus.store(y, [row, 0], tilus.with_layout(t, spatial(warps, 1) * spatial(1, 32).local(32, 1)))


@pytest.mark.parametrize("device", ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_warps_of_roles_do_not_meet(device: str) -> None:
    assert plan_shared(compile_function(turned.ir(), SM_90A).function).warp_scratch_nbytes > 0
    x = np.arange(192 * 32, dtype=np.float32).reshape(192, 32)
    y = np.zeros_like(x)
    turned.on(device)(x, y)
    np.testing.assert_array_equal(y, x)


@tilus.kernel
def product(a: Tensor[f16, "m", "k"], b: Tensor[f16, "k", "n"], y: Tensor[f32, "m", "n"], *, pinned: Const = False):
    tilus.grid(1, warps=6)
    s = tilus.shared(f16, [32, 64])
    loaded = tilus.mbarrier()
    with tilus.warps(0, 2):
        tilus.copy_async(b, [0, 0], s)
        tilus.commit()
        tilus.wait(0)
        tilus.arrive(loaded)
    with tilus.warps(2, 4):
        rows = tilus.load(a, [0, 0], shape=[64, 32])
        tilus.wait_barrier(loaded, 0)
        tilus.store(y, [0, 0], tilus.dot(rows, tilus.load_shared(s)))
        if pinned:  # so that all of them must be converted, to fragments of these four warps
            left = tilus.load(a, [0, 0], shape=[64, 32], layout=spatial(64, 2).local(1, 16))
            right = tilus.load(b, [0, 0], shape=[32, 64], layout=spatial(32, 4).local(1, 16))
            total = tilus.zeros([64, 64], f32, layout=spatial(64, 2).local(1, 32))
            for _ in tilus.range(2):
                total = tilus.dot(left, right, total)
            tilus.store(y, [0, 0], total * 0.5)


@pytest.mark.parametrize("device", ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("pinned", [False, True])
def test_products_and_copies_of_roles(device: str, pinned: bool) -> None:
    """Fragments and the accesses that shared layouts are chosen for are those of the role's threads."""
    a, b = (np.random.default_rng(0).integers(-3, 4, shape).astype(np.float16) for shape in ((64, 32), (32, 64)))
    y = np.zeros((64, 64), np.float32)
    product.on(device)(a, b, y, pinned=pinned)
    np.testing.assert_array_equal(y, a.astype(np.float32) @ b.astype(np.float32))
    function = compile_function(product.ir(), SM_90A).function
    threads = {
        use.mnemonic: use.access.layout.num_threads for found in uses(function, SM_90A).values() for use in found
    }
    assert threads == {"copy_async": 64, "ldmatrix": 128}


@tilus.kernel
def early(a: Tensor[f16, "m", "k"], y: Tensor[f32, "m", "n"], *, waits: Const):
    tilus.grid(1, warps=8)
    left, right = tilus.shared(f16, [64, 64]), tilus.shared(f16, [64, 64])
    with tilus.warps(4, 4):
        for s in (left, right):
            tilus.store_shared(s, tilus.load(a, [0, 0], [64, 64]))
        tilus.fence_async()
        tilus.sync()
        total = tilus.wgmma(left, right, None)
        if waits:
            tilus.wgmma_wait()
        tilus.store(y, [0, 0], total)


def test_sums_are_awaited_in_roles() -> None:
    assemble(early.ptx(waits=True), SM_90A)
    with pytest.raises(tilus.TilusError, match="store reads total while wgmma still adds to it"):
        early.ptx(waits=False)


def test_nothing_that_a_role_needs_is_computed_in_front_of_it() -> None:
    """Where others would keep it in registers."""
    front = three.ptx().split("bra.uni")[0]
    assert not re.findall(r"\b(mad|mul|shl|and)\.", front)
    assert len(re.findall(r"\b(mad|mul|shl|and)\.", three.ptx())) > 10


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100a"])
def test_roles_assemble_for_every_target(target: str) -> None:
    usage = assemble(three.ptx(target=target), get_target(target))
    assert "C75" not in usage.log


# Registers.


@tilus.kernel
def shared_out(x: Tensor[f32, "n"], *, registers: Const, blocks_per_sm: Const = 1):
    """Warpgroups with these numbers of registers; None has no role."""
    tilus.grid(1, warps=4 * len(registers), blocks_per_sm=blocks_per_sm)
    barriers = tilus.mbarrier(2)
    for group in tilus.static_range(len(registers)):
        if registers[group] is not None:
            with tilus.warps(4 * group, 4, registers=registers[group]):
                for k in tilus.range(x.shape[0] // 128):
                    tilus.wait_barrier(barriers[k % 2], k // 2 % 2)
                    tilus.store(x, [k * 128], tilus.load(x, [k * 128], shape=[128]) * group)


@pytest.mark.parametrize(
    ("registers", "blocks_per_sm", "at_launch", "changes"),
    [
        ((40, 232, 232), 1, 168, ["dec 40", "inc 232", "inc 232"]),
        ((24, 240), 1, 240, ["dec 24"]),
        ((24, 160, 160, 160), 1, 128, ["dec 24", "inc 160", "inc 160", "inc 160"]),
        ((24, 104), 4, 64, ["dec 24", "inc 104"]),
        ((96, None), 1, 248, ["dec 96"]),
        ((232, None, 40), 1, 168, ["inc 232", "dec 40"]),
    ],
)
def test_registers(registers: Any, blocks_per_sm: int, at_launch: int, changes: list[str]) -> None:
    """The assembler follows: it launches with the number that the roles' changes start from, and ignores none of them."""
    ptx = shared_out.ptx(registers=registers, blocks_per_sm=blocks_per_sm)
    assert f".maxnreg {at_launch}\n" in ptx
    assert re.findall(r"setmaxnreg\.(\w+)\.sync\.aligned\.u32 (\d+);", ptx) == [tuple(c.split()) for c in changes]
    cubin = assemble(ptx, SM_90A)
    assert cubin.kernels[0].registers == at_launch
    assert "setmaxnreg" not in cubin.log
    assert "C75" not in cubin.log


@tilus.kernel
def together(x: Tensor[f32, "m", "n"]):
    tilus.grid(1, warps=8)
    with tilus.warps(0, 4, registers=216):
        tilus.store(x, [0, 0], tilus.full([1, 128], 1.0, f32))
    with tilus.warps(4, 3, registers=40):
        tilus.store(x, [1, 0], tilus.full([1, 96], 2.0, f32))
    with tilus.warps(7, 1, registers=40):
        tilus.store(x, [2, 0], tilus.full([1, 32], 3.0, f32))


@pytest.mark.parametrize("device", ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_roles_of_a_warpgroup_set_its_registers_by_one_instruction(device: str) -> None:
    """PTX wants the same one for all of its warps; then each goes its own way."""
    x = np.zeros((3, 128), np.float32)
    together.on(device)(x)
    np.testing.assert_array_equal(x.sum(1), [128, 192, 96])
    ptx = together.ptx()
    assert re.findall(r"setmaxnreg\.(\w+)\.sync\.aligned\.u32 (\d+);", ptx) == [("dec", "40")]
    assert "C75" not in assemble(ptx, SM_90A).log


@pytest.mark.parametrize(
    ("registers", "message"),
    [
        ((40, 240, 240), "the roles want 66560 registers, the 384 threads of the block have 168 each: 64512"),
        ((232, None, 168), "the roles want 72704 registers"),
    ],
)
def test_more_registers_than_there_are(registers: Any, message: str) -> None:
    with pytest.raises(tilus.TilusError, match=message) as caught:
        shared_out.ptx(registers=registers)
    assert "test_role_code.py:" in str(caught.value)


def test_no_registers_are_moved_on_older_targets() -> None:
    @tilus.kernel
    def plain(n: tilus.int32):
        tilus.grid(1, warps=8)
        with tilus.warps(0, 4, registers=24):
            pass
        with tilus.warps(4, 4, registers=104):
            pass

    assert "setmaxnreg.dec.sync.aligned.u32 24;" in plain.ptx()
    with pytest.raises(tilus.TilusError, match=r"tilus.warps with registers= needs sm_90a or a later GPU"):
        plain.ptx(target="sm_80")


# Arrivals.


@tilus.kernel
def counted(n: tilus.int32, *, warps: Const, arrivals: Const, nbytes: Const = None):
    tilus.grid(1, warps=sum(warps))
    barriers = tilus.mbarrier(3, arrivals=arrivals)
    for role in tilus.static_range(len(warps)):
        with tilus.warps(sum(warps[:role]), warps[role]):
            tilus.arrive(barriers[n], nbytes=nbytes)


@pytest.mark.parametrize(
    ("warps", "arrivals", "count"), [((1,), 1, 1), ((4,), 1, 4), ((4, 4), 2, 8), ((3, 3, 3), 1, 3)]
)
@pytest.mark.parametrize("nbytes", [None, 64])
def test_warps_arrive_one_by_one(warps: Any, arrivals: int, count: int, nbytes: int | None) -> None:
    """Bytes are announced once, and every warp of the group arrives."""
    ptx = counted.ptx(warps=warps, arrivals=arrivals, nbytes=nbytes)
    assert re.findall(r"mbarrier\.init\S* \[[^]]+\], (\d+);", ptx) == [str(count)] * 3
    announced = len(re.findall(r"mbarrier\.arrive\.expect_tx\S* _, \[[^]]+\], 64;", ptx))
    plain = len(re.findall(r"mbarrier\.arrive\.shared", ptx))
    assert announced == (0 if nbytes is None else len(warps))
    assert plain == (len(warps) if nbytes is None or warps[0] > 1 else 0)
    assemble(ptx, SM_90A)


def test_barriers_that_are_made_together_need_one_barrier_of_the_block() -> None:
    @tilus.kernel
    def made(n: tilus.int32):
        tilus.grid(1, warps=4)
        full = tilus.mbarrier(2)
        empty = tilus.mbarrier(2)
        tilus.arrive(full[0])
        other = tilus.mbarrier()
        tilus.arrive(empty[0])
        tilus.arrive(other)

    steps = re.findall(r"mbarrier\.init|bar\.sync|mbarrier\.arrive", made.ptx())
    init, sync, arrive = "mbarrier.init", "bar.sync", "mbarrier.arrive"
    assert steps == [*[init] * 4, sync, arrive, init, sync, arrive, arrive]


def test_groups_of_different_sizes_do_not_share_a_barrier() -> None:
    with pytest.raises(tilus.TilusError, match="2 warps arrive at barriers, expected 4 as elsewhere") as caught:
        counted.ptx(warps=(4, 2), arrivals=2)
    assert str(caught.value).count("test_role_code.py:") == 2


def test_more_barriers_than_there_are() -> None:
    @tilus.kernel
    def many(n: tilus.int32):
        tilus.grid(1, warps=32)
        for role in tilus.static_range(16):
            with tilus.warps(2 * role, 2):
                tilus.sync()

    with pytest.raises(tilus.TilusError, match="this is the barrier of group 17 of warps, a block has 16"):
        many.ptx()
