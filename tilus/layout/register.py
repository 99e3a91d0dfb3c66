"""Register layouts: which element of a tile sits in which register of which thread.

A register layout maps (thread t, local slot i) to the logical index of a tile. Each dimension of the tile is factored
into mixed-radix digits (of any size, not only powers of two); every digit is read from the thread number or from the
slot number. The notation (spatial, local, product) is that of Tilus (Ding et al., "Tilus: A Tile-Level GPGPU
Programming Language for Low-Precision Computation", ASPLOS 2026); digits replace its modes, and replication may be on
either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from tilus.layout import digits as _digits
from tilus.layout.digits import Digit, Term
from tilus.layout.errors import LayoutError
from tilus.layout.inverse import Inverse
from tilus.layout.printer import register_expression
from tilus.layout.quotient import quotient_or_raise, register_left, register_right
from tilus.layout.slicing import sliced_slots


@dataclass(frozen=True, repr=False)
class RegisterLayout:
    """A function (thread, slot) -> index into a tile of `shape`, in the one canonical form.

    Both digit lists are outermost first. Two layouts are equal (and hash equal) exactly when they have the same number
    of threads and slots and are the same function. `str(layout)` is an expression that builds the layout again.
    Raises LayoutError where the digits of a dimension do not count each of its indices exactly once.
    """

    shape: tuple[int, ...]
    thread_digits: tuple[Digit, ...]
    local_digits: tuple[Digit, ...]

    def __post_init__(self) -> None:
        _digits.check_complete((*self.thread_digits, *self.local_digits), self.shape)
        object.__setattr__(self, "thread_digits", _digits.canonical(self.thread_digits))
        object.__setattr__(self, "local_digits", _digits.canonical(self.local_digits))

    def __str__(self) -> str:
        return register_expression(self.shape, self.thread_digits, self.local_digits)

    __repr__ = __str__

    def _repr_svg_(self) -> str:
        """The drawing that notebooks show."""
        from tilus.layout.draw import svg

        return svg(self)

    # ---- sizes

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the tile."""
        return prod(self.shape)

    @cached_property
    def num_threads(self) -> int:
        return prod(digit.size for digit in self.thread_digits)

    @cached_property
    def num_locals(self) -> int:
        """Number of local slots (registers, before packing) of each thread."""
        return prod(digit.size for digit in self.local_digits)

    @property
    def num_replicas(self) -> int:
        """How many threads hold each element."""
        return prod(digit.size for digit in self.thread_digits if digit.dim is None)

    @property
    def num_local_replicas(self) -> int:
        """How many slots of one thread hold each element that the thread owns."""
        return prod(digit.size for digit in self.local_digits if digit.dim is None)

    @property
    def is_replicated_thread(self) -> bool:
        return self.num_replicas > 1

    # ---- the function

    @cached_property
    def thread_terms(self) -> tuple[Term, ...]:
        """How the thread number feeds the index: `(t // stride) % size * weight` is added to index[dim]."""
        return _digits.terms(self.thread_digits)

    @cached_property
    def local_terms(self) -> tuple[Term, ...]:
        """How the slot number feeds the index, as in `thread_terms`."""
        return _digits.terms(self.local_digits)

    def index(self, thread: int, local: int) -> tuple[int, ...]:
        """The index of the element that `thread` holds in slot `local`."""
        if not 0 <= thread < self.num_threads or not 0 <= local < self.num_locals:
            raise LayoutError(
                f"thread {thread}, slot {local} of a layout with {self.num_threads} threads and {self.num_locals} slots",
                hint="both count from 0; table() has the indices of all of them",
            )
        result = [0] * self.rank
        for number, number_terms in ((thread, self.thread_terms), (local, self.local_terms)):
            for term in number_terms:
                if term.dim is not None:
                    result[term.dim] += number // term.stride % term.size * term.weight
        return tuple(result)

    __call__ = index

    def table(self) -> npt.NDArray[np.int64]:
        """All indices: int64 of shape [num_threads, num_locals, rank]."""
        threads = _digits.index_table(self.thread_digits, self.rank)
        return threads[:, None] + _digits.index_table(self.local_digits, self.rank)[None]

    def inverse(self) -> Inverse:
        """The function index -> (thread, slot); of several owners it names the one whose replication digits are 0."""
        return Inverse(self.shape, self.thread_terms, self.local_terms)

    def left_inverse(self) -> Inverse:
        """The inverse as one on both sides: `left_inverse()(layout(t, i)) == (t, i)`. Raises LayoutError where an element has
        several owners."""
        if self.num_replicas * self.num_local_replicas > 1:
            raise LayoutError(
                f"{self} has no left inverse: {self.num_replicas} threads hold each element, "
                f"each in {self.num_local_replicas} slots; expected one owner",
                hint="inverse() names the first owner, owner() all of them",
            )
        return self.inverse()

    @staticmethod
    def try_from_table(table: npt.NDArray[np.int64]) -> RegisterLayout | None:
        """The layout with this `table()`, of shape [threads, slots, rank]; None where no layout has it."""
        threads, slots = _digits.fitted(table[:, 0]), _digits.fitted(table[0])
        if threads is None or slots is None:
            return None
        try:
            layout = RegisterLayout(tuple(int(n) + 1 for n in table.max(axis=(0, 1))), threads, slots)
        except LayoutError:  # some element has no owner
            return None
        return layout if np.array_equal(layout.table(), table) else None

    def owner(self, index: Sequence[int]) -> list[tuple[int, int]]:
        """All (thread, slot) that hold the element, in ascending order."""
        thread, local = self.inverse()(index)
        thread_replicas = _replica_offsets(self.thread_terms)
        local_replicas = _replica_offsets(self.local_terms)
        return sorted((thread + t, local + i) for t in thread_replicas for i in local_replicas)

    # ---- product and quotients

    def __mul__(self, inner: RegisterLayout) -> RegisterLayout:
        """The tile of tiles: `(f * g)(t, i) = f(t // T_g, i // L_g) * S_g + g(t % T_g, i % L_g)`, elementwise."""
        self._require_rank(inner)

        def scaled(outer: Sequence[Digit]) -> tuple[Digit, ...]:
            return tuple(
                Digit(d.size, d.dim, d.weight if d.dim is None else d.weight * inner.shape[d.dim]) for d in outer
            )

        return RegisterLayout(
            tuple(a * b for a, b in zip(self.shape, inner.shape)),
            scaled(self.thread_digits) + inner.thread_digits,
            scaled(self.local_digits) + inner.local_digits,
        )

    def divide(self, inner: RegisterLayout) -> RegisterLayout:
        """The exact right quotient: the only q with `q * inner == self`. Raises LayoutError where there is none."""
        self._require_rank(inner)
        return quotient_or_raise(register_right(self, inner), self, inner, "inner")

    __truediv__ = divide

    def left_divide(self, outer: RegisterLayout) -> RegisterLayout:
        """The exact left quotient: the only q with `outer * q == self`. Raises LayoutError where there is none."""
        self._require_rank(outer)
        return quotient_or_raise(register_left(self, outer), self, outer, "outer")

    def try_divide(self, inner: RegisterLayout) -> RegisterLayout | None:
        """The right quotient, or None where there is none."""
        self._require_rank(inner)
        quotient = register_right(self, inner)
        return None if isinstance(quotient, str) else quotient

    def try_left_divide(self, outer: RegisterLayout) -> RegisterLayout | None:
        """The left quotient, or None where there is none."""
        self._require_rank(outer)
        quotient = register_left(self, outer)
        return None if isinstance(quotient, str) else quotient

    # ---- chained constructors: f.spatial(8, 4) is f * spatial(8, 4)

    def spatial(self, *shape: int) -> RegisterLayout:
        return self * spatial(*shape)

    def local(self, *shape: int) -> RegisterLayout:
        return self * local(*shape)

    def column_spatial(self, *shape: int) -> RegisterLayout:
        return self * column_spatial(*shape)

    def column_local(self, *shape: int) -> RegisterLayout:
        return self * column_local(*shape)

    def replicated(self, threads: int) -> RegisterLayout:
        return self * replicated(threads, self.rank)

    def local_replicated(self, count: int) -> RegisterLayout:
        return self * local_replicated(count, self.rank)

    # ---- dimensions

    def permute(self, dims: Sequence[int]) -> RegisterLayout:
        """Reorder the dimensions: dimension k of the result is dimension dims[k] of this layout."""
        if sorted(dims) != list(range(self.rank)):
            raise LayoutError(
                f"permute got dims {tuple(dims)}; expected each of 0..{self.rank - 1} once",
                hint=f"list all of them: permute({list(reversed(range(self.rank)))}) reverses their order",
            )
        place = {dim: k for k, dim in enumerate(dims)}
        return self._redirect(tuple(self.shape[dim] for dim in dims), place)

    def squeeze(self, dim: int) -> RegisterLayout:
        """Drop a dimension of extent 1."""
        dim = self._require_dim(dim)
        if self.shape[dim] != 1:
            raise LayoutError(
                f"squeeze of dimension {dim} with extent {self.shape[dim]}; expected extent 1",
                hint=f"reduce([{dim}], keepdims=False) drops it after a reduction, reshape joins it with its neighbour",
            )
        return self.reduce([dim], keepdims=False)

    def unsqueeze(self, dim: int) -> RegisterLayout:
        """Insert a dimension of extent 1 before dimension `dim` (`dim == rank` appends)."""
        if not 0 <= dim <= self.rank:
            raise LayoutError(
                f"unsqueeze at {dim} of a layout of rank {self.rank}; expected 0..{self.rank}",
                hint=f"unsqueeze({self.rank}) appends a dimension",
            )
        place = {k: k if k < dim else k + 1 for k in range(self.rank)}
        return self._redirect((*self.shape[:dim], 1, *self.shape[dim:]), place)

    def reshape(self, shape: Sequence[int]) -> RegisterLayout:
        """The same elements under another shape, in row-major order. Raises LayoutError where a digit would straddle
        two of the new dimensions."""
        if prod(shape) != self.size or min(shape, default=1) < 1:
            raise LayoutError(
                f"reshape of {self.shape} ({self.size} elements) to {tuple(shape)} ({prod(shape)} elements)",
                hint="give positive extents for as many elements; expand and products with local(...) make larger layouts",
            )
        strides = _digits.row_major_strides(self.shape)

        def reshaped(digits: Sequence[Digit]) -> tuple[Digit, ...]:
            # Flat digits first: digits of neighbouring dimensions may be one digit there, which splits elsewhere.
            flat = _digits.canonical(
                d if d.dim is None else Digit(d.size, 0, d.weight * strides[d.dim]) for d in digits
            )
            pieces = [_digits.unravel(digit, shape) for digit in flat]
            if None in pieces:
                raise LayoutError(
                    f"{self} cannot be reshaped to {tuple(shape)}: a digit would straddle two dimensions",
                    hint="convert to a layout whose digits divide the new shape first",
                )
            return tuple(digit for piece in pieces if piece is not None for digit in piece)

        return RegisterLayout(tuple(shape), reshaped(self.thread_digits), reshaped(self.local_digits))

    def flatten(self) -> RegisterLayout:
        """One dimension, in row-major order."""
        return self.reshape((self.size,))

    def unflatten(self, dim: int, sizes: Sequence[int]) -> RegisterLayout:
        """Dimension `dim` as several of these sizes, in row-major order."""
        dim = self._require_dim(dim)
        return self.reshape((*self.shape[:dim], *sizes, *self.shape[dim + 1 :]))

    def slice(self, dim: int, start: int, stop: int) -> RegisterLayout:
        """The part with `start <= index[dim] < stop`, where its elements are: in the same threads, in the slots that are
        left, in ascending order.

        Raises LayoutError where a slot is inside for some threads only, or where the slots that are left do not count as
        those of a layout.
        """
        dim = self._require_dim(dim)
        what = f"slice {start}:{stop} of dimension {dim} of {self}"
        if not 0 <= start < stop <= self.shape[dim]:
            raise LayoutError(
                f"{what}; expected 0 <= start < stop <= {self.shape[dim]}",
                hint="bounds count from 0, `stop` is excluded",
            )
        slots = sliced_slots(self.thread_digits, self.local_digits, self.rank, dim, range(start, stop), what)
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        return RegisterLayout(shape, self.thread_digits, slots)

    def reduce(self, dims: Sequence[int], keepdims: bool = True) -> RegisterLayout:
        """The layout after a reduction over `dims`, which get extent 1, or vanish unless `keepdims`.

        Thread digits of reduced dimensions become replication; their slots are dropped.
        """
        reduced = {self._require_dim(dim) for dim in dims}
        kept = [dim for dim in range(self.rank) if keepdims or dim not in reduced]
        shape = tuple(1 if dim in reduced else self.shape[dim] for dim in kept)
        place = {dim: k for k, dim in enumerate(kept) if dim not in reduced}
        locals_ = tuple(d for d in self.local_digits if d.dim not in reduced)
        return RegisterLayout(shape, _redirected(self.thread_digits, place), _redirected(locals_, place))

    def expand(self, dim: int, size: int) -> RegisterLayout:
        """Broadcast a dimension of extent 1 to `size`: every owner of an element holds all of its copies.

        The copies are the outermost slots, so slot i of the result has the value of slot `i % num_locals` here.
        """
        dim = self._require_dim(dim)
        if self.shape[dim] != 1:
            raise LayoutError(
                f"expand of dimension {dim} with extent {self.shape[dim]}; expected extent 1",
                hint="repeat the tile with a product: local(...) * layout",
            )
        return local(*(size if k == dim else 1 for k in range(self.rank))) * self

    def _redirect(self, shape: tuple[int, ...], place: dict[int, int]) -> RegisterLayout:
        return RegisterLayout(shape, _redirected(self.thread_digits, place), _redirected(self.local_digits, place))

    # ---- checks

    def _require_dim(self, dim: int) -> int:
        if not -self.rank <= dim < self.rank:
            raise LayoutError(
                f"dimension {dim} of a layout of rank {self.rank} and shape {self.shape}",
                hint=f"dimensions are {-self.rank}..{self.rank - 1}; unsqueeze inserts further ones",
            )
        return dim % self.rank

    def _require_rank(self, other: RegisterLayout) -> None:
        if self.rank != other.rank:
            raise LayoutError(
                f"ranks differ: {self} has rank {self.rank}, {other} has rank {other.rank}",
                hint="insert dimensions of extent 1 with unsqueeze",
            )


def _redirected(digits: Sequence[Digit], place: dict[int, int]) -> tuple[Digit, ...]:
    """The digits with renamed dimensions; digits of dimensions without a place replicate."""
    return tuple(Digit(d.size, place[d.dim], d.weight) if d.dim in place else Digit(d.size, None, 0) for d in digits)


def _replica_offsets(terms: Sequence[Term]) -> list[int]:
    ranges = [range(0, term.stride * term.size, term.stride) for term in terms if term.dim is None]
    return [sum(combination) for combination in product(*ranges)]


def _one_digit_a_dim(shape: Sequence[int], order: Sequence[int]) -> tuple[Digit, ...]:
    for extent in shape:
        if extent < 1:
            raise LayoutError(
                f"a layout got shape {tuple(shape)}; expected positive extents",
                hint="a dim that is not there has extent 1",
            )
    return tuple(Digit(shape[dim], dim, 1) for dim in order)


def spatial(*shape: int) -> RegisterLayout:
    """One element a thread; threads in row-major order."""
    return RegisterLayout(shape, _one_digit_a_dim(shape, range(len(shape))), ())


def column_spatial(*shape: int) -> RegisterLayout:
    """One element a thread; threads in column-major order (the first dimension varies fastest)."""
    return RegisterLayout(shape, _one_digit_a_dim(shape, range(len(shape))[::-1]), ())


def local(*shape: int) -> RegisterLayout:
    """One thread holds all elements; slots in row-major order."""
    return RegisterLayout(shape, (), _one_digit_a_dim(shape, range(len(shape))))


def column_local(*shape: int) -> RegisterLayout:
    """One thread holds all elements; slots in column-major order (the first dimension varies fastest)."""
    return RegisterLayout(shape, (), _one_digit_a_dim(shape, range(len(shape))[::-1]))


def replicated(threads: int, rank: int) -> RegisterLayout:
    """`threads` threads that all hold the same single element."""
    return RegisterLayout((1,) * rank, (Digit(threads, None, 0),), ())


def local_replicated(count: int, rank: int) -> RegisterLayout:
    """One thread that holds the same single element in `count` slots."""
    return RegisterLayout((1,) * rank, (), (Digit(count, None, 0),))


def identity(rank: int) -> RegisterLayout:
    """One thread, one slot, one element: the unit of the product."""
    return RegisterLayout((1,) * rank, (), ())
