"""The part of the language that is not an instruction: the launch grid, loops, and how helpers are marked."""

from __future__ import annotations

import builtins as python
from typing import Any, TypeVar

from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.expr import BlockId, Expr, GridDim, as_expr, walk
from tilus.lang.frame import KernelBuilder
from tilus.lang.python_builtins import runtime_range
from tilus.lang.values import MAX_UNROLLED, RuntimeRange, describe

MAX_WARPS = 32
MAX_CLUSTER = 8  # blocks; more need a launch attribute, and not every GPU has room for them

T = TypeVar("T")


@builtin
def grid(
    b: IRBuilder, x: Any, y: Any = 1, z: Any = 1, *, warps: Any = 4, blocks_per_sm: Any = 1, cluster: Any = 1,
    ends_alone: Any = False,
) -> None:  # fmt: skip
    """Launch x * y * z blocks of `warps` * 32 threads; the first thing that a kernel does.

    The extents may use shapes, scalar parameters and compile-time values. A launch with an extent of 0 does nothing.
    blocks_per_sm: how many blocks must fit on a multiprocessor at once; more than 1 limits a thread's registers.
    cluster: so many blocks, neighbours along x, run at the same time and reach each other's shared memory; x must be a multiple
    of it. 1 to 8, and 1 for targets below sm_90. ends_alone: leave out the barrier of the cluster at the end, where each block
    has waited, at its own mbarriers, for all that others do in its shared memory.
    """
    if not isinstance(b, KernelBuilder):
        raise TilusError("tilus.grid outside of a kernel")
    if b.grid is not None:
        raise TilusError("tilus.grid is called a second time, expected once", hint="compute one grid for the kernel")
    if isinstance(warps, bool) or not isinstance(warps, int) or not 1 <= warps <= MAX_WARPS:
        raise TilusError(f"warps is {describe(warps)}, expected a compile-time int from 1 to {MAX_WARPS}")
    if type(blocks_per_sm) is not int or blocks_per_sm < 1:
        raise TilusError(f"blocks_per_sm is {describe(blocks_per_sm)}, expected a positive compile-time int")
    if type(cluster) is not int or not 1 <= cluster <= MAX_CLUSTER:
        raise TilusError(f"cluster is {describe(cluster)}, expected a compile-time int from 1 to {MAX_CLUSTER}")
    if type(ends_alone) is not bool:
        raise TilusError(f"ends_alone is {describe(ends_alone)}, expected a compile-time True or False")
    extents: list[Expr] = []
    for axis, extent in zip("xyz", (x, y, z), strict=True):
        expr = as_expr(extent) if isinstance(extent, (Expr, int)) else None
        if expr is None or not expr.dtype.is_integer:
            raise TilusError(
                f"grid extent {axis} is {describe(extent)}, expected an integer", hint="use tilus.cdiv or //"
            )
        if any(isinstance(e, (BlockId, GridDim)) for e in walk(expr)):
            raise TilusError(
                f"grid extent {axis} depends on the block that runs, expected shapes, scalars and constants"
            )
        extents.append(expr)
    b.grid = tuple(extents)
    b.num_warps = warps
    b.blocks_per_sm = blocks_per_sm
    b.cluster = cluster
    b.ends_alone = ends_alone


@builtin
def block_id(b: IRBuilder, axis: int = 0) -> Expr:
    """The index of this block along a grid axis (0, 1 or 2)."""
    return BlockId(_axis(axis))


@builtin
def grid_dim(b: IRBuilder, axis: int = 0) -> Expr:
    """The number of blocks along a grid axis (0, 1 or 2)."""
    return GridDim(_axis(axis))


def _axis(axis: int) -> int:
    if axis not in (0, 1, 2):
        raise TilusError(f"grid axis {describe(axis)}, expected 0, 1 or 2")
    return axis


@builtin
def range(b: IRBuilder, start: Any, stop: Any = None, step: Any = 1, *, unroll: Any = 1) -> RuntimeRange:
    """`for i in tilus.range(...)` is a loop of the kernel, also over constants. step: a positive constant.

    unroll: copies of the body per trip that code generation makes.
    """
    if isinstance(unroll, bool) or not isinstance(unroll, int) or unroll < 1:
        raise TilusError(f"unroll is {describe(unroll)}, expected a positive constant")
    first, last = (0, start) if stop is None else (start, stop)
    loop = runtime_range(b, (first, last, step))
    return RuntimeRange(loop.start, loop.stop, loop.step, unroll)


@builtin
def static_range(b: IRBuilder, start: Any, stop: Any = None, step: Any = 1) -> Any:
    """`for i in tilus.static_range(...)` repeats the body while compiling; i is a compile-time int in each copy."""
    bounds = (0, start, step) if stop is None else (start, stop, step)
    for bound in bounds:
        if isinstance(bound, bool) or not isinstance(bound, int):
            raise TilusError(
                f"static_range over {describe(bound)}, expected compile-time ints",
                hint="use tilus.range for run-time bounds",
            )
    if step == 0:
        raise TilusError("static_range has step 0, expected another int")
    trips = python.range(*bounds)
    if len(trips) > MAX_UNROLLED:
        raise TilusError(f"static_range of {len(trips)} trips, expected at most {MAX_UNROLLED}", hint="use tilus.range")
    return trips


def cdiv(a: Any, b: Any) -> Any:
    """The quotient rounded up, of ints on the host and of scalars in kernels."""
    return (a + b - 1) // b


def inline(function: T) -> T:
    """Mark a function or class as part of the language: calls in kernels are always translated, never run by Python.

    Helpers that call functions of the language are found without it; it is needed where that is hidden.
    """
    function.__tilus_inline__ = True  # type: ignore[attr-defined]
    return function
