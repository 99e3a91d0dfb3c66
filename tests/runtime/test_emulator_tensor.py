"""Bulk tensor copies against boxes that are written out element by element."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from async_kernels import INIT, kernel, run

from tilus.errors import TilusError
from tilus.ptx.assembler import assemble
from tilus.runtime.emulator import EmulatorError, RaceError, TensorMap
from tilus.target import TARGETS

PARAMS = ".param .u64 out, .param .u64 in0, .param .align 64 .b8 map[128]"
LOAD = (
    INIT.format(inits="mbarrier.init.shared::cta.b64 [bars], 1;")
    + """
ld.param.u64 %d0, [out];
mov.b64 %d1, map;
cvta.param.u64 %d2, %d1;
prefetch.tensormap [%d2];
{moves}
@!%p0 bra WAIT;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], {nbytes};
cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [smem+{at}], [%d2, {coords}], [bars];
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [bars], 0;
@!%p3 bra WAIT;
mov.u32 %r10, %r0;
mov.u32 %r11, smem;
COPY:
shl.b32 %r12, %r10, 2;
setp.ge.u32 %p4, %r12, {nbytes};
@%p4 bra DONE;
add.u32 %r13, %r11, %r12;
ld.shared.b32 %r14, [%r13+{at}];
cvt.u64.u32 %d3, %r12;
add.s64 %d3, %d3, %d0;
st.global.b32 [%d3], %r14;
add.u32 %r10, %r10, 32;
bra COPY;
DONE:
"""
)
STORE = """
mov.b64 %d1, map;
cvta.param.u64 %d2, %d1;
ld.param.u64 %d1, [in0];
{moves}
mov.u32 %r10, %r0;
mov.u32 %r11, smem;
COPY:
shl.b32 %r12, %r10, 2;
setp.ge.u32 %p4, %r12, {nbytes};
@%p4 bra DONE;
add.u32 %r13, %r11, %r12;
cvt.u64.u32 %d3, %r12;
add.s64 %d3, %d3, %d1;
ld.global.b32 %r14, [%d3];
st.shared.b32 [%r13], %r14;
add.u32 %r10, %r10, 32;
bra COPY;
DONE:
fence.proxy.async.shared::cta;
bar.sync 0;
@!%p0 ret;
cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%d2, {coords}], [smem];
cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0;
"""


def strides_of(array: npt.NDArray[Any]) -> tuple[int, ...]:
    return array.strides[-2::-1]


def tensor_map(array: npt.NDArray[Any], box: tuple[int, ...], swizzle: int, param: int, **changes: Any) -> TensorMap:
    """The map of a whole array; box innermost first."""
    fields: dict[str, Any] = {
        "param": param, "offset_nbytes": 0, "rank": array.ndim, "element_nbytes": array.itemsize,
        "swizzle_nbytes": swizzle, "dims": array.shape[::-1], "strides_nbytes": strides_of(array), "box": box,
    }  # fmt: skip
    return TensorMap(**(fields | changes))


def coordinates(start: tuple[int, ...]) -> dict[str, str]:
    moves = "\n".join(f"mov.u32 %r{40 + dim}, {value};" for dim, value in enumerate(start))
    return {"moves": moves, "coords": "{" + ", ".join(f"%r{40 + dim}" for dim in range(len(start))) + "}"}


def place_in_shared(linear: int, swizzle: int) -> int:
    """Where byte `linear` of a box goes, for a box at an address that is a multiple of 1024 (PTX ISA, figures of the
    swizzling modes): in 128-byte mode piece p of row r of 128 bytes changes places with piece p xor (r mod 8); the
    64-byte mode has half as many pieces in a row and steps every second row, the 32-byte mode a quarter."""
    if swizzle == 0:
        return linear
    row, piece = linear // swizzle, linear % swizzle // 16
    step = row // (128 // swizzle) % (swizzle // 16)
    return row * swizzle + (piece ^ step) * 16 + linear % 16


def box_bytes(
    array: npt.NDArray[Any], box: tuple[int, ...], start: tuple[int, ...], swizzle: int
) -> npt.NDArray[np.uint8]:
    """What a load of the box leaves in shared memory."""
    size = array.itemsize
    result = np.zeros(int(np.prod(box)) * size, np.uint8)
    for number, index in enumerate(itertools.product(*(range(extent) for extent in reversed(box)))):
        where = tuple(i + s for i, s in zip(index, reversed(start), strict=True))
        if all(0 <= i < n for i, n in zip(where, array.shape, strict=True)):
            value = np.frombuffer(array[where].tobytes(), np.uint8)
            for byte in range(size):
                result[place_in_shared(number * size + byte, swizzle)] = value[byte]
    return result


def load(array: npt.NDArray[Any], box: tuple[int, ...], start: tuple[int, ...], swizzle: int, **changes: Any) -> Any:
    nbytes = int(np.prod(box)) * array.itemsize
    out = np.zeros(nbytes, np.uint8)
    at = changes.pop("at", 0)
    body = LOAD.format(rank=array.ndim, nbytes=nbytes, at=at, **coordinates(start))
    run(body, out, array, tensor_map(array, box, swizzle, 1, **changes), params=PARAMS, shared=max(4096, at + nbytes))
    return out


def store(array: npt.NDArray[Any], data: Any, box: tuple[int, ...], start: tuple[int, ...], swizzle: int) -> None:
    body = STORE.format(rank=array.ndim, nbytes=data.nbytes, **coordinates(start))
    run(body, array, data, tensor_map(array, box, swizzle, 0), params=PARAMS, shared=max(4096, data.nbytes))


def filled(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    return np.random.default_rng(3).integers(1, 1 << 30, shape).astype(dtype)


# Starts are multiples of 16 bytes in the innermost dim.
INSIDE = [
    ((64,), np.uint8, (32,), (16,), 0),
    ((48,), np.uint16, (32,), (24,), 0),
    ((24, 40), np.uint16, (16, 8), (24, 7), 0),
    ((24, 40), np.uint16, (16, 8), (8, 3), 32),
    ((24, 40), np.uint16, (32, 16), (16, 20), 64),
    ((40, 32), np.uint16, (32, 24), (0, 3), 64),
    ((40, 16), np.uint16, (16, 24), (0, 3), 32),
    ((24, 64), np.uint16, (64, 16), (0, 0), 128),
    ((24, 64), np.uint16, (64, 16), (40, 13), 128),
    ((24, 144), np.uint8, (128, 10), (32, 2), 128),
    ((12, 12), np.uint64, (4, 12), (10, 5), 32),
    ((3, 10, 64), np.uint16, (64, 4, 2), (8, 8, 1), 128),
    ((2, 3, 5, 16), np.uint16, (16, 3, 2, 2), (8, 3, 1, 0), 32),
    ((2, 2, 3, 4, 16), np.uint8, (16, 2, 2, 2, 2), (0, 3, 1, 1, 1), 0),
]
IN_FRONT = [
    ((48,), np.uint16, (32,), (-8,), 0),
    ((24, 40), np.uint16, (16, 16), (-8, -2), 32),
    ((24, 64), np.uint16, (64, 16), (-8, 13), 128),
    ((12, 12), np.uint32, (32, 12), (-12, -1), 128),
    ((3, 10, 16), np.uint16, (16, 4, 2), (8, -1, 2), 0),
    ((2, 3, 5, 16), np.uint16, (16, 3, 2, 2), (8, 3, -1, 0), 32),
    ((2, 2, 3, 4, 16), np.uint8, (16, 2, 2, 2, 2), (0, 3, 1, -1, 1), 0),
]


@pytest.mark.parametrize(("shape", "dtype", "box", "start", "swizzle"), [*INSIDE, *IN_FRONT])
def test_a_load_brings_the_box_with_zeros_outside(shape: Any, dtype: Any, box: Any, start: Any, swizzle: int) -> None:
    array = filled(shape, dtype)
    assert load(array, box, start, swizzle).tolist() == box_bytes(array, box, start, swizzle).tolist()


@pytest.mark.parametrize(("shape", "dtype", "box", "start", "swizzle"), INSIDE)
def test_a_store_changes_what_is_inside_and_nothing_else(
    shape: Any, dtype: Any, box: Any, start: Any, swizzle: int
) -> None:
    """A store of what a load brings changes nothing; of other data, exactly the elements of the box."""
    before = filled(shape, dtype)
    other = (before ^ np.array(0x55, dtype)).astype(dtype)
    array = before.copy()
    store(array, box_bytes(other, box, start, swizzle), box, start, swizzle)
    want = before.copy()
    for index in itertools.product(*(range(extent) for extent in reversed(box))):
        where = tuple(i + s for i, s in zip(index, reversed(start), strict=True))
        if all(0 <= i < n for i, n in zip(where, shape, strict=True)):
            want[where] = other[where]
    assert array.tolist() == want.tolist()


@pytest.mark.parametrize(("shape", "dtype", "box", "start", "swizzle"), IN_FRONT)
def test_a_store_may_not_start_in_front(shape: Any, dtype: Any, box: Any, start: Any, swizzle: int) -> None:
    """CUDA programming guide, on tensor maps: the first corner of a tile may have negative indices when it is read only."""
    array = filled(shape, dtype)
    data = np.zeros(int(np.prod(box)) * array.itemsize, np.uint8)
    corner = ", ".join(map(str, start)) + ("," if len(start) == 1 else "")
    with pytest.raises(EmulatorError, match=rf"a store to a box at coordinates \({corner}\), expected 0 or more"):
        store(array, data, box, start, swizzle)
    assert array.tolist() == filled(shape, dtype).tolist()


@pytest.mark.parametrize("stores", [False, True])
@pytest.mark.parametrize(
    ("dtype", "start", "nbytes"),
    [
        (np.uint8, 5, 5),
        (np.uint8, -5, -5),
        (np.uint8, 24, 24),
        (np.uint16, 4, 8),
        (np.uint32, -2, -8),
        (np.uint64, 1, 8),
    ],
)
def test_boxes_start_at_multiples_of_16_bytes_of_a_row(dtype: Any, start: int, nbytes: int, stores: bool) -> None:
    array = filled((24, 64), dtype)
    box = (16, 8)
    with pytest.raises(EmulatorError, match=rf"whose innermost one is {nbytes} bytes, expected a multiple of 16"):
        if stores:
            store(array, np.zeros(128 * array.itemsize, np.uint8), box, (start, 0), 0)
        else:
            load(array, box, (start, 0), 0)


def test_a_part_of_an_array_with_strides() -> None:
    whole = filled((32, 64), np.uint16)
    part = whole[4:20, 8:40]  # 8 elements: 16 bytes
    got = load(
        whole, (16, 8), (24, 12), 32, offset_nbytes=(4 * 64 + 8) * 2, dims=(32, 16), strides_nbytes=(128,)
    )  # fmt: skip
    assert got.tolist() == box_bytes(part, (16, 8), (24, 12), 32).tolist()


def test_a_row_that_ends_inside_of_8_bytes() -> None:
    whole = filled((24, 48), np.uint16)
    got = load(whole, (16, 8), (16, 2), 32, dims=(30, 24))
    assert got.tolist() == box_bytes(whole[:, :30], (16, 8), (16, 2), 32).tolist()


def test_the_swizzle_goes_by_the_address() -> None:
    """A box at 128 bytes past a multiple of 1024: its first row is swizzled as the second one of the pattern."""
    array = filled((8, 64), np.uint16)
    linear = np.ascontiguousarray(array).view(np.uint8).reshape(8, 8, 16)
    got = load(array, (64, 8), (0, 0), 128, at=128).reshape(8, 8, 16)
    for row, piece in itertools.product(range(8), range(8)):
        assert got[row, piece ^ (row + 1) % 8].tolist() == linear[row, piece].tolist()


def test_a_map_that_does_not_fit() -> None:
    array = filled((24, 64), np.uint16)
    with pytest.raises(EmulatorError, match="a tensor map of rank 2, expected 1"):
        body = LOAD.format(rank=1, nbytes=128, at=0, **coordinates((0,)))
        run(body, np.zeros(128, np.uint8), array, tensor_map(array, (64, 1), 0, 1), params=PARAMS)
    with pytest.raises(EmulatorError, match="reaches outside of every buffer"):
        load(array, (64, 8), (0, 20), 0, dims=(64, 25))
    with pytest.raises(EmulatorError, match=r"misaligned access .not a multiple of 128"):
        load(array, (64, 8), (0, 0), 0, at=64)
    body = LOAD.format(rank=2, nbytes=1024, at=0, **coordinates((0, 0)))
    arguments = (np.zeros(1024, np.uint8), array, tensor_map(array, (64, 8), 0, 1))
    for right, wrong in (("mov.b64 %d1, map;", "mov.b64 %d1, out;"), ("cvta.param.u64 %d2, %d1;", "mov.u64 %d2, %d1;")):
        with pytest.raises(EmulatorError, match=r"expected the generic address of one of the parameters \['map'\]"):
            run(body.replace(right, wrong), *arguments, params=PARAMS)
    with pytest.raises(EmulatorError, match=r"expected .register, .coordinates.."):
        run(body.replace("[%d2, {", "[map, {"), *arguments, params=PARAMS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1}, "rank"), ({"element_nbytes": 3}, "elements"), ({"swizzle_nbytes": 16}, "swizzle"),
        ({"box": (64, 257)}, "box extents"), ({"strides_nbytes": (120,)}, "multiples of 16"), ({"box": (4, 8)}, "innermost"),
        ({"swizzle_nbytes": 64}, "innermost"), ({"offset_nbytes": 8}, "multiple of 16"), ({"param": 2}, "is no array"),
    ],
)  # fmt: skip
def test_maps_that_the_driver_would_refuse(changes: dict[str, Any], message: str) -> None:
    array = filled((24, 64), np.uint16)
    body = LOAD.format(rank=2, nbytes=1024, at=0, **coordinates((0, 0)))
    right = tensor_map(array, (64, 8), 128, 1)
    with pytest.raises(TilusError, match=message):
        run(body, np.zeros(1024, np.uint8), array, dataclasses.replace(right, **changes), params=PARAMS)


@pytest.mark.parametrize("seed", range(4))
def test_a_tensor_load_must_be_waited_for(seed: int) -> None:
    array = filled((24, 64), np.uint16)
    body = LOAD.format(rank=2, nbytes=1024, at=0, **coordinates((0, 0)))
    wait = "mbarrier.try_wait.parity.shared::cta.b64 %p3, [bars], 0;\n@!%p3 bra WAIT;"
    arguments = (np.zeros(1024, np.uint8), array, tensor_map(array, (64, 8), 128, 1))
    run(body, *arguments, params=PARAMS, seed=seed)
    with pytest.raises(RaceError, match=r"reads shared memory(.|\n)*(in flight|asynchronous copy)(.|\n)*tensor\.2d"):
        run(body.replace(wait, ""), *arguments, params=PARAMS, seed=seed)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("fence.proxy.async.shared::cta;", r"stored to without a fence\.proxy\.async(.|\n)*st\.shared\.b32"),
        ("bar.sync 0;", "race: reads shared memory that another thread has written|reads uninitialised"),
        ("cp.async.bulk.commit_group;", "exits while a bulk copy"),
        ("cp.async.bulk.wait_group.read 0;", "exits while a bulk copy"),
    ],
)
def test_what_a_tensor_store_needs(instruction: str, message: str) -> None:
    array, data = filled((24, 64), np.uint16), np.zeros(1024, np.uint8)
    body = STORE.format(rank=2, nbytes=1024, **coordinates((0, 0)))
    with pytest.raises(EmulatorError, match=message):
        run(body.replace(instruction, ""), array, data, tensor_map(array, (64, 8), 128, 0), params=PARAMS)


def test_prefetches_and_cache_hints() -> None:
    array = filled((24, 64), np.uint16)
    body = LOAD.format(rank=2, nbytes=1024, at=0, **coordinates((0, 0)))
    policy = "createpolicy.fractional.L2::evict_first.b64 %d9, 1.0;\n"
    prefetch = "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%d2, {%r40, %r41}];\n"
    body = body.replace("@!%p0 bra WAIT;", policy + prefetch + "@!%p0 bra WAIT;")
    body = body.replace("complete_tx::bytes", "complete_tx::bytes.L2::cache_hint").replace(
        "}], [bars]", "}], [bars], %d9"
    )
    out = np.zeros(1024, np.uint8)
    run(body, out, array, tensor_map(array, (64, 8), 128, 1), params=PARAMS)
    assert out.tolist() == box_bytes(array, (64, 8), (0, 0), 128).tolist()


def test_ptxas_reads_what_these_tests_run() -> None:
    for body in (
        LOAD.format(rank=2, nbytes=1024, at=0, **coordinates((0, 0))),
        STORE.format(rank=3, nbytes=1024, **coordinates((0, 0, 0))),
    ):
        assemble(kernel(body, params=PARAMS), TARGETS["sm_90a"])
