"""What the tests of instructions share: kernels built by hand, run by all executions, over layouts of any kind."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.compiler import Compiled, compile_for_cpu, compile_function
from tilus.dtypes import DataType, int64
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import Var, as_expr
from tilus.ir.function import Function, TensorParam
from tilus.ir.tensor import GlobalTensor
from tilus.layout import Digit, RegisterLayout
from tilus.ptx.assembler import assemble
from tilus.runtime.cpu.build import load
from tilus.runtime.cpu.features import host_target
from tilus.runtime.emulator import run_kernel
from tilus.runtime.reference import run_reference
from tilus.runtime.reference.buffer import storage_dtype
from tilus.target import get_target

Array = npt.NDArray[Any]
Build = Callable[..., None]
WARP_COUNTS = (1, 2, 3, 4, 6)


def tensor(name: str, dtype: DataType, shape: Sequence[int], alignment: int = 16) -> GlobalTensor:
    """A contiguous tensor of constant shape."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return GlobalTensor(
        dtype,
        tuple(map(as_expr, shape)),
        tuple(map(as_expr, strides)),
        Var(name, int64),
        alignment=alignment,
        name=name,
    )


def function(build: Build, tensors: Mapping[str, GlobalTensor], num_warps: int, grid: int = 1) -> Function:
    """`build(b, **tensors)` as a kernel of a one-dimensional grid."""
    b = IRBuilder()
    b.num_warps = num_warps
    build(b, **tensors)
    params = tuple(TensorParam(name, t) for name, t in tensors.items())
    return Function("program", params, (as_expr(grid),), num_warps, b.body())


def run_all(
    build: Build,
    arrays: Mapping[str, tuple[DataType, Array]],
    num_warps: int = 1,
    grid: int = 1,
    *,
    seed: int = 0,
    target: str = "sm_90a",
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """The values of all arrays after the kernel ran on the reference, its PTX on the emulator, and its C on this CPU."""
    tensors = {name: tensor(name, dtype, values.shape) for name, (dtype, values) in arrays.items()}
    fn = function(build, tensors, num_warps, grid)
    compiled = compile_function(fn, get_target(target))
    reference = {
        n: np.asarray(dtype.encode(values)).view(storage_dtype(dtype)) for n, (dtype, values) in arrays.items()
    }
    emulated, native = ({name: array.copy() for name, array in reference.items()} for _ in range(2))
    run_reference(fn, reference, (grid, 1, 1))
    emulate(compiled, list(emulated.values()), grid, seed)
    run_c(fn, list(native.values()), grid)

    def decoded(found: Mapping[str, Array]) -> dict[str, Array]:
        return {n: arrays[n][0].decode(a.view(arrays[n][0].storage)) for n, a in found.items()}

    return decoded(reference), decoded(emulated), decoded(native)


def run_c(program: Function, arguments: Sequence[Array], grid: int = 1) -> None:
    """Run all blocks as C, one after the other, in this thread."""
    blocks = load(compile_for_cpu(program, host_target())).tilus_blocks
    slots = (ctypes.c_uint64 * len(arguments))(*(array.ctypes.data for array in arguments))
    blocks(slots, (ctypes.c_int32 * 3)(grid, 1, 1), ctypes.c_int64(0), ctypes.c_int64(grid))


def assembles(build: Build, types: Mapping[str, tuple[DataType, Sequence[int]]], num_warps: int, target: str) -> None:
    """Raise unless ptxas takes the kernel's PTX for the target, without spills."""
    tensors = {name: tensor(name, dtype, shape) for name, (dtype, shape) in types.items()}
    chosen = get_target(target)
    assemble(compile_function(function(build, tensors, num_warps), chosen).ptx, chosen)


def emulate(compiled: Compiled, arguments: list[Array], grid: int, seed: int = 0) -> None:
    dynamic = compiled.lowered.shared_nbytes if compiled.lowered.dynamic_shared else 0
    run_kernel(compiled.ptx, compiled.kernel_name, (grid, 1, 1), arguments, dynamic_shared_nbytes=dynamic, seed=seed)


def random_layout(
    rng: random.Random, rank: int, num_warps: int, *, max_locals: int = 12, replicas: bool = True
) -> RegisterLayout:
    """A layout of `num_warps` warps with prime digits sent to threads and slots at random, replication included."""

    def dim() -> int | None:
        return rng.randrange(rank) if not replicas or rng.random() < 0.8 else None

    threads = [(p, dim()) for p in _shuffled(rng, _primes(32 * num_warps))]
    count = rng.choice([n for n in (1, 2, 3, 4, 6, 8, 12) if n <= max_locals])
    slots = [(p, dim()) for p in _shuffled(rng, _primes(count))]
    weights = [0] * (len(threads) + len(slots))
    shape = [1] * rank
    for position in _shuffled(rng, range(len(weights))):
        size, axis = (threads + slots)[position]
        if axis is not None:
            weights[position] = shape[axis]
            shape[axis] *= size
    digits = [Digit(size, axis, weight) for (size, axis), weight in zip(threads + slots, weights, strict=True)]
    return RegisterLayout(tuple(shape), tuple(digits[: len(threads)]), tuple(digits[len(threads) :]))


def random_blocks(rng: random.Random, warps: int, free: int | None) -> RegisterLayout:
    """A layout of rank 2 over warps in place of threads, digits in any order; no warp counts along dimension `free`."""
    threads = [(2, rng.choice([d for d in (0, 1, None) if d != free])) for _ in range(warps.bit_length() - 1)]
    slots = [(rng.choice([2, 3]), rng.choice([0, 1])) for _ in range(rng.randrange(3))]
    digits, shape = list[tuple[Digit, bool]](), [1, 1]
    for size, dim, is_slot in rng.sample(
        [(*d, False) for d in threads] + [(*d, True) for d in slots], len(threads + slots)
    ):
        digits.append((Digit(size, dim, shape[dim] if dim is not None else 0), is_slot))
        if dim is not None:
            shape[dim] *= size
    rng.shuffle(digits)
    return RegisterLayout(
        tuple(shape), tuple(d for d, is_slot in digits if not is_slot), tuple(d for d, is_slot in digits if is_slot)
    )


def _shuffled(rng: random.Random, items: Sequence[int]) -> list[int]:
    return rng.sample(list(items), len(items))


def _primes(n: int) -> list[int]:
    return [p for p in (2, 3, 5, 7) for _ in range(_multiplicity(n, p))]


def _multiplicity(n: int, p: int) -> int:
    return 0 if n % p else 1 + _multiplicity(n // p, p)


def values_of(rng: random.Random, dtype: DataType, shape: Sequence[int]) -> Array:
    """Random values of a dtype: floats of moderate size, integers over their whole range."""
    generator = np.random.default_rng(rng.getrandbits(32))
    if dtype.kind == "bool":
        return generator.random(shape) < 0.5
    if dtype.is_float:
        return dtype.round(generator.normal(size=shape))
    return generator.integers(int(dtype.min_value), int(dtype.max_value), shape, endpoint=True).astype(dtype.compute)
