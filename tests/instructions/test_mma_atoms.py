"""Every row of the table of matrix instructions, through `dot`, on exact data: adding an atom is a line there, tested here."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tilus
from tilus import Const, Tensor, f16, f32, int4, int8, int32, uint4, uint8
from tilus.compiler import Compiled, compile_function
from tilus.dtypes import pack_bits
from tilus.instructions.mma_atoms import MMA_ATOMS, MmaAtom
from tilus.ptx.assembler import assemble
from tilus.ptx.sass import disassemble
from tilus.runtime.emulator import run_kernel
from tilus.target import TARGETS, Target, get_target

Array = npt.NDArray[Any]
Shape = tuple[int, int, int]


@tilus.kernel
def multiply(
    x: Tensor["tx", "m", "k"], y: Tensor["ty", "k", "n"], z: Tensor["tz", "m", "n"], out: Tensor["tz", "m", "n"],
    *, shape: Const, a: Const, b: Const, warps: Const,
):  # fmt: skip
    tilus.grid(1, warps=warps)
    m, n, k = shape
    left = tilus.cast(tilus.load(x, [0, 0], shape=[m, k]), a)
    right = tilus.cast(tilus.load(y, [0, 0], shape=[k, n]), b)
    tilus.store(out, [0, 0], tilus.dot(left, right, tilus.load(z, [0, 0], shape=[m, n])))


def carrier(dtype: tilus.DataType) -> tilus.DataType:
    """The type of the arrays that are cast to `dtype`: one that numpy has."""
    return f32 if dtype.is_float else int8 if dtype.is_signed else uint8


def operands(atom: MmaAtom, shape: Shape) -> tuple[Array, Array, Array]:
    """Integers whose products and sums are exact in every step of any order: all of an integer type, few of a float type."""
    rng = np.random.default_rng(atom.k)
    m, n, k = shape
    arrays: list[Array] = []
    for dtype, extents in ((atom.a, (m, k)), (atom.b, (k, n))):
        limit = 3 if dtype.is_small or atom.c == f16 else 100
        low, high = (-limit, limit) if dtype.is_float else (int(dtype.min_value), int(dtype.max_value))
        arrays.append(rng.integers(low, high, extents, endpoint=True).astype(carrier(dtype).numpy))
    acc = rng.integers(-100, 100, (m, n)).astype(atom.c.numpy)
    if atom.c == int32:
        acc[0, 0], acc[-1, -1] = np.iinfo(np.int32).max, np.iinfo(np.int32).min  # sums wrap
    return arrays[0], arrays[1], acc


def expected(x: Array, y: Array, z: Array) -> Array:
    total = x.astype(np.int64) @ y.astype(np.int64) + z.astype(np.int64)
    return total.astype(np.uint32).view(np.int32) if z.dtype == np.int32 else total.astype(z.dtype)


def compiled_for(atom: MmaAtom, shape: Shape, warps: int, target: Target) -> Compiled:
    m, n, k = shape
    specialization = multiply.specialize(
        tx=carrier(atom.a), ty=carrier(atom.b), tz=atom.c, m=m, n=n, k=k, shape=shape, a=atom.a, b=atom.b, warps=warps
    )
    return compile_function(specialization.function, target)


def check_on(device: str, atom: MmaAtom, shape: Shape, warps: int) -> None:
    x, y, z = operands(atom, shape)
    out = np.zeros_like(z)
    if device == "emulator":  # for a target that has the atom
        compiled = compiled_for(atom, shape, warps, get_target(f"sm_{atom.min_sm}"))
        assert {line.split()[0] for line in compiled.ptx.splitlines() if " mma." in line} == {atom.opcode}
        run_kernel(compiled.ptx, compiled.kernel_name, (1, 1, 1), [x, y, z, out])
    else:
        multiply.on(device)(x, y, z, out, shape=shape, a=atom.a, b=atom.b, warps=warps)
    np.testing.assert_array_equal(out, expected(x, y, z))


EVERY_ATOM = pytest.mark.parametrize("atom", MMA_ATOMS, ids=lambda atom: atom.name)


@pytest.mark.sampled(9)
@EVERY_ATOM
@pytest.mark.parametrize("device", ["reference", "cpu", "emulator"])
def test_every_atom(atom: MmaAtom, device: str) -> None:
    """k is an odd multiple, so that no deeper atom fits; two warps and several repeats along every dim."""
    check_on(device, atom, (32, 16, 3 * atom.k), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("atom", [a for a in MMA_ATOMS if a.max_sm is None], ids=lambda atom: atom.name)
def test_every_atom_on_a_gpu(atom: MmaAtom) -> None:
    check_on("cuda", atom, (32, 16, 3 * atom.k), 2)


@EVERY_ATOM
def test_the_table_says_what_there_is(atom: MmaAtom) -> None:
    """PTX ISA, "mma": m16n8 shapes whose A has rows of 16 or 32 bytes; each is named once."""
    assert [other for other in MMA_ATOMS if other.name == atom.name] == [atom]
    assert atom.k * atom.a.nbits in (128, 256) and atom.a.nbits == atom.b.nbits
    assert [layout.shape for layout in atom.layouts] == [(16, atom.k), (atom.k, 8), (16, 8)]
    assert atom.num_macs == 16 * 8 * atom.k


# The machine instruction by target; sm_90a and sm_100a have none of 8-bit floats for mma.sync and take two of f16.
OPCODES = {
    "f16": "HMMA",
    "bf16": "HMMA",
    "tf32": "HMMA",
    "int8": "IMMA",
    "uint8": "IMMA",
    "int4": "IMMA",
    "uint4": "IMMA",
}


def one_module(kernels: list[Compiled]) -> str:
    """The kernels under names of their own in one PTX module, so that the assembler starts once."""
    version = max(
        (c.ptx.splitlines()[0] for c in kernels), key=lambda line: [int(n) for n in line.split()[1].split(".")]
    )
    _, *head = kernels[0].ptx.splitlines()[:3]
    texts = [version, *head]
    for number, compiled in enumerate(kernels):
        body = (line for line in compiled.ptx.splitlines()[3:] if not line.strip().startswith((".file", ".loc")))
        texts += [line.replace(f".entry {compiled.kernel_name}(", f".entry atom_{number}(") for line in body]
    return "\n".join(texts) + "\n"


@pytest.mark.parametrize("name", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
def test_every_atom_is_one_machine_instruction(name: str) -> None:
    """ptxas takes every atom that the table names for the target, and makes of it what the table promises."""
    target = TARGETS[name]
    atoms = [atom for atom in MMA_ATOMS if atom.runs_on(target)]
    cubin = assemble(one_module([compiled_for(a, (16, 8, a.k), 1, target) for a in atoms]), target).cubin
    kernels = {kernel.name: kernel for kernel in disassemble(cubin)}
    for number, atom in enumerate(atoms):
        opcodes = [i.opcode.split(".")[0] for i in kernels[f"atom_{number}"].instructions]
        emulated = atom.a.nbits == 8 and atom.a.is_float and target.sm >= 90
        wanted = ["HMMA"] * 2 if emulated else [OPCODES.get(atom.a.name, "QMMA")]
        assert [opcode for opcode in opcodes if "MMA" in opcode] == wanted, atom.name
        assert "CALL" not in opcodes, atom.name


@pytest.mark.parametrize(
    ("a", "target", "message"),
    [
        (
            tilus.float8_e4m3,
            "sm_80",
            "dot of float8_e4m3 and float8_e4m3 with k = 32 needs sm_89 and later, the target is sm_80",
        ),
        (uint4, "sm_90a", "dot of uint4 and uint4 with k = 64 needs sm_80 to sm_89, the target is sm_90a"),
    ],
    ids=str,
)
def test_a_target_without_the_instruction_is_refused(a: tilus.DataType, target: str, message: str) -> None:
    atom = next(atom for atom in MMA_ATOMS if (atom.a, atom.b) == (a, a))
    with pytest.raises(tilus.TilusError) as caught:
        compiled_for(atom, (16, 8, atom.k), 1, get_target(target))
    assert caught.value.message == message
    assert caught.value.loc is not None and caught.value.loc.file == __file__
    assert caught.value.hint == "cast the operands to a type that it multiplies, for example f16 or int8"


@tilus.kernel
def rows_times_rows(
    x: Tensor["t", "m", "k"], y: Tensor["u", "n", "k"], out: Tensor[int32, "m", "n"], *, shape: Const, warps: Const
):
    tilus.grid(1, warps=warps)
    m, n, k = shape
    xs, ys = tilus.shared(x.dtype, [m, k]), tilus.shared(y.dtype, [n, k])
    tilus.store_shared(xs, tilus.load(x, [0, 0], shape=[m, k]))
    tilus.store_shared(ys, tilus.load(y, [0, 0], shape=[n, k]))
    tilus.sync()
    tilus.store(out, [0, 0], tilus.dot(tilus.load_shared(xs), tilus.load_shared(ys).T))


@pytest.mark.parametrize(("t", "u"), [(int4, uint4), (uint8, int8)], ids=str)
def test_packed_integers_by_ldmatrix(t: tilus.DataType, u: tilus.DataType) -> None:
    """Elements below 16 bits go from packed rows of shared memory to both fragments without a conversion."""
    m, n, k = shape = (32, 16, 128)
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, d.num_codes, (rows, k)).astype(np.uint8) for d, rows in ((t, m), (u, n))]
    specialization = rows_times_rows.specialize(t=t, u=u, m=m, n=n, k=k, shape=shape, warps=2)
    compiled = compile_function(specialization.function, get_target("sm_80"))
    assert compiled.ptx.count("ldmatrix.sync") > 0 and "ld.shared" not in compiled.ptx
    out = np.zeros((m, n), np.int32)
    packed = [pack_bits(code, d) for code, d in zip(codes, (t, u), strict=True)]
    run_kernel(compiled.ptx, compiled.kernel_name, (1, 1, 1), [*packed, out])
    left, right = (d.decode(code).astype(np.int64) for code, d in zip(codes, (t, u), strict=True))
    assert (out == left @ right.T).all()
