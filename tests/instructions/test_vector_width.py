"""The width of every access is the largest that is right: compared with all threads, slots and run-time values, one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tile_programs import random_layout

import tilus
from tilus import Const, Tensor, dtypes
from tilus.codegen.access import global_vector_size
from tilus.codegen.shared_access import shared_access
from tilus.compiler import compile_function
from tilus.dtypes import DataType, int64, pack_bits
from tilus.ir.expr import Expr, Var, as_expr
from tilus.ir.tensor import GlobalTensor, SharedTensor
from tilus.layout import RegisterLayout, SharedLayout, auto, local, strided
from tilus.runtime.emulator import run_kernel
from tilus.target import DEFAULT_TARGET

Ints = npt.NDArray[np.int64]
TYPES = [
    dtypes.dtype(name) for name in ("uint1", "int2", "uint3", "int4", "uint6", "uint7", "int8", "f16", "f32", "int64")
]


def random_tile(rng: random.Random) -> RegisterLayout:
    """A layout of rank 2 whose threads tend to hold runs."""
    outer = random_layout(rng, 2, 1, max_locals=4)
    inner = [local(rng.choice([1, 1, 2, 4]), rng.choice([1, 2, 3, 4, 8, 16])) for _ in range(rng.choice([1, 2]))]
    if rng.random() < 0.3:
        inner = [layout.permute((1, 0)) for layout in inner]
    return math.prod(inner, start=outer)


def widest(fits: Any, dtype: DataType, num_locals: int) -> int:
    """The largest power of two for which `fits(size, nbits of the units that move)`; units have at most 16 bytes."""
    found = 1
    for exponent in range(1, 10):
        size = 1 << exponent
        unit = size * (dtype.nbits & -dtype.nbits)
        if unit <= 128 and num_locals % size == 0 and fits(size, unit):
            found = size
    return found


def consecutive(nbits_at: Ints, size: int, unit: int, dtype: DataType) -> bool:
    """Whether bit addresses [..., slot] are runs of `size` elements at multiples of `unit` bits."""
    groups = nbits_at.reshape(-1, size)
    return bool(((groups - groups[:, :1]) == np.arange(size) * dtype.nbits).all() and (groups[:, 0] % unit == 0).all())


def unknown(rng: random.Random, name: str, lower: int | None) -> tuple[Expr, list[int]]:
    """A run-time value of which a divisor is known, and values that it may have."""
    step = rng.choice([1, 2, 3, 4, 8, 16])
    least = 0 if lower is not None else -2 * 48 // step
    return Var(name, int64, lower=lower, multiple_of=step), [step * k for k in range(least, 1 + 96 // step)]


def known(value: int) -> tuple[Expr, list[int]]:
    return as_expr(value), [value]


@pytest.mark.parametrize("seed", range(150))
def test_global_width_is_the_largest(seed: int) -> None:
    rng = random.Random(seed)
    dtype, layout, alignment = rng.choice(TYPES), random_tile(rng), rng.choice([1, 2, 4, 8, 16, 16])
    m, n = layout.shape
    strides = rng.choice([(n, 1), (1, m), (2 * n, 1), (n + 4, 1), (64, 1), (None, 1), (None, 1), (1, None), (8, 2)])
    stride_vars = [known(s) if s is not None else unknown(rng, "stride", 0) for s in strides]
    offsets = [rng.choice([known(0), known(8), unknown(rng, "i", 0), unknown(rng, "i", None)]) for _ in strides]
    extents = [rng.choice([known(e), known(e + 3), known(2 * e + 8), unknown(rng, "n", 0)]) for e in layout.shape]
    start, checked = rng.choice([known(0), known(4), unknown(rng, "o", 0)]), rng.random() < 0.6
    tensor = GlobalTensor(
        dtype, tuple(e for e, _ in extents), tuple(s for s, _ in stride_vars), Var("x", int64), start[0], alignment
    )
    index = layout.table()

    def places() -> Sequence[Ints]:
        """Element offsets [thread, slot], for run-time values that have no more in common than their divisors."""
        few = [[values[-1], values[-2]] if len(values) > 1 else values for _, values in (*offsets, *stride_vars, start)]
        result: list[Ints] = []
        for i in few[0]:
            for j in few[1]:
                for s in few[2]:
                    for t in few[3]:
                        result += [o + (i + index[..., 0]) * s + (j + index[..., 1]) * t for o in few[4]]
        return result

    def masked_alike(size: int) -> bool:
        """In each dim: offsets and extents of different dims have nothing to do with each other."""
        for axis in range(2):
            for offset in offsets[axis][1]:
                for extent in (e for e in extents[axis][1] if e > 0):
                    x = offset + index[..., axis].reshape(-1, size)
                    inside = (x >= 0) & (x < extent)
                    if (inside != inside[:, :1]).any():
                        return False
        return True

    tables = places()

    def fits(size: int, unit: int) -> bool:
        bases = (8 * alignment, 16 * alignment)
        right = all(consecutive(base + e * dtype.nbits, size, unit, dtype) for e in tables for base in bases)
        return right and (not checked or masked_alike(size))

    found = global_vector_size(tensor, layout, [o for o, _ in offsets], (0, 1), checked)
    assert found == widest(fits, dtype, layout.num_locals)


def random_memory(rng: random.Random, shape: tuple[int, ...]) -> SharedLayout:
    """Digits of every dim at strides in any order, with padding and a swizzle at times."""
    sizes: list[list[int]] = []
    for extent in shape:
        part = rng.choice([d for d in range(1, extent + 1) if extent % d == 0])
        sizes.append([extent // part, part] if rng.random() < 0.5 else [extent])
    order = [(dim, k) for dim, digits in enumerate(sizes) for k in range(len(digits))]
    if rng.random() < 0.5:
        rng.shuffle(order)
    strides, step = [[0] * len(digits) for digits in sizes], 1
    for dim, k in reversed(order):
        strides[dim][k] = step
        step = step * sizes[dim][k] + (rng.choice([0, 0, 0, 2, 4, 8]) if step > 1 else 0)
    memory = strided([tuple(s) for s in sizes], [tuple(s) for s in strides])
    if rng.random() < 0.4:
        memory = memory.swizzled(rng.randrange(5), rng.randrange(1, 4), rng.randrange(1, 5))
    return memory


@pytest.mark.parametrize("seed", range(200))
def test_shared_width_is_the_largest(seed: int) -> None:
    """A tensor of three dims; the tile runs along two of them in either order, at offsets that keep it inside."""
    rng = random.Random(seed)
    dtype, layout = rng.choice(TYPES), random_tile(rng)
    dims = rng.choice([(1, 2), (1, 2), (2, 1), (0, 2)])
    shape = [rng.choice([1, 2, 3])] * 3
    for axis, d in enumerate(dims):
        shape[d] = layout.shape[axis] * rng.choice([1, 1, 2])
    memory = random_memory(rng, tuple(shape))
    offsets: list[Expr] = []
    choices: list[list[int]] = []
    for d in range(3):
        last = shape[d] - (layout.shape[dims.index(d)] if d in dims else 1)
        expr, values = rng.choice([known(0), known(rng.randint(0, last)), unknown(rng, "i", 0)])
        offsets.append(expr)
        choices.append([v for v in values if v <= last])
    table, index = memory.table(), layout.table()
    tables: list[Ints] = []
    for position in np.stack(np.meshgrid(*choices, indexing="ij"), -1).reshape(-1, 3).tolist():
        place = [np.full(index.shape[:2], start) for start in position]
        for axis, d in enumerate(dims):
            place[d] = place[d] + index[..., axis]
        tables.append(table[tuple(place)] * dtype.nbits)

    def fits(size: int, unit: int) -> bool:
        return all(consecutive(nbits_at, size, unit, dtype) for nbits_at in tables)

    extents = [layout.shape[axis] for axis in range(2)]
    access = shared_access(SharedTensor(dtype, tuple(shape), memory), layout, offsets, dims, extents)
    assert access.vector_size(memory) == widest(fits, dtype, layout.num_locals)


@tilus.kernel
def around(x: Tensor["t", "m", "n"], y: Tensor["t", "m", "n"], *, shape: Const, layout: Const):
    tilus.grid(1, warps=1)
    s = tilus.shared(x.dtype, shape)
    tilus.copy_async(x, [0, 0], s)
    tilus.commit()
    tilus.wait(0)
    tilus.sync()
    second = tilus.shared(x.dtype, shape)
    tilus.store_shared(second, tilus.load_shared(s, layout=layout))
    tilus.sync()
    tilus.store(y, [0, 0], tilus.load_shared(second, layout=layout))


@pytest.mark.parametrize("name", ["uint3", "int5", "float6_e3m2", "uint7", "uint2", "int4", "uint8"])
@pytest.mark.parametrize(("run", "nbits"), [(32, 32), (64, 64), (128, 128)])
def test_types_of_odd_widths_move_in_words(name: str, run: int, nbits: int) -> None:
    """Runs of 32, 64 and 128 elements are 4, 8 and 16 bytes times the odd part of the width, and move as so many units."""
    dtype = dtypes.dtype(name)
    run //= dtype.nbits & -dtype.nbits
    layout = auto((16, 2 * run), 32, run)
    compiled = compile_function(
        around.specialize(t=dtype, m=16, n=2 * run, shape=layout.shape, layout=layout).function, DEFAULT_TARGET
    )
    count = run * dtype.nbits // nbits
    notes = [note.text for note in compiled.lowered.notes]
    for access in ("copy_async x", "shared load s", "shared store second", "shared load second", "store y"):
        assert f"{access}: {count} x {nbits} bits per thread" in notes
    codes = np.random.default_rng(0).integers(0, dtype.num_codes, layout.shape).astype(dtype.storage)
    x = pack_bits(codes, dtype)
    y = np.zeros_like(x)
    shared = compiled.lowered.shared_nbytes if compiled.lowered.dynamic_shared else 0
    run_kernel(compiled.ptx, compiled.kernel_name, (1, 1, 1), [x, y], dynamic_shared_nbytes=shared)
    assert (x == y).all()


@pytest.mark.parametrize("device", ["emulator", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["uint3", "float6_e3m2", "uint7"])
def test_types_of_odd_widths_as_arguments(name: str, device: str) -> None:
    dtype = dtypes.dtype(name)
    layout = auto((16, 256), 32, 128 // (dtype.nbits & -dtype.nbits))
    codes = np.random.default_rng(0).integers(0, dtype.num_codes, layout.shape).astype(dtype.storage)
    x = pack_bits(codes, dtype).reshape(-1)
    y = np.zeros_like(x)
    arguments = [tilus.packed(array, dtype, layout.shape) for array in (x, y)]
    around.on(device)(*arguments, shape=layout.shape, layout=layout)
    assert (x == y).all()


@tilus.kernel
def copied(x: Tensor["t", "m", "n"], y: Tensor["t", "m", "n"], *, shape: Const, memory: Const):
    tilus.grid(1, warps=1)
    s = tilus.shared(x.dtype, shape, layout=memory)
    tilus.copy_async(x, [0, 0], s)
    tilus.commit()
    tilus.wait(0)
    tilus.sync()
    tilus.store(y, [0, 0], tilus.load_shared(s))


@pytest.mark.parametrize(
    ("columns", "memory", "opcode"),
    [
        (64, (64, 1), "cp.async.cg.shared.global 16"),
        (60, (64, 1), "cp.async.ca.shared.global 8"),  # rows of 120 bytes: each is a multiple of 8
        (62, (64, 1), "cp.async.ca.shared.global 4"),
        (64, (68, 1), "cp.async.ca.shared.global 8"),  # the shared tensor is padded by 8 bytes
        (64, (66, 1), "cp.async.ca.shared.global 4"),
    ],
)
def test_copies_are_as_wide_as_both_sides_allow(columns: int, memory: tuple[int, int], opcode: str) -> None:
    """Only copies of 16 bytes may bypass the first-level cache (.cg). Columns behind the 64 that exist arrive as zeros."""
    layout = strided((16, 64), memory)
    specialization = copied.specialize(t=dtypes.f16, m=16, n=columns, shape=(16, 64), memory=layout)
    compiled = compile_function(specialization.function, DEFAULT_TARGET)
    lines = [line.split() for line in compiled.ptx.splitlines() if " cp.async.c" in line and "commit" not in line]
    assert {f"{line[0]} {line[3].strip(',;')}" for line in lines} == {opcode}
    x = np.arange(16 * columns, dtype=np.float16).reshape(16, columns)
    y = np.zeros_like(x)
    run_kernel(compiled.ptx, compiled.kernel_name, (1, 1, 1), [x, y])
    assert (x == y).all()
