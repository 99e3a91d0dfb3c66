"""Memory layouts: the address of every element of a tile, in elements.

Each dimension is factored into mixed-radix digits as in register layouts; a digit adds `value * stride` to the address.
An XOR swizzle may then permute the address bits (see Swizzle).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from tilus.layout.digits import Digit, Term, canonical, fitted, row_major_strides, split
from tilus.layout.errors import LayoutError
from tilus.layout.inverse import AddressInverse
from tilus.layout.normal_form import form_of_table, linear_table, normal_form
from tilus.layout.printer import shared_expression
from tilus.layout.quotient import memory_left, memory_right, no_memory_product, quotient_or_raise
from tilus.layout.swizzle import Swizzle


@dataclass(frozen=True, repr=False)
class SharedLayout:
    """A function index -> address, in elements: `swizzle(origin + sum of digits)`.

    digits: those of each dimension, outermost first; a digit of value v adds `v * weight` to the address (its dim is 0:
    the address is the only coordinate). A weight of 0 makes all indices share an address, as in a broadcast view.
    origin: the address of index 0 before the swizzle.

    Two layouts are equal (and hash equal) exactly when they are the same function, however they were built: digits,
    origin and swizzle are brought into the normal form of `normal_form.py`. `str(layout)` is an expression that builds
    the layout again. Raises LayoutError where digits do not count to their extent, or for negative strides.

    The same class serves tiles in shared memory and static views of global memory: a view is a layout without swizzle whose
    strides leave gaps and whose origin is where it starts. Slices of a swizzled tile need an origin too, so two classes
    would differ in nothing. (The IR's GlobalTensor has strides that are known only at run time.)
    """

    shape: tuple[int, ...]
    digits: tuple[tuple[Digit, ...], ...]
    swizzle: Swizzle | None = None
    origin: int = 0

    def __post_init__(self) -> None:
        if len(self.digits) != len(self.shape):
            raise LayoutError(f"digits for {len(self.digits)} dimensions of a shape of rank {len(self.shape)}")
        for dim, (extent, digits) in enumerate(zip(self.shape, self.digits)):
            if extent < 1 or prod(d.size for d in digits) != extent:
                raise LayoutError(
                    f"the digits of dimension {dim} have sizes {[d.size for d in digits]}; its extent is {extent}"
                )
            if any(d.weight < 0 for d in digits):
                raise LayoutError(
                    f"dimension {dim} has strides {[d.weight for d in digits]}; expected 0 or more",
                    hint="reverse the index instead",
                )
        if self.origin < 0:
            raise LayoutError(f"a layout starts at address {self.origin}; expected 0 or more")
        digits, origin, swizzle = tuple(map(_canonical, self.digits)), self.origin, self.swizzle
        if swizzle is not None:
            digits, origin, swizzle = normal_form(self.shape, digits, origin, swizzle)
        object.__setattr__(self, "digits", digits)
        object.__setattr__(self, "origin", origin)
        object.__setattr__(self, "swizzle", swizzle)

    def __str__(self) -> str:
        swizzle = None if self.swizzle is None else (self.swizzle.base, self.swizzle.bits, self.swizzle.shift)
        pairs = [[(d.size, d.weight) for d in digits] for digits in self.digits]
        return shared_expression(self.shape, pairs, self.origin, swizzle)

    __repr__ = __str__

    def _repr_svg_(self) -> str:
        """The drawing that notebooks show."""
        from tilus.layout.draw import svg

        return svg(self)

    # ---- sizes

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def size(self) -> int:
        """Elements of memory from address 0 to the last element, padding included: whole periods of the swizzle, if
        there is one."""
        last = self.origin + sum((d.size - 1) * d.weight for digits in self.digits for d in digits)
        period = 1 if self.swizzle is None else self.swizzle.period
        return -(-(last + 1) // period) * period

    def is_injective(self) -> bool:
        """Whether no two elements share an address: True for every tile that is written."""
        reach = 0  # a swizzle is a bijection, so the digits decide
        for digit in sorted((d for digits in self.digits for d in digits), key=lambda d: d.weight):
            if digit.weight == 0:
                return False
            if digit.weight <= reach:  # digits interleave: count
                return len(np.unique(linear_table(self.shape, self.digits, 0))) == prod(self.shape)
            reach += (digit.size - 1) * digit.weight
        return True

    def is_compact(self) -> bool:
        """Whether the elements fill 0..size-1 without padding: a bijection."""
        return self.size == prod(self.shape) and self.is_injective()

    # ---- the function

    @staticmethod
    def try_from_table(addresses: npt.NDArray[np.int64]) -> SharedLayout | None:
        """The layout with this `table()`, of the array's shape; None where no layout has it."""
        form = form_of_table(addresses)
        return None if form is None else SharedLayout(addresses.shape, form[0], form[2], form[1])

    @cached_property
    def terms(self) -> tuple[tuple[Term, ...], ...]:
        """For each dimension its terms: `(index[dim] // weight) % size * stride` is added before the swizzle."""
        result: list[tuple[Term, ...]] = []
        for dim, digits in enumerate(self.digits):
            weights = row_major_strides([d.size for d in digits])
            result.append(tuple(Term(d.weight, d.size, dim, weight) for d, weight in zip(digits, weights)))
        return tuple(result)

    def offset(self, index: Sequence[int]) -> int:
        """The address of an element, in elements."""
        if len(index) != self.rank or not all(0 <= x < extent for x, extent in zip(index, self.shape)):
            raise LayoutError(f"index {tuple(index)} is not in a tile of shape {self.shape}")
        parts = (x // t.weight % t.size * t.stride for x, terms in zip(index, self.terms) for t in terms)
        linear = self.origin + sum(parts)
        return linear if self.swizzle is None else self.swizzle.apply(linear)

    __call__ = offset

    def table(self) -> npt.NDArray[np.int64]:
        """All addresses, in elements: int64 of the tile's shape."""
        linear = linear_table(self.shape, self.digits, self.origin)
        return linear if self.swizzle is None else self.swizzle.apply(linear)

    def inverse(self) -> AddressInverse:
        """The function address -> index. Raises LayoutError where two elements share an address."""
        if not self.is_injective():
            raise LayoutError(
                f"{self} has no inverse: two elements share an address",
                hint="slice one copy of what is broadcast",
            )
        return AddressInverse(self.shape, self.terms, self.origin, self.swizzle)

    # ---- product and quotients

    def __mul__(self, inner: SharedLayout) -> SharedLayout:
        """Tiles one after another: `(f * g)(x) = f(x // S_g) * g.size + g(x % S_g)`, elementwise in the shapes S.

        Both start at address 0. A swizzle of g lies within each of its tiles. A swizzle of f moves whole tiles, so g then has
        none and a power of two as size. Raises LayoutError for other factors.
        """
        self._require_tiles(inner)
        reason = no_memory_product(self, inner)
        if reason is not None:
            raise LayoutError(
                f"{self} * {inner} is no layout: {reason}",
                hint="swizzle the inner tile, or call swizzled on the product",
            )
        digits = tuple(
            tuple(Digit(d.size, 0, d.weight * inner.size) for d in outer_digits) + inner_digits
            for outer_digits, inner_digits in zip(self.digits, inner.digits)
        )
        swizzle = inner.swizzle
        if self.swizzle is not None:
            base = self.swizzle.base + inner.size.bit_length() - 1
            swizzle = Swizzle(base, self.swizzle.bits, self.swizzle.shift)
        return SharedLayout(tuple(a * b for a, b in zip(self.shape, inner.shape)), digits, swizzle)

    def divide(self, inner: SharedLayout) -> SharedLayout:
        """The exact right quotient: the only q with `q * inner == self`. Raises LayoutError where there is none."""
        self._require_tiles(inner)
        return quotient_or_raise(memory_right(self, inner), self, inner, "inner")

    __truediv__ = divide

    def left_divide(self, outer: SharedLayout) -> SharedLayout:
        """The exact left quotient: the only q with `outer * q == self`. Raises LayoutError where there is none."""
        self._require_tiles(outer)
        return quotient_or_raise(memory_left(self, outer), self, outer, "outer")

    def try_divide(self, inner: SharedLayout) -> SharedLayout | None:
        """The right quotient, or None where there is none."""
        self._require_tiles(inner)
        quotient = memory_right(self, inner)
        return None if isinstance(quotient, str) else quotient

    def try_left_divide(self, outer: SharedLayout) -> SharedLayout | None:
        """The left quotient, or None where there is none."""
        self._require_tiles(outer)
        quotient = memory_left(self, outer)
        return None if isinstance(quotient, str) else quotient

    # ---- dimensions

    def permute(self, dims: Sequence[int]) -> SharedLayout:
        """Reorder the dimensions: dimension k of the result is dimension dims[k] of this layout."""
        if sorted(dims) != list(range(self.rank)):
            raise LayoutError(f"permute got dims {tuple(dims)}; expected each of 0..{self.rank - 1} once")
        return self._with(tuple(self.shape[d] for d in dims), tuple(self.digits[d] for d in dims))

    def unsqueeze(self, dim: int) -> SharedLayout:
        """Insert a dimension of extent 1 before dimension `dim` (`dim == rank` appends)."""
        if not 0 <= dim <= self.rank:
            raise LayoutError(f"unsqueeze at {dim} of a layout of rank {self.rank}; expected 0..{self.rank}")
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        return self._with(shape, (*self.digits[:dim], (), *self.digits[dim:]))

    def squeeze(self, dim: int) -> SharedLayout:
        """Drop a dimension of extent 1."""
        dim = self._require_dim(dim)
        if self.shape[dim] != 1:
            raise LayoutError(f"squeeze of dimension {dim} with extent {self.shape[dim]}; expected extent 1")
        return self._with(self.shape[:dim] + self.shape[dim + 1 :], self.digits[:dim] + self.digits[dim + 1 :])

    def reshape(self, shape: Sequence[int]) -> SharedLayout:
        """The same elements under another shape, in row-major order. Raises LayoutError where a digit would straddle
        two of the new dimensions."""
        if prod(shape) != prod(self.shape) or min(shape, default=1) < 1:
            raise LayoutError(
                f"reshape of {self.shape} ({prod(self.shape)} elements) to {tuple(shape)} ({prod(shape)} elements)"
            )
        rest: Sequence[Digit] = _canonical([digit for digits in self.digits for digit in digits])
        pieces: list[tuple[Digit, ...]] = []
        for extent in reversed(shape):
            cut = split(rest, extent)
            if cut is None:
                return self._reshaped_by_table(tuple(shape))
            rest = cut[0]
            pieces.append(tuple(cut[1]))
        return self._with(tuple(shape), tuple(reversed(pieces)))

    def _reshaped_by_table(self, shape: tuple[int, ...]) -> SharedLayout:
        """Where the digits do not split, another swizzle may still have other digits under it."""
        result = SharedLayout.try_from_table(self.table().reshape(shape))
        if result is None:
            raise LayoutError(
                f"{self} cannot be reshaped to {shape}: a digit would straddle two dimensions",
                hint="choose extents at which its digits split",
            )
        return result

    def flatten(self) -> SharedLayout:
        """One dimension, in row-major order."""
        return self.reshape((prod(self.shape),))

    def unflatten(self, dim: int, sizes: Sequence[int]) -> SharedLayout:
        """Dimension `dim` as several of these sizes, in row-major order."""
        dim = self._require_dim(dim)
        return self.reshape((*self.shape[:dim], *sizes, *self.shape[dim + 1 :]))

    def slice(self, dim: int, start: int, stop: int) -> SharedLayout:
        """The part with `start <= index[dim] < stop`, where it is in the same memory: `result(x) == self(x + start)`.

        Raises LayoutError where these addresses are not those of a layout: the ends cut a digit.
        """
        part = self._sliced(self._require_dim(dim), start, stop)
        if isinstance(part, str):
            raise LayoutError(part, hint="slice at multiples of the digits' sizes")
        return part

    def _sliced(self, dim: int, start: int, stop: int) -> SharedLayout | str:
        if not 0 <= start < stop <= self.shape[dim]:
            return f"slice {start}:{stop} of dimension {dim} of {self}; expected 0 <= start < stop <= {self.shape[dim]}"
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        values = linear_table((self.shape[dim],), (self.digits[dim],), 0)[start:stop]
        digits = fitted((values - values[0])[:, None])
        if digits is not None:
            parts = (*self.digits[:dim], digits, *self.digits[dim + 1 :])
            return SharedLayout(shape, parts, self.swizzle, self.origin + int(values[0]))
        index = tuple(slice(start, stop) if k == dim else slice(None) for k in range(self.rank))
        by_table = SharedLayout.try_from_table(self.table()[index])  # another swizzle may fit
        sizes = " x ".join(str(digit.size) for digit in self.digits[dim])
        return (
            by_table
            or f"slice {start}:{stop} of dimension {dim} of {self} is no layout: the ends cut its digits of {sizes}"
        )

    def expand(self, dim: int, size: int) -> SharedLayout:
        """Broadcast a dimension of extent 1 to `size`: all its indices share their addresses (stride 0)."""
        dim = self._require_dim(dim)
        if self.shape[dim] != 1 or size < 1:
            raise LayoutError(
                f"expand of dimension {dim} with extent {self.shape[dim]} to {size}; expected extent 1, to 1 or more"
            )
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        return self._with(shape, (*self.digits[:dim], (Digit(size, 0, 0),), *self.digits[dim + 1 :]))

    def stages(self, count: int) -> SharedLayout:
        """`count` copies one after another, as a new first dimension."""
        copies = SharedLayout((count, *(1,) * self.rank), ((Digit(count, 0, 1),), *((),) * self.rank))
        return copies * self.unsqueeze(0)

    # ---- addresses

    def swizzled(self, base: int, bits: int, shift: int) -> SharedLayout:
        """The same addresses through this XOR swizzle (see Swizzle), in elements."""
        if self.swizzle is not None:
            raise LayoutError(
                f"{self} already has a swizzle; expected one at most", hint="swizzle a layout of the same strides once"
            )
        return SharedLayout(self.shape, self.digits, Swizzle(base, bits, shift), self.origin)

    def at(self, address: int) -> SharedLayout:
        """The same tile `address` elements further on: `result(x) == self(x) + address`.

        Raises LayoutError for a swizzled tile unless the distance is a multiple of its period.
        """
        if self.swizzle is not None and address % self.swizzle.period:
            raise LayoutError(
                f"{self} moved by {address} elements is no layout: its swizzle has a period of {self.swizzle.period}",
                hint=f"move it by a multiple of {self.swizzle.period} elements",
            )
        return SharedLayout(self.shape, self.digits, self.swizzle, self.origin + address)

    # ---- checks

    def _with(self, shape: tuple[int, ...], digits: tuple[tuple[Digit, ...], ...]) -> SharedLayout:
        return SharedLayout(shape, digits, self.swizzle, self.origin)

    def _require_tiles(self, other: SharedLayout) -> None:
        if self.rank != other.rank:
            raise LayoutError(
                f"ranks differ: {self} has rank {self.rank}, {other} has rank {other.rank}",
                hint="insert dimensions of extent 1 with unsqueeze",
            )
        if self.origin or other.origin:
            raise LayoutError(
                f"a factor starts at address {self.origin or other.origin}: {self}, {other}; expected tiles that start at 0",
                hint="form the product first, then slice it or call at",
            )

    def _require_dim(self, dim: int) -> int:
        if not -self.rank <= dim < self.rank:
            raise LayoutError(f"dimension {dim} of a layout of rank {self.rank} and shape {self.shape}")
        return dim % self.rank


def _canonical(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    return canonical(Digit(d.size, 0, d.weight) if d.weight else Digit(d.size, None, 0) for d in digits)
