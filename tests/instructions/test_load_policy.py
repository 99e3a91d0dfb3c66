"""What loads say about caches changes no value, is said once, and survives the text form; the size of shared tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilus
from tilus import Const, Tensor, dtypes, f16, f32, int32
from tilus.errors import TilusError
from tilus.instructions import INSTRUCTIONS
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.ptx.assembler import assemble
from tilus.target import TARGETS


@tilus.kernel
def doubled(x: Tensor[f16, "m", "n"], y: Tensor[f16, "m", "n"], *, evict: Const = None, inside: Const = False):
    tilus.grid(tilus.cdiv(x.shape[0], 8), warps=1)
    first = tilus.block_id(0) * 8
    for j in tilus.range(tilus.cdiv(x.shape[1], 64)):
        tile = tilus.load(x, [first, 64 * j], [8, 64], evict=evict, checked=not inside)
        tilus.store(y, [first, 64 * j], tile * 2)


@pytest.mark.parametrize("device", ["reference", "emulator", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("evict", ["first", "last"])
def test_values_are_the_same(device: str, evict: str) -> None:
    x = np.random.default_rng(0).standard_normal((13, 150)).astype(np.float16)
    y = np.zeros_like(x)
    doubled.on(device)(x, y, evict=evict)
    np.testing.assert_array_equal(y, 2 * x)


@pytest.mark.parametrize(
    ("evict", "opcode"), [("first", ".L1::no_allocate.L2::cache_hint"), ("last", ".L2::cache_hint"), (None, "")]
)
def test_every_load_takes_the_policy_which_is_made_once(evict: str | None, opcode: str) -> None:
    text = doubled.ptx(evict=evict, inside=True)
    assert text.count(f"ld.global.nc{opcode}.v4.b32 ") == text.count("ld.global") == 2
    assert text.count(f"createpolicy.fractional.L2::evict_{evict}.b64") == text.count("createpolicy")
    head, _, _ = text.partition("loop_")
    assert text.count("createpolicy") == head.count("createpolicy") == (evict is not None)


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_all_targets_know_policies(target: Any) -> None:
    for evict in ("first", "last"):
        assemble(doubled.ptx(evict=evict, target=target), target)


def test_other_policies_are_refused() -> None:
    with pytest.raises(TilusError, match=r"load: evict='never', expected 'first', 'last' or None"):
        doubled.ir(evict="never")


@tilus.kernel
def sizes(y: Tensor[int32, 4], z: Tensor["T", 4]):
    tilus.grid(1, warps=1)
    tile = tilus.shared(z.dtype, [3, 4, 32])
    padded = tilus.shared(f32, [8, 8], layout=tilus.layout.padded([8, 8], 4))
    for i, n in enumerate([tile.nbytes, tile[1].nbytes, tile[0, 2].nbytes, padded.nbytes]):
        tilus.store(y, [i], tilus.full([1], n, int32))


@pytest.mark.parametrize("name", ["uint1", "uint3", "int4", "f16", "int64"])
def test_bytes_of_shared_tensors_and_of_their_parts(name: str) -> None:
    dtype = dtypes.dtype(name)
    y = np.zeros(4, np.int32)
    z = (
        tilus.packed(np.zeros((dtype.nbits + 1) // 2, np.uint8), dtype, (4,))
        if dtype.nbits < 8
        else np.zeros(4, dtype.numpy)
    )
    sizes.on("reference")(y, z)
    assert y.tolist() == [3 * 4 * 32 * dtype.nbits // 8, 4 * 32 * dtype.nbits // 8, 32 * dtype.nbits // 8, 256]


@tilus.kernel
def copies(x: Tensor[f32, "m", 64], y: Tensor[f32, "m", 64]):
    tilus.grid(4, warps=2, cluster=2)
    tile = tilus.shared(f32, [2, 8, 64])
    full = tilus.mbarrier(2)
    first = tilus.block_id(0) * 8
    tilus.cluster_sync()
    tilus.arrive(full[0], nbytes=4096)
    tilus.copy_bulk(tile[0], x, [first, 0], barrier=full[0], evict="first")
    tilus.copy_tensor(tile[1], x, [first, 0], barrier=full[0], multicast=1 << tilus.cluster_rank())
    tilus.prefetch_bulk(x, [first, 0], [8, 64])
    tilus.wait_barrier(full[0], 0)
    tilus.fence_async()
    tilus.store_bulk(y, [first, 0], tile[0], add=True)
    tilus.store_tensor(y, [first, 0], tile[1], evict="last")
    tilus.commit_stores()
    tilus.wait_stores(1, reads_only=True)
    tilus.store(y, [0, 0], tilus.load(x, [0, 0], [8, 64], evict="first"))


def test_copies_have_a_text_form() -> None:
    text = print_function(copies.ir())
    again = parse_function(text, INSTRUCTIONS)
    assert print_function(again) == text
    for part in ('evict="first"', 'evict="last"', "multicast=1 << block_id(0) % 2", "add=true", "reads_only=true"):
        assert part in text
