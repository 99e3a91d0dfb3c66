"""wgmma.mma_async of every shape and type against numpy, with operands placed one element at a time by the ISA's tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from wgmma_kernels import (
    DONE,
    DTYPES,
    FENCE,
    A,
    D,
    Layout,
    a_words,
    braces,
    descriptor,
    fill,
    load_rows,
    matrix_of,
    run_wgmma,
    store_rows,
    wgmma,
    words_of,
)  # fmt: skip

from tilus.runtime.emulator import EmulatorError

FENCES = f"{FENCE}\nbar.sync 0;\nwgmma.fence.sync.aligned;\n"


def small(rng: np.random.Generator, shape: tuple[int, int], type_name: str) -> npt.NDArray[Any]:
    """Values whose products and sums are exact in every accumulator."""
    low, high = (0, 8) if type_name == "u8" else (-7, 8)
    values = rng.integers(low, high, shape)
    return values.astype(np.float32).astype(DTYPES[type_name])


def product(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return a.astype(np.float64) @ b.astype(np.float64).T


def multiply(
    types: str, n: int, a: npt.NDArray[Any], b: npt.NDArray[Any], layout_b: Layout, *,
    layout_a: Layout | None = None, scale_d: str = "1", scales: str = "1, 1", c: npt.NDArray[Any] | None = None,
    setup: str = "",
) -> npt.NDArray[Any]:  # fmt: skip
    """a b^T (plus c) by one wgmma; A in registers when it has no layout. types: as in the opcode, D first."""
    d_type = types.removeprefix("satfinite.").partition(".")[0]
    dtype = DTYPES[d_type]
    image = layout_b.image(b)
    fields_a = 0
    if layout_a is not None:
        fields_a = layout_a.descriptor(len(image))
        image = np.concatenate([image, layout_a.image(a)])
    count = n // 4 if d_type == "f16" else n // 2
    first = setup + load_rows("%d2", A, 4) + load_rows("%d3", D, count) + fill(len(image))
    first += descriptor("%d10", fields_a) + descriptor("%d11", layout_b.descriptor()) + FENCES
    tail = scale_d + (f", {scales}" if d_type != "s32" else "")
    if a.dtype.itemsize == 2:
        tail += ("" if layout_a is None else f", {int(not layout_a.k_major)}") + f", {int(not layout_b.k_major)}"
    shape = f"m64n{n}k{32 // a.dtype.itemsize}.{types}"
    operand = braces(A, 4) if layout_a is None else "%d10"
    body = first + wgmma(shape, count, operand, "%d11", tail) + DONE + store_rows("%d0", D, count)
    out = np.zeros((128, count), np.uint32)
    start = np.zeros((64, n), dtype) if c is None else c
    run_wgmma(body, out, image, a_words(a), words_of(start), shared=len(image))
    return matrix_of(out, n, dtype)


NS = list(range(8, 257, 8))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("n", NS)
def test_every_n(n: int) -> None:
    """f16 with f32 and f16 accumulators, A in memory and in registers, added to what the accumulators hold."""
    rng = np.random.default_rng(n)
    a, b = small(rng, (64, 16), "f16"), small(rng, (n, 16), "f16")
    for d_type, layout_a in (("f32", Layout(64, 2, 128)), ("f16", None)):
        c = small(rng, (64, n), d_type)
        got = multiply(f"{d_type}.f16.f16", n, a, b, Layout(n, 2, 128), layout_a=layout_a, c=c)
        assert got.astype(np.float64).tolist() == (product(a, b) + c).tolist()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("n", [n for n in NS if n <= 32 or n % 16 == 0])
@pytest.mark.parametrize(("a_type", "b_type"), [("s8", "s8"), ("u8", "s8")])
def test_every_n_of_integers(n: int, a_type: str, b_type: str) -> None:
    rng = np.random.default_rng(n)
    a = rng.integers(0, 256, (64, 32)).astype(np.uint8).view(DTYPES[a_type])
    b = rng.integers(0, 256, (n, 32)).astype(np.uint8).view(DTYPES[b_type])
    c = rng.integers(-(1 << 30), 1 << 30, (64, n)).astype(np.int32)
    got = multiply(f"s32.{a_type}.{b_type}", n, a, b, Layout(n, 1, 32), c=c)
    assert got.tolist() == (a.astype(np.int64) @ b.astype(np.int64).T + c).tolist()


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("d_type", "a_type", "b_type"),
    [
        ("f32", "bf16", "bf16"), ("f32", "tf32", "tf32"), ("f32", "e4m3", "e4m3"), ("f32", "e5m2", "e4m3"),
        ("f16", "e4m3", "e5m2"), ("s32", "u8", "u8"), ("s32", "s8", "u8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("n", [8, 80, 256])
def test_every_type(d_type: str, a_type: str, b_type: str, in_memory: bool, n: int) -> None:
    rng = np.random.default_rng(n)
    nbytes = np.dtype(DTYPES[a_type]).itemsize
    a, b = small(rng, (64, 32 // nbytes), a_type), small(rng, (n, 32 // nbytes), b_type)
    c = rng.integers(-100, 100, (64, n)).astype(DTYPES[d_type])
    layout_a = Layout(64, nbytes, 64) if in_memory else None
    got = multiply(f"{d_type}.{a_type}.{b_type}", n, a, b, Layout(n, nbytes), layout_a=layout_a, c=c)
    assert got.astype(np.float64).tolist() == (product(a, b) + c).tolist()


@pytest.mark.sampled(9)
@pytest.mark.parametrize("swizzle_a", [0, 32, 64, 128])
@pytest.mark.parametrize("k_major_a", [False, True])
@pytest.mark.parametrize("swizzle_b", [0, 32, 64, 128])
@pytest.mark.parametrize("k_major_b", [False, True])
def test_every_swizzle_and_major(swizzle_a: int, k_major_a: bool, swizzle_b: int, k_major_b: bool) -> None:
    rng = np.random.default_rng(1)
    for n in (8, 72, 128):
        a, b = rng.normal(size=(64, 16)).astype(np.float16), rng.normal(size=(n, 16)).astype(np.float16)
        layouts = Layout(n, 2, swizzle_b, k_major_b), Layout(64, 2, swizzle_a, k_major_a)
        got = multiply("f32.f16.f16", n, a, b, layouts[0], layout_a=layouts[1])
        np.testing.assert_allclose(got, product(a, b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nbytes", [1, 4])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_every_swizzle_of_other_widths(nbytes: int, swizzle: int) -> None:
    rng = np.random.default_rng(2)
    a_type, d_type = ("s8", "s32") if nbytes == 1 else ("tf32", "f32")
    a, b = small(rng, (64, 32 // nbytes), a_type), small(rng, (40 if nbytes == 4 else 48, 32 // nbytes), a_type)
    layouts = Layout(len(b), nbytes, swizzle), Layout(64, nbytes, swizzle)
    got = multiply(f"{d_type}.{a_type}.{a_type}", len(b), a, b, layouts[0], layout_a=layouts[1])
    assert got.tolist() == product(a, b).tolist()


@pytest.mark.parametrize("step", range(4))
def test_a_step_along_k_inside_the_swizzle_moves_the_start_address(step: int) -> None:
    """A tile of 64 k in rows of 128 bytes: the descriptor of k 16 s .. starts 32 s bytes later."""
    rng = np.random.default_rng(3)
    a, b = small(rng, (64, 16), "bf16"), small(rng, (24, 16), "bf16")
    layouts = Layout(24, 2, 128, start=32 * step), Layout(64, 2, 128, start=32 * (3 - step))
    got = multiply("f32.bf16.bf16", 24, a, b, layouts[0], layout_a=layouts[1])
    assert got.tolist() == product(a, b).tolist()


@pytest.mark.parametrize("scales", ["1, 1", "-1, 1", "1, -1", "-1, -1"])
@pytest.mark.parametrize("scale_d", ["1", "0", "%p5", "!%p5"])
def test_scales(scales: str, scale_d: str) -> None:
    rng = np.random.default_rng(4)
    a, b, c = small(rng, (64, 16), "f16"), small(rng, (16, 16), "f16"), small(rng, (64, 16), "f32")
    setup = "setp.eq.u32 %p5, %r0, %r0;\n"
    sign = -1 if scales.count("-") == 1 else 1
    got = multiply("f32.f16.f16", 16, a, b, Layout(16, 2, 64), scale_d=scale_d, scales=scales, c=c, setup=setup)
    assert got.tolist() == (sign * product(a, b) + (c if scale_d in ("1", "%p5") else 0)).tolist()


def test_integers_wrap_or_saturate() -> None:
    a, b = np.full((64, 32), 127, np.int8), np.full((8, 32), 127, np.int8)
    b[1] = -127
    c = np.full((64, 8), np.iinfo(np.int32).max - 5, np.int32)
    c[:, 1] = np.iinfo(np.int32).min + 5
    wide = product(a, b).astype(np.int64) + c
    got = multiply("s32.s8.s8", 8, a, b, Layout(8, 1), c=c)
    assert got.tolist() == wide.astype(np.int32).tolist()
    got = multiply("satfinite.s32.s8.s8", 8, a, b, Layout(8, 1), c=c)
    assert got.tolist() == np.clip(wide, np.iinfo(np.int32).min, np.iinfo(np.int32).max).tolist()


def test_tf32_ignores_the_lower_bits() -> None:
    rng = np.random.default_rng(5)
    a, b = small(rng, (64, 8), "tf32"), small(rng, (8, 8), "tf32")
    noisy = (a.view(np.uint32) | rng.integers(0, 1 << 13, a.shape).astype(np.uint32)).view(np.float32)
    assert multiply("f32.tf32.tf32", 8, noisy, b, Layout(8, 4)).tolist() == product(a, b).tolist()


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("blocks", [1, 3])
def test_two_warpgroups_chain_operations_over_k(seed: int | None, blocks: int) -> None:
    """Each of two warpgroups of a block takes 64 rows; four steps of k chain in one group of operations."""
    rng = np.random.default_rng(6)
    n, k = 32, 64
    a, b = small(rng, (128, k), "f16"), small(rng, (n, k), "f16")
    tile = [Layout(n, 2, 128, start=32 * step) for step in range(4)]
    image = np.bitwise_or.reduce([tile[s].image(b[:, 16 * s : 16 * s + 16]) for s in range(4)])
    words = np.concatenate(
        [[a_words(a[64 * g : 64 * g + 64, 16 * s : 16 * s + 16]) for s in range(4)] for g in range(2)]
    )
    rows = words.reshape(2, 4, 128, 4).transpose(0, 2, 1, 3).reshape(256, 16)
    body = load_rows("%d2", A, 16) + fill(len(image))
    body += "".join(descriptor(f"%d{10 + s}", tile[s].descriptor()) for s in range(4)) + FENCES
    for s in range(4):
        operands = braces(A + 4 * s, 4), f"%d{10 + s}"
        body += wgmma(f"m64n{n}k16.f32.f16.f16", n // 2, *operands, f"{int(s > 0)}, 1, 1, 0")
    body += DONE + "mov.u32 %r3, %ctaid.x;\nmad.lo.u32 %r0, %r3, 256, %r0;\n" + store_rows("%d0", D, n // 2)
    out = np.zeros((blocks * 256, n // 2), np.uint32)
    run_wgmma(
        body, out, image, np.ascontiguousarray(rows), shared=len(image), threads=256, grid=(blocks, 1, 1), seed=seed
    )
    want = product(a, b)
    for block in range(blocks):
        for group in range(2):
            part = out[256 * block + 128 * group :][:128]
            assert matrix_of(part, n, np.float32).tolist() == want[64 * group : 64 * group + 64].tolist()


@pytest.mark.parametrize(
    "opcode",
    [
        "m64n12k16.f32.f16.f16", "m64n264k16.f32.f16.f16", "m64n8k8.f32.f16.f16", "m64n40k32.s32.s8.s8",
        "m64n8k16.f16.bf16.bf16", "m64n8k16.f32.f16.bf16", "m64n8k32.s32.s8.e4m3", "m64n8k16.satfinite.f32.f16.f16",
        "m64n8k256.s32.b1.b1.and.popc",
    ],
)  # fmt: skip
def test_unknown_shapes_and_types_are_refused(opcode: str) -> None:
    with pytest.raises(EmulatorError, match=r"does not know|modelled"):
        body = f"wgmma.mma_async.sync.aligned.{opcode} {braces(D, 4)}, %d10, %d11, 1, 1, 1, 0, 0;"
        run_wgmma(body, np.zeros(1, np.uint32), shared=1024)
