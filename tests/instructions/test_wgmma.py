"""wgmma through the language, on exact data: every type, layout and partition; on the reference, and as PTX on the emulator.

Numbers are small integers, so that products and sums are exact in every accumulator and in any order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tilus
from tilus import Const, Tensor, TilusError, bf16, f16, f32, float8_e4m3, int8, int32
from tilus.compiler import Compiled, compile_function
from tilus.dtypes import DataType
from tilus.instructions import INSTRUCTIONS
from tilus.instructions.wgmma import Wgmma
from tilus.instructions.wgmma_atoms import WGMMA_ATOMS, WgmmaAtom
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.ir.tensor import RegisterTensor
from tilus.ir.visit import instructions
from tilus.layout import RegisterLayout, column_spatial, local, replicated, spatial, wgmma_forms, wgmma_operand
from tilus.layout.atoms import mma_a, mma_c, wgmma_a, wgmma_d
from tilus.ptx.assembler import assemble
from tilus.ptx.sass import disassemble
from tilus.target import get_target

Array = npt.NDArray[Any]
DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
HALF, FP8, INT8 = (next(a for a in WGMMA_ATOMS if a.a == a.b == dtype) for dtype in (f16, float8_e4m3, int8))


@tilus.kernel
def multiply(
    x: Tensor["tx", "m", "k"], y: Tensor["ty", "n", "k"], z: Tensor["td", "m", "n"], out: Tensor["td", "m", "n"],
    *, shape: Const, a: Const, b: Const, registers: Const = False, adds: Const = True, x_memory: Const = None,
    y_memory: Const = None, a_layout: Const = None, d_layout: Const = None, warps: Const = 4,
):  # fmt: skip
    tilus.grid(1, warps=warps)
    m, n, k = shape
    left = tilus.cast(tilus.load(x, [0, 0], shape=[m, k]), a)
    ys = tilus.shared(b, [n, k], layout=y_memory)
    tilus.store_shared(ys, tilus.cast(tilus.load(y, [0, 0], shape=[n, k]), b))
    if not registers:
        xs = tilus.shared(a, [m, k], layout=x_memory)
        tilus.store_shared(xs, left)
        left = xs
    elif a_layout is not None:
        left = tilus.with_layout(left, a_layout)
    tilus.fence_async()
    tilus.sync()
    acc = tilus.load(z, [0, 0], shape=[m, n]) if adds else None
    if adds and d_layout is not None:
        acc = tilus.with_layout(acc, d_layout)
    acc = tilus.wgmma(left, ys, acc)
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


def carrier(dtype: DataType) -> DataType:
    """The type of the arrays that are cast to `dtype`: one that numpy has."""
    return dtype if dtype.is_integer else f32


def operands(atom: WgmmaAtom, shape: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(sum(shape))
    m, n, k = shape
    arrays: list[Array] = []
    for dtype, extents in ((atom.a, (m, k)), (atom.b, (n, k))):
        limit = 3 if atom.d == f16 else 8
        low, high = (-limit, limit) if dtype.is_float else (int(dtype.min_value), int(dtype.max_value))
        arrays.append(rng.integers(low, high, extents, endpoint=True).astype(carrier(dtype).numpy))
    acc = rng.integers(-100, 100, (m, n)).astype(atom.d.numpy)
    if atom.d == int32:
        acc[0, 0], acc[-1, -1] = np.iinfo(np.int32).max, np.iinfo(np.int32).min  # sums wrap
    return arrays[0], arrays[1], acc


def expected(x: Array, y: Array, z: Array) -> Array:
    total = x.astype(np.int64) @ y.astype(np.int64).T + z.astype(np.int64)
    return total.astype(np.uint32).view(np.int32) if z.dtype == np.int32 else total.astype(z.dtype)


def compiled_for(atom: WgmmaAtom, shape: tuple[int, int, int], **options: Any) -> Compiled:
    m, n, k = shape
    types: dict[str, Any] = {"tx": carrier(atom.a), "ty": carrier(atom.b), "td": atom.d, "m": m, "n": n, "k": k}
    specialization = multiply.specialize(shape=shape, a=atom.a, b=atom.b, **types, **options)
    return compile_function(specialization.function, get_target("sm_90a"))


def check(device: str, atom: WgmmaAtom, shape: tuple[int, int, int], *, adds: bool = True, **options: Any) -> None:
    x, y, z = operands(atom, shape)
    out = np.full_like(z, 7)
    multiply.on(device)(x, y, z, out, shape=shape, a=atom.a, b=atom.b, adds=adds, **options)
    np.testing.assert_array_equal(out, expected(x, y, z if adds else np.zeros_like(z)))


def widths_of(compiled: Compiled) -> list[int]:
    """n of every instruction."""
    opcodes = [line.split()[0] for line in compiled.ptx.splitlines() if "wgmma.mma_async" in line]
    return [int(opcode.split(".")[4].split("n")[1].split("k")[0]) for opcode in opcodes]


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("registers", [True, False], ids=["registers", "shared"])
@pytest.mark.parametrize("atom", WGMMA_ATOMS, ids=lambda atom: f"{atom.a}-{atom.b}-{atom.d}")
def test_every_atom(atom: WgmmaAtom, registers: bool, device: str) -> None:
    check(device, atom, (64, 24, 3 * atom.k), registers=registers, adds=registers or atom.d == f16)


@pytest.mark.parametrize("atom", WGMMA_ATOMS, ids=lambda atom: f"{atom.a}-{atom.b}-{atom.d}")
def test_every_atom_assembles(atom: WgmmaAtom) -> None:
    """The version that the PTX asks for has it, too."""
    for registers in (True, False):
        assemble(compiled_for(atom, (64, 24, 3 * atom.k), registers=registers).ptx, get_target("sm_90a"))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("registers", [True, False], ids=["registers", "shared"])
@pytest.mark.parametrize(
    ("m", "n", "k", "warps"),
    [
        (64, 8, 64, 4),
        (128, 128, 32, 4),
        (64, 264, 16, 4),
        (192, 40, 64, 12),
        (128, 64, 64, 8),
        (256, 16, 64, 8),
        (64, 128, 64, 8),
        (64, 8, 64, 8),
        (64, 512, 16, 8),
    ],
)
def test_extents_and_warps(m: int, n: int, k: int, warps: int, registers: bool, device: str) -> None:
    check(device, HALF, (m, n, k), registers=registers, warps=warps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("atom", [HALF, FP8, INT8], ids=lambda atom: atom.a.name)
def test_every_form(atom: WgmmaAtom, device: str) -> None:
    """Both operands in every layout from which they can be read, deeper than the widest block of swizzled rows."""
    m, n, k = 64, 64, 256 // atom.a.nbytes
    a_forms, b_forms = (list(wgmma_forms((rows, k), atom.a.nbytes)) for rows in (m, n))
    assert len(a_forms) == len(b_forms) == (8 if atom.a.nbits == 16 else 4)
    for x_memory, y_memory in zip(a_forms, b_forms[1:] + b_forms[:1], strict=True):
        check(device, atom, (m, n, k), x_memory=x_memory, y_memory=y_memory, warps=8)


# Partitions of m = 256 rows and n = 64 columns over 8 warps, as layouts of 16 x 8 blocks whose "threads" are warps: warpgroups
# one below the other, taking turns, and side by side.
GROUPS = [
    spatial(2, 1) * local(2, 1) * spatial(4, 1) * local(1, 8),
    local(2, 1) * spatial(2, 1) * spatial(4, 1) * local(1, 8),
    local(4, 1) * spatial(1, 2) * spatial(4, 1) * local(1, 4),
]
# Where A is in registers, a warp's rows may be any: all of its rows together, all warps in turn, columns first, others.
ROWS = [
    spatial(8, 1) * local(2, 8),
    local(2, 1) * spatial(8, 1) * local(1, 8),
    local(2, 8) * spatial(8, 1),
    spatial(1, 2) * column_spatial(4, 1) * local(4, 4),
    spatial(2, 1) * local(2, 1) * column_spatial(4, 1) * local(1, 8),
]


def the_product(compiled: Compiled) -> Wgmma:
    (found,) = (s.inst for s in instructions(compiled.function.body) if isinstance(s.inst, Wgmma))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("blocks", "registers"), [*((b, False) for b in GROUPS), *((b, True) for b in (*GROUPS, *ROWS))], ids=str
)
def test_the_layout_of_the_sums_decides(blocks: RegisterLayout, registers: bool, device: str) -> None:
    options: dict[str, Any] = {"registers": registers, "d_layout": blocks * mma_c(), "warps": 8}
    check(device, HALF, (256, 64, 32), **options)
    assert the_product(compiled_for(HALF, (256, 64, 32), **options)).out.layout == blocks * mma_c()


@pytest.mark.parametrize("blocks", [ROWS[0], ROWS[3]], ids=str)
def test_rows_of_a_in_shared_memory_are_where_the_hardware_has_them(blocks: RegisterLayout) -> None:
    """The sum cannot be pinned to other rows: its conversion would read a product that is under way."""
    with pytest.raises(TilusError, match=r"convert reads .* while wgmma still adds to it") as caught:
        compiled_for(HALF, (256, 64, 32), d_layout=blocks * mma_c(), warps=8)
    assert caught.value.hint is not None and caught.value.hint.startswith("wgmma cannot add in the layout")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("a_blocks", "d_blocks"),
    [
        (spatial(8, 1) * local(2, 4), spatial(8, 1) * local(2, 8)),
        (local(2, 4) * spatial(8, 1), local(2, 1) * spatial(8, 1) * local(1, 8)),
        (
            local(1, 2) * spatial(2, 1) * local(2, 2) * spatial(4, 1),
            spatial(2, 1) * local(2, 1) * spatial(4, 1) * local(1, 8),
        ),
        (local(4, 4) * replicated(2, 2) * spatial(4, 1), local(4, 1) * spatial(1, 2) * spatial(4, 1) * local(1, 4)),
    ],
    ids=str,
)
def test_the_layout_of_a_decides(a_blocks: RegisterLayout, d_blocks: RegisterLayout, device: str) -> None:
    """Rows stay where they are, and warpgroups that hold the same rows share the columns."""
    layout = a_blocks * mma_a()
    check(device, HALF, (256, 64, 64), registers=True, a_layout=layout, warps=8)
    found = the_product(compiled_for(HALF, (256, 64, 64), registers=True, a_layout=layout, warps=8))
    assert isinstance(found.a, RegisterTensor) and found.a.layout == layout
    assert found.out.layout == d_blocks * mma_c()


def test_fragments_of_one_warpgroup_are_those_of_the_isa() -> None:
    found = the_product(compiled_for(HALF, (64, 48, 16), registers=True))
    assert isinstance(found.a, RegisterTensor)
    assert (found.a.layout, found.out.layout) == (wgmma_a(), wgmma_d(48))


@tilus.kernel
def parts_of_operands(
    x: Tensor[f16, "m", "k"], y: Tensor[f16, "k", "n"], out: Tensor[f32, "bm", "bn"], *, shape: Const, tile: Const, at: Const,
    memory: Const,
):  # fmt: skip
    """One tile of the whole product, from the middle of two transposed buffers, at offsets that are known at run time."""
    tilus.grid(1, warps=4)
    m, n, k = shape
    i, j, depth = (c + tilus.block_id(0) * 64 for c in at)
    xs = tilus.shared(f16, [2, k, m], layout=memory)
    ys = tilus.shared(f16, [2, k, n])
    tilus.store_shared(xs, tilus.load(x, [0, 0], shape=[m, k]).T, [1, 0, 0])
    tilus.store_shared(ys, tilus.load(y, [0, 0], shape=[k, n]), [1, 0, 0])
    tilus.fence_async()
    tilus.sync()
    stage = tilus.block_id(0) + 1
    acc = tilus.wgmma(
        xs[stage],
        ys[stage],
        shape=tile,
        x_offsets=[depth, i],
        y_offsets=[depth, j],
        x_transposed=True,
        y_transposed=True,
    )
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_parts_of_transposed_operands(swizzle: int, device: str) -> None:
    rng = np.random.default_rng(swizzle)
    x, y = (rng.integers(-8, 8, shape).astype(np.float16) for shape in ((256, 128), (128, 192)))
    out = np.zeros((128, 64), np.float32)
    memory = wgmma_operand((2, 256, 128), 2, swizzle, "mn").permute((0, 2, 1))
    parts_of_operands.on(device)(x, y, out, shape=(256, 192, 128), tile=(128, 64, 32), at=(64, 128, 32), memory=memory)
    np.testing.assert_array_equal(out, x[64:192, 32:64].astype(np.float32) @ y[32:64, 128:].astype(np.float32))


@tilus.kernel
def pipelined(
    x: Tensor[f16, "m", "k"], y: Tensor[f16, "n", "k"], out: Tensor[f32, "m", "n"], *, shape: Const, scaled: Const
):
    """Two products under way; `scaled`: each is a sum of its own, which is added with a factor afterwards."""
    tilus.grid(1, warps=8)
    m, n, bk = shape
    xs, ys = tilus.shared(f16, [2, m, bk]), tilus.shared(f16, [2, n, bk])
    total = tilus.zeros([m, n])
    part = tilus.zeros([m, n])
    for step in tilus.range(x.shape[1] // bk):
        stage = step % 2
        tilus.store_shared(xs[stage], tilus.load(x, [0, step * bk], shape=[m, bk]))
        tilus.store_shared(ys[stage], tilus.load(y, [0, step * bk], shape=[n, bk]))
        tilus.fence_async()
        tilus.sync()
        if scaled:
            part = tilus.wgmma(xs[stage], ys[stage])
            tilus.wgmma_wait()
            total = total + part * 2.0
        else:
            total = tilus.wgmma(xs[stage], ys[stage], total)
            tilus.wgmma_wait(1)
            tilus.sync()
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], total)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_loop(scaled: bool, device: str) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-8, 8, (rows, 160)).astype(np.float16) for rows in (128, 32))
    out = np.zeros((128, 32), np.float32)
    pipelined.on(device)(x, y, out, shape=(128, 32, 32), scaled=scaled)
    np.testing.assert_array_equal(out, x.astype(np.float32) @ y.astype(np.float32).T * (2 if scaled else 1))


@tilus.kernel
def columns_from(x: Tensor[f16, 64, 64], *, n: Const, start: Const, memory: Const):
    tilus.grid(1, warps=4)
    xs, ys = tilus.shared(f16, [64, 64]), tilus.shared(f16, [256, 64], layout=memory)
    tilus.wgmma(xs, ys, shape=(64, n, 64), y_offsets=[start, 0])
    tilus.wgmma_wait()


@pytest.mark.parametrize(
    ("n", "start", "swizzle", "fits"),
    [
        (128, 64, 128, True), (128, 0, 128, True), (24, 128, 128, True), (128, 32, 128, False), (32, 32, 128, True),
        (64, 32, 128, False), (64, 32, 64, True), (8, 8, 128, True), (16, 8, 128, False), (16, 8, 0, True),
    ],
)  # fmt: skip
def test_contiguous_columns_start_a_block_or_lie_in_one(n: int, start: int, swizzle: int, fits: bool) -> None:
    """Blocks of 128 bytes along n do not follow each other, and an instruction counts from where it starts."""
    specialization = columns_from.specialize(n=n, start=start, memory=wgmma_operand((256, 64), 2, swizzle, "mn"))
    if fits:
        compile_function(specialization.function, get_target("sm_90a"))
        return
    with pytest.raises(TilusError, match=r"wgmma cannot work with layout .* of ys"):
        compile_function(specialization.function, get_target("sm_90a"))


MACHINE = {"f16": "HGMMA", "bf16": "HGMMA", "int8": "IGMMA", "uint8": "IGMMA"}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("atom", [a for a in WGMMA_ATOMS if a.a == a.b], ids=lambda atom: f"{atom.a}-{atom.d}")
def test_machine_instructions(atom: WgmmaAtom) -> None:
    """As many as the sizes say, no waits between them (the assembler would refuse), and one wait at the end."""
    for registers in (True, False) if atom in (HALF, FP8, INT8) else (True,):
        compiled = compiled_for(atom, (64, 24, 2 * atom.k), registers=registers)
        (kernel,) = disassemble(assemble(compiled.ptx, compiled.target).cubin)
        opcodes = [i.opcode for i in kernel.instructions]
        assert [o.split(".")[0] for o in opcodes if "GMMA" in o] == [MACHINE.get(atom.a.name, "QGMMA")] * 2
        assert [o for o in opcodes if o.startswith("WARPGROUP.DEPBAR")] == ["WARPGROUP.DEPBAR.LE"]


@pytest.mark.parametrize(("n", "widths"), [(256, [256]), (264, [192, 72]), (320, [192, 128]), (512, [256, 256])])
def test_wide_products_are_cut_at_whole_blocks(n: int, widths: list[int]) -> None:
    assert widths_of(compiled_for(HALF, (64, n, 32))) == [width for width in widths for _ in range(2)]


@pytest.mark.parametrize("scaled", [False, True])
def test_sums_stay_in_their_registers(scaled: bool) -> None:
    """Nothing copies a register while products are under way, and the assembler has no reason to wait."""
    options: dict[str, Any] = {"m": 128, "n": 128, "k": 256, "shape": (128, 128, 64), "scaled": scaled}
    compiled = compile_function(pipelined.specialize(**options).function, get_target("sm_90a"))
    (kernel,) = disassemble(assemble(compiled.ptx, compiled.target).cubin)
    loop = [i.opcode for i in kernel.innermost_loop()]
    assert sum(opcode.startswith("HGMMA.64x128x16.F32") for opcode in loop) == 4
    assert "mov.b32" not in compiled.ptx[compiled.ptx.index("wgmma.fence") : compiled.ptx.index("wgmma.wait_group")]


def test_integers_have_fewer_widths() -> None:
    """PTX ISA, "Matrix shape": n of 8-bit integers is 8, 24 or a multiple of 16."""
    assert widths_of(compiled_for(INT8, (64, 40, 32))) == [32, 8]
    assert widths_of(compiled_for(HALF, (64, 40, 16))) == [40]
    assert widths_of(compiled_for(INT8, (64, 24, 32))) == [24]


def test_the_dump_is_read_back() -> None:
    for registers in (True, False):
        function = compiled_for(HALF, (64, 16, 32), registers=registers, adds=registers).function
        text = print_function(function)
        assert "wgmma(a=" in text and "wgmma_wait(pending=0)" in text
        assert print_function(parse_function(text, INSTRUCTIONS)) == text


@tilus.kernel
def wrong(
    x: Tensor[f16, 64, 64], *, a: Const = f16, b: Const = f16, x_shape: Const = (64, 64), shape: Const = None,
    start: Const = 0, acc: Const = None, warps: Const = 4,
):  # fmt: skip
    tilus.grid(1, warps=warps)
    xs, ys = tilus.shared(a, x_shape), tilus.shared(b, [64, 64])
    total = None if acc is None else tilus.zeros([64, 64], acc)
    tilus.wgmma(xs, ys, total, shape=shape, y_offsets=None if shape is None else [0, start])
    tilus.wgmma_wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": f32}, r"wgmma of f32 and f16, expected operands of f16, bf16, float8_e4m3, float8_e5m2, int8, uint8"),
        ({"b": bf16}, r"wgmma of f16 and bf16, expected f16 with f16"),
        ({"acc": int32}, r"wgmma of f16 and f16 adds up in f32 or f16, not in int32"),
        ({"a": int8, "b": int8, "acc": f32}, r"wgmma of int8 and int8 adds up in int32, not in f32"),
        ({"x_shape": (32, 64)}, r"wgmma of m, n, k = 32, 64, 64 and f16: expected multiples of 64, 8 and 16"),
        ({"x_shape": (64, 32)}, r"wgmma of shapes \[64, 32\] and \[64, 64\]: k is 32 and 64"),
        ({"x_shape": (2, 64, 64)}, r"wgmma of operands of rank 3 and 2, expected 2 and 2"),
        ({"shape": (64, 64)}, r"wgmma: shape \[64, 64\], expected \(m, n, k\)"),
        ({"shape": (128, 64, 64)}, r"wgmma: a has 128 rows, dim 0 of shared only 64"),
        ({"shape": (64, 64, 16), "start": 8}, r"wgmma: b starts at 8 of dim 1 of shared_1, expected a multiple of 16"),
        ({"shape": (64, 32, 64), "acc": f32}, r"wgmma: the accumulator is f32\[64, 64\], the product f32\[64, 32\]"),
        ({"warps": 2}, r"wgmma is run by 2 warps, expected a multiple of 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TilusError, match=message) as caught:
        compile_function(wrong.specialize(**options).function, get_target("sm_90a"))
    assert caught.value.loc is not None and "tilus.wgmma(" in str(caught.value)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_100a"])
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(TilusError, match=f"wgmma needs sm_90a, the target is {target}") as caught:
        compile_function(wrong.specialize().function, get_target(target))
    assert caught.value.loc is not None and "tilus.dot" in str(caught.value.hint)


def test_bytes_must_have_k_contiguous() -> None:
    memory = wgmma_operand((64, 64), 2, 128, "mn")
    with pytest.raises(TilusError, match="wgmma cannot work with layout"):
        compiled_for(FP8, (64, 64, 64), y_memory=memory)
