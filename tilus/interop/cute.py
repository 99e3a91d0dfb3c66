"""CuTe layouts (`shape:stride` and swizzles) from layouts of tilus and back, through the Python API of CUTLASS.

Needs the package nvidia-cutlass-dsl (`pip install 'tilus[interop]'`), which is imported at the first call. CuTe's layouts are
objects of a trace, so everything here is called within a function under `@cute.jit`; without a GPU, set the environment
variable CUTE_DSL_ARCH (for example to sm_90a). Only layouts with static shapes and strides are read.

CuTe counts in colexicographic order: the first mode, and the first part of a nested mode, varies fastest. So the digits of a
dimension, outermost first here, are the parts of a mode in reverse. A register layout is CuTe's thread-value layout:
(thread, slot) to the colexicographic index of the tile.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from tilus.layout import Digit, LayoutError, RegisterLayout, SharedLayout, Swizzle
from tilus.layout.digits import row_major_strides, unravel


def to_cute(layout: RegisterLayout | SharedLayout) -> Any:
    """The CuTe layout of the same function: of a memory layout with one mode for each dimension, composed with a swizzle
    where it has one or does not start at address 0; of a register layout the thread-value layout.

    Raises LayoutError for a swizzle that CuTe does not have (more bits than its shift), and for rank 0.
    """
    cute = _cute()
    if isinstance(layout, RegisterLayout):
        strides = row_major_strides(layout.shape[::-1])[::-1]
        lists = [
            [(d.size, 0 if d.dim is None else d.weight * strides[d.dim]) for d in digits]
            for digits in (layout.thread_digits, layout.local_digits)
        ]
        return _make_layout(cute, lists)
    if not layout.rank:
        raise LayoutError(
            f"{layout} has rank 0; expected a dimension, as CuTe has no such layouts", hint="unsqueeze it"
        )
    plain = _make_layout(cute, [[(d.size, d.weight) for d in digits] for digits in layout.digits])
    if layout.swizzle is None and not layout.origin:
        return plain
    swizzle = layout.swizzle or Swizzle(0, 0, 1)
    if swizzle.bits > swizzle.shift:
        raise LayoutError(
            f"{layout} has a swizzle of {swizzle.bits} bits and shift {swizzle.shift}; CuTe has only those with shift >= bits",
            hint="use another swizzle",
        )
    xor = cute.make_swizzle(swizzle.bits, swizzle.base, swizzle.shift)
    return cute.make_composed_layout(xor, layout.origin, plain)


def memory_from_cute(layout: Any) -> SharedLayout:
    """The memory layout of the same function, a dimension for each mode of a CuTe layout or of one composed with a swizzle.

    Raises LayoutError for layouts that are composed with anything else, dynamic, or have negative strides.
    """
    swizzle, origin = None, 0
    if hasattr(layout, "inner"):
        inner = layout.inner
        if not hasattr(inner, "num_shift") or inner.num_shift < 0:
            raise LayoutError(f"{layout} is composed with {inner}; expected a swizzle with a positive shift")
        swizzle, origin, layout = (
            Swizzle(inner.num_base, inner.num_bits, max(1, inner.num_shift)),
            layout.offset,
            layout.outer,
        )
    dims = [_digits(*mode) for mode in _modes(layout)]
    return SharedLayout(tuple(prod(d.size for d in digits) for digits in dims), tuple(dims), swizzle, origin)


def register_from_cute(layout: Any, shape: Sequence[int]) -> RegisterLayout:
    """The register layout of a CuTe thread-value layout: two modes, (thread, slot) to the colexicographic index of a tile.

    Raises LayoutError where it has not two modes, is dynamic, or does not hold each element of the tile equally often.
    """
    modes = _modes(layout)
    if len(modes) != 2:
        raise LayoutError(f"{layout} has {len(modes)} modes; expected two, (thread, value)")
    lists: list[tuple[Digit, ...]] = []
    for mode in modes:
        digits: list[Digit] = []
        for digit in _digits(*mode):
            # The colexicographic index is the row-major one of the reversed shape.
            parts = unravel(digit if digit.weight else Digit(digit.size, None, 0), tuple(reversed(shape)))
            if parts is None or prod(part.size for part in parts) != digit.size:
                raise LayoutError(
                    f"{layout} is not a layout of a tile of shape {tuple(shape)}: its mode of size {digit.size} and stride "
                    f"{digit.weight} straddles dimensions or leaves the tile"
                )
            last = len(shape) - 1
            digits += [part if part.dim is None else Digit(part.size, last - part.dim, part.weight) for part in parts]
        lists.append(tuple(digits))
    return RegisterLayout(tuple(shape), lists[0], lists[1])


def _cute() -> Any:
    try:
        return importlib.import_module("cutlass.cute")
    except ImportError as error:
        raise LayoutError(
            f"CuTe layouts need the package nvidia-cutlass-dsl, which cannot be imported: {error}",
            hint="pip install 'tilus[interop]'",
        ) from error


def _make_layout(cute: Any, lists: Sequence[Sequence[tuple[int, int]]]) -> Any:
    """One nested mode for each list of (size, stride), outermost first here and innermost first there."""
    parts = [list(reversed(pairs)) or [(1, 0)] for pairs in lists]
    shape = tuple(tuple(size for size, _ in pairs) for pairs in parts)
    stride = tuple(tuple(step for _, step in pairs) for pairs in parts)
    return cute.make_layout(shape, stride=stride)


def _modes(layout: Any) -> list[tuple[Any, Any]]:
    """(shape, stride) of each top-level mode."""
    shape, stride = layout.shape, layout.stride
    return list(zip(shape, stride)) if isinstance(shape, tuple) else [(shape, stride)]


def _digits(shape: Any, stride: Any) -> tuple[Digit, ...]:
    """The parts of one mode as digits of an address, outermost first."""
    return tuple(Digit(size, 0, step) for size, step in reversed(list(_leaves(shape, stride))))


def _leaves(shape: Any, stride: Any) -> Iterator[tuple[int, int]]:
    if isinstance(shape, tuple):
        for inner_shape, inner_stride in zip(shape, stride):
            yield from _leaves(inner_shape, inner_stride)
    elif isinstance(shape, int) and isinstance(stride, int):
        yield shape, stride
    else:
        raise LayoutError(f"a CuTe layout has shape {shape} and stride {stride}; expected static integers")
