"""Clusters: blocks that reach each other's shared memory. The laws are of numpy; blocks are rows of whole clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.compiler import compile_function
from tilus.instructions import INSTRUCTIONS
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.ptx.assembler import assemble
from tilus.runtime.emulator import RaceError
from tilus.runtime.reference import run_reference
from tilus.target import get_target

SIZES = [1, 2, 3, 4, 8]
DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


@tilus.kernel
def transpose(
    x: Tensor[int32, "blocks", "planes", "c", 64], y: Tensor[int32, "blocks", "planes", "c", 64], *, c: Const
):
    """Rank r of a cluster gets what the others have for it; the grid has two axes."""
    tilus.grid(x.shape[0], x.shape[1], warps=2, cluster=c)
    block, plane, rank = tilus.block_id(0), tilus.block_id(1), tilus.cluster_rank()
    inbox = tilus.shared(int32, [c, 64])
    tilus.cluster_sync()
    for r in tilus.range(c):
        part = tilus.load(x, [block, plane, r, 0], [64])
        tilus.store_shared(inbox[rank], part, block=r)
    tilus.cluster_sync()
    tilus.store(y, [block, plane, 0, 0], tilus.load_shared(inbox), dims=[2, 3])


@tilus.kernel
def total(x: Tensor[int32, "blocks", 128], y: Tensor[int32, "blocks", 128], *, c: Const):
    tilus.grid(x.shape[0], warps=1, cluster=c)
    own = tilus.shared(int32, [128])
    tilus.store_shared(own, tilus.load(x, [tilus.block_id(0), 0], [128]))
    tilus.cluster_sync()
    acc = tilus.zeros([128], dtype=int32)
    for r in tilus.static_range(c):
        acc += tilus.load_shared(own, block=(tilus.cluster_rank() + r) % c)
    tilus.store(y, [tilus.block_id(0), 0], acc)


def by_cluster(x: Any, c: int) -> Any:
    return x.reshape(-1, c, *x.shape[1:])


@given(
    c=st.sampled_from(SIZES),
    clusters=st.integers(0, 5),
    planes=st.integers(1, 3),
    chunk=st.sampled_from([1, 600, 2**21]),
)
def test_an_exchange_in_the_cluster_is_a_transposition(c: int, clusters: int, planes: int, chunk: int) -> None:
    """Also where the reference execution runs few blocks at a time."""
    x = np.random.default_rng(c).integers(0, 2**31, (clusters * c, planes, c, 64), np.int32)
    y = np.zeros_like(x)
    run_reference(transpose.ir(x, y, c=c), {"x": x, "y": y}, (clusters * c, planes, 1), max_chunk_nbytes=chunk)
    # of all clusters, planes: [rank, part] becomes [part, rank]
    assert np.array_equal(by_cluster(y, c), np.swapaxes(by_cluster(x, c), 1, 3))


@pytest.mark.parametrize("c", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_block_finds_the_sum_of_its_cluster(c: int, device: str) -> None:
    x = np.random.default_rng(c).integers(-1000, 1000, (6 * c, 128), np.int32)
    y = np.zeros_like(x)
    total.on(device)(x, y, c=c)
    sums = by_cluster(x, c).sum(1, keepdims=True, dtype=np.int32)
    assert np.array_equal(by_cluster(y, c), np.broadcast_to(sums, (6, c, 128)))


@tilus.kernel
def relay(
    x: Tensor[int32, "rounds", "blocks", 64], y: Tensor[int32, "rounds", "blocks", 64], *, c: Const, lost: Const = False,
    reads_only: Const = (),
):  # fmt: skip
    """Sums along a chain of blocks: each waits for the block before it, adds its own rows and hands on. A stage is written
    again when its reader has said that it is free. lost: the last round is not handed on. reads_only: barriers at which arrivals
    say that reading is over."""
    tilus.grid(x.shape[1], warps=2, cluster=c)
    inbox = tilus.shared(int32, [2, 64])
    full, free = tilus.mbarrier(2), tilus.mbarrier(2)
    rank, block, rounds = tilus.cluster_rank(), tilus.block_id(0), x.shape[0]
    tilus.cluster_sync()
    with tilus.warps(0, 1):
        for k in tilus.range(rounds):
            total = tilus.load(x, [k, block, 0], [64])
            if rank > 0:
                tilus.wait_barrier(full[k % 2], k // 2 % 2)
                total += tilus.load_shared(inbox[k % 2])
                tilus.arrive(free[k % 2], block=rank - 1, reads_only="free" in reads_only)
            tilus.store(y, [k, block, 0], total)
            if rank < c - 1:
                tilus.wait_barrier(free[k % 2], (k // 2 + 1) % 2)
                tilus.store_shared(inbox[k % 2], total, block=rank + 1)
                if not lost or k < rounds - 1:
                    tilus.arrive(full[k % 2], block=rank + 1, reads_only="full" in reads_only)


@pytest.mark.parametrize("c", SIZES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reads_only", [(), ("free",)])
def test_blocks_hand_on_through_barriers(c: int, device: str, reads_only: tuple[str, ...]) -> None:
    x = np.random.default_rng(c).integers(-1000, 1000, (5, 2 * c, 64), np.int32)
    y = np.zeros_like(x)
    relay.on(device)(x, y, c=c, reads_only=reads_only)
    assert np.array_equal(y.reshape(5, 2, c, 64), x.reshape(5, 2, c, 64).cumsum(2))


def test_barriers_of_other_blocks() -> None:
    """An arrival there is one in the scope of the cluster, and so is a wait where others may arrive."""
    ptx = relay.ptx(c=4)
    assert ptx.count("mbarrier.arrive.release.cluster.shared::cluster.b64 _,") == 2
    assert ptx.count("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64") == 2
    assemble(ptx, get_target("sm_90a"))
    alone = relay.ptx(c=1, reads_only=("free",))
    assert "shared::cluster" not in alone and "acquire.cluster" not in alone


def test_arrivals_of_readers_need_no_scope() -> None:
    """Nor do the waits for them, through the text form, too."""
    function = relay.ir(c=4, reads_only=("free",))
    for each in (function, parse_function(print_function(function), INSTRUCTIONS)):
        ptx = compile_function(each, get_target("sm_90a")).ptx
        assert ptx.count("mbarrier.arrive.release.cluster.shared::cluster.b64 _,") == 1
        assert ptx.count("mbarrier.arrive.shared::cluster.b64 _,") == 1
        assert ptx.count("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64") == 1
        assert ptx.count("mbarrier.try_wait.parity.shared::cta.b64") == 1
        assemble(ptx, get_target("sm_90a"))


@pytest.mark.parametrize("reads_only", [("full",), ("full", "free")])
def test_what_readers_say_hands_nothing_on(reads_only: tuple[str, ...]) -> None:
    x = np.zeros((5, 4, 64), np.int32)
    with pytest.raises(
        RaceError, match=r"race: (reads|writes) shared memory that another thread has written"
    ) as caught:
        relay.on("emulator")(x, x.copy(), c=2, reads_only=reads_only)
    assert "test_clusters.py:" in str(caught.value)


def test_readers_of_the_own_block_need_not_say_so() -> None:
    @tilus.kernel
    def own(x: Tensor[int32, 64]):
        tilus.grid(2, warps=1, cluster=2)
        free = tilus.mbarrier()
        tilus.arrive(free, reads_only=True)

    with pytest.raises(
        tilus.TilusError, match="reads_only=True at a barrier of this block, where it would make no diff"
    ):
        own.ir()


def test_a_lost_arrival_names_who_waits_in_which_block() -> None:
    x = np.zeros((3, 4, 64), np.int32)
    with pytest.raises(tilus.TilusError, match="the blocks of a cluster wait for each other") as caught:
        relay.on("reference")(x, x.copy(), c=4, lost=True)
    text = str(caught.value)
    assert "block 0: at the end" in text and "block 1: warp 0: waits for phase 1 of full[0]" in text


@tilus.kernel
def share(x: Tensor[int32, "rounds", "parts", 64], y: Tensor[int32, "rounds", "blocks", "parts", 64], *, c: Const):
    """Each block of a cluster fetches one part of a tile for all of them, round after round, in two stages of buffers. A stage is
    filled again when every block has said that it is free."""
    tilus.grid(y.shape[1], warps=3, cluster=c)
    tile = tilus.shared(int32, [2, c, 64])
    full, free = tilus.mbarrier(2), tilus.mbarrier(2, arrivals=c)
    rank, rounds = tilus.cluster_rank(), x.shape[0]
    tilus.cluster_sync()
    with tilus.warps(0, 1):
        for k in tilus.range(rounds):
            tilus.wait_barrier(free[k % 2], (k // 2 + 1) % 2)
            tilus.arrive(full[k % 2], nbytes=c * 256)
            tilus.copy_bulk(tile[k % 2, rank], x, [k, rank, 0], barrier=full[k % 2], multicast=(1 << c) - 1)
    with tilus.warps(1, 2):
        for k in tilus.range(rounds):
            tilus.wait_barrier(full[k % 2], k // 2 % 2)
            tilus.store(y, [k, tilus.block_id(0), 0, 0], tilus.load_shared(tile[k % 2]), dims=[2, 3])
            for r in tilus.static_range(c):
                tilus.arrive(free[k % 2], block=r, reads_only=True)


@pytest.mark.parametrize("c", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_part_that_one_block_fetches_lands_in_all(c: int, device: str) -> None:
    x = np.random.default_rng(c).integers(0, 2**31, (5, c, 64), np.int32)
    y = np.zeros((5, 3 * c, c, 64), np.int32)
    share.on(device)(x, y, c=c)
    assert np.array_equal(y, np.broadcast_to(x[:, None], y.shape))


def test_multicast_is_a_copy_to_other_blocks() -> None:
    ptx = share.ptx(c=2)
    assert ptx.count(".multicast::cluster [") == 1 and "barrier.cluster" in ptx
    assemble(ptx, get_target("sm_90a"))
    assert "multicast" not in share.ptx(c=1)


@pytest.mark.parametrize("mask", [0, 4, -1, 0.5])
def test_masks_are_checked(mask: Any) -> None:
    @tilus.kernel
    def masked(x: Tensor[int32, 64]):
        tilus.grid(2, warps=1, cluster=2)
        tile, full = tilus.shared(int32, [64]), tilus.mbarrier()
        tilus.cluster_sync()
        tilus.copy_bulk(tile, x, [0], barrier=full, multicast=mask)

    with pytest.raises(
        tilus.TilusError, match=f"multicast={mask}, expected a mask of the 2 blocks of the cluster, 1 to 3"
    ):
        masked.ir()


@pytest.mark.parametrize("c", SIZES)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_an_exchange_between_real_threads(c: int, device: str) -> None:
    x = np.random.default_rng(c).integers(0, 2**31, (3 * c, 2, c, 64), np.int32)
    y = np.zeros_like(x)
    transpose.on(device)(x, y, c=c)
    assert np.array_equal(by_cluster(y, c), np.swapaxes(by_cluster(x, c), 1, 3))


@pytest.mark.parametrize("c", SIZES)
def test_what_it_becomes(c: int) -> None:
    """Also through the text form of the IR. A cluster of one block needs nothing that sm_80 lacks."""
    function = transpose.ir(c=c)
    parsed = parse_function(print_function(function), INSTRUCTIONS)
    for each in (function, parsed):
        ptx = compile_function(each, get_target("sm_90a")).ptx
        assert (f".reqnctapercluster {c}, 1, 1" in ptx) == ("st.shared::cluster" in ptx) == ("mapa" in ptx) == (c > 1)
        # Two of the kernel, and one at its end: nobody leaves while others write to its memory. At the first there is nothing
        # to hand on.
        arrivals = [line.split(".")[3] for line in ptx.splitlines() if "barrier.cluster.arrive" in line]
        assert arrivals == ["relaxed", "release", "release"][: 3 * (c > 1)]
        assert ptx.count("barrier.cluster.wait.acquire") == 3 * (c > 1)
        assemble(ptx, get_target("sm_90a"))
    if c == 1:
        assemble(transpose.ptx(c=c, target="sm_80"), get_target("sm_80"))


def test_what_was_written_in_front_of_the_first_barrier_is_handed_on() -> None:
    assert "barrier.cluster.arrive.relaxed" not in total.ptx(c=2)


@tilus.kernel
def gathered(x: Tensor[int32, "blocks", 64], y: Tensor[int32, "clusters", 64], *, c: Const, waits: Const = True):
    """The first block of a cluster adds up the rows of all; the others leave as soon as they have given it theirs."""
    tilus.grid(x.shape[0], warps=2, cluster=c, ends_alone=True)
    inbox = tilus.shared(int32, [c, 64])
    given = tilus.mbarrier(arrivals=c)
    tilus.cluster_sync()
    rank, block = tilus.cluster_rank(), tilus.block_id(0)
    tilus.store_shared(inbox[rank], tilus.load(x, [block, 0], [64]), block=0)
    tilus.arrive(given, block=0)
    if rank == 0 and waits:
        tilus.wait_barrier(given, 0)
        tilus.store(y, [block // c, 0], tilus.sum(tilus.load_shared(inbox), 0))


@pytest.mark.parametrize("c", [2, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_blocks_that_end_alone(c: int, device: str) -> None:
    x = np.random.default_rng(c).integers(-1000, 1000, (3 * c, 64), np.int32)
    y = np.zeros((3, 64), np.int32)
    gathered.on(device)(x, y, c=c)
    assert np.array_equal(y, by_cluster(x, c).sum(1, dtype=np.int32))


def test_blocks_that_end_alone_have_no_barrier_at_the_end() -> None:
    function = gathered.ir(c=2)
    for each in (function, parse_function(print_function(function), INSTRUCTIONS)):
        ptx = compile_function(each, get_target("sm_90a")).ptx
        assert ptx.count("barrier.cluster.arrive.relaxed") == ptx.count("barrier.cluster.arrive") == 1


def test_one_that_ends_while_others_write_to_its_memory_is_found() -> None:
    x, y = np.zeros((2, 64), np.int32), np.zeros((1, 64), np.int32)
    with pytest.raises(RaceError, match="exit"):
        gathered.on("emulator")(x, y, c=2, waits=False)


def test_a_kernel_that_keeps_to_its_own_memory_ends_without_a_barrier() -> None:
    @tilus.kernel
    def alone(y: Tensor[int32, "n"]):
        tilus.grid(4, warps=1, cluster=2)
        tilus.store(y, [tilus.block_id(0) * 32], tilus.full([32], tilus.cluster_rank(), dtype=int32))

    y = np.zeros(128, np.int32)
    for device in ("reference", "cpu"):
        alone.on(device)(y)
        assert y.reshape(4, 32).tolist() == [[rank] * 32 for rank in (0, 1, 0, 1)]
    assert "barrier.cluster" not in alone.ptx()


@pytest.mark.parametrize("c", [0, 9, True, 2.0, None])
def test_cluster_sizes_are_checked(c: Any) -> None:
    with pytest.raises(tilus.TilusError, match=f"cluster is {c}, expected a compile-time int from 1 to 8"):
        total.ir(c=c)


@pytest.mark.parametrize("device", ["reference", "emulator"])
def test_a_grid_is_whole_clusters(device: str) -> None:
    x = np.zeros((6, 128), np.int32)
    with pytest.raises(
        tilus.TilusError, match=r"grid of kernel total is 6 in x, expected a multiple of its cluster of 4"
    ):
        total.on(device)(x, x.copy(), c=4)


@pytest.mark.parametrize("target", ["sm_80", "sm_89"])
def test_older_targets_have_no_clusters(target: str) -> None:
    with pytest.raises(tilus.TilusError, match=f"kernel total has clusters of 2 blocks, {target} has none"):
        total.ptx(c=2, target=target)


@tilus.kernel
def wrong(x: Tensor[f32, "n"], *, mistake: Const, cluster: Const = 2):
    tilus.grid(2, warps=2, cluster=cluster)
    s = tilus.shared(f32, [32])
    rank = 2 if mistake == "constant rank" else 0.5 if mistake == "float" else x.shape[0]
    if mistake != "unwritten":
        tilus.store_shared(s, tilus.zeros([32]))
    if mistake == "one path":
        if x.shape[0] > 32:
            tilus.cluster_sync()
    elif mistake != "no barrier":
        tilus.cluster_sync()
    if mistake == "role":
        with tilus.warps(0, 1):
            tilus.cluster_sync()
    if mistake == "store":
        tilus.store_shared(s, tilus.zeros([32]), block=rank)
    else:
        tilus.store(
            x, [0], tilus.load_shared(s, block=1 if mistake in ("no barrier", "one path", "unwritten") else rank)
        )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no barrier", "load_cluster touches another block of the cluster before tilus.cluster_sync"),
        ("one path", "load_cluster touches another block of the cluster before tilus.cluster_sync"),
        ("role", "cluster_sync in a role, which only some warps would come to"),
        ("constant rank", "block is 2, expected 0 to 1: the cluster has 2 blocks"),
        ("float", "block is 0.5 of f32, expected the rank"),
        ("load", "block 32 of a cluster of 2 blocks, expected 0 to 1"),
        ("store", "block 32 of a cluster of 2 blocks, expected 0 to 1"),
        ("unwritten", "was never written"),
    ],
)
def test_mistakes_are_refused_at_their_line(mistake: str, message: str) -> None:
    with pytest.raises(tilus.TilusError, match=message) as caught:
        wrong.ptx(mistake=mistake)  # what the compiler sees; the rest is seen by the reference
        wrong.on("reference")(np.zeros(32, np.float32), mistake=mistake)
    assert "test_clusters.py:" in str(caught.value)


def test_a_text_without_clusters_cannot_reach_other_blocks() -> None:
    text = print_function(total.ir(c=2)).replace(" cluster(2)", "")
    with pytest.raises(
        tilus.TilusError, match=r"load_cluster touches another block(?s:.*)the blocks of kernel total are alone"
    ):
        compile_function(parse_function(text, INSTRUCTIONS), get_target("sm_90a"))


def test_blocks_that_leave_the_branch_do_not_read() -> None:
    @tilus.kernel
    def first_reads(x: Tensor[f32, "blocks", 32]):
        tilus.grid(x.shape[0], warps=1, cluster=2)
        s = tilus.shared(f32, [32])
        block = tilus.block_id(0)
        if tilus.cluster_rank() == 1:
            tilus.store_shared(s, tilus.load(x, [block, 0], [32]))
        tilus.cluster_sync()
        if tilus.cluster_rank() == 0:
            tilus.store(x, [block, 0], tilus.load_shared(s, block=1))

    x = np.arange(6 * 32, dtype=np.float32).reshape(6, 32)
    expected = x[1::2].repeat(2, axis=0)
    first_reads.on("reference")(x)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_the_barrier_does_not_wait_for_blocks_that_have_ended(device: str) -> None:
    @tilus.kernel
    def some_leave(x: Tensor[int32, "blocks", 32]):
        tilus.grid(x.shape[0], warps=1, cluster=4)
        s = tilus.shared(int32, [32])
        block, rank = tilus.block_id(0), tilus.cluster_rank()
        if rank == 3:
            return
        tilus.store_shared(s, tilus.load(x, [block, 0], [32]))
        tilus.cluster_sync()
        tilus.store(x, [block, 0], tilus.load_shared(s, block=2 - rank))

    x = np.arange(8 * 32, dtype=np.int32).reshape(8, 32)
    expected = x[[2, 1, 0, 3, 6, 5, 4, 7]]
    some_leave.on(device)(x)
    assert np.array_equal(x, expected)
