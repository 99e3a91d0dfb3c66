"""Layouts as text: the expression that builds them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tilus.layout.digits import Digit


def register_expression(shape: Sequence[int], thread_digits: Sequence[Digit], local_digits: Sequence[Digit]) -> str:
    """A chain of constructors that builds the layout with these canonical digits.

    A chain is a product, so it exists exactly when one sequence of all digits respects the order of both lists and of
    every dimension. Otherwise each digit gets a dimension of its own, and a reshape joins them.
    """
    orders = [_product_order(shape, thread_digits, local_digits, on_threads) for on_threads in (True, False)]
    chains = [_calls(order, len(shape)) for order in orders if order is not None]
    if chains:
        return ".".join(min(chains, key=len)) or f"identity({len(shape)})"
    feeding = [d for d in (*thread_digits, *local_digits) if d.dim is not None]
    feeding.sort(key=lambda d: (d.dim, -d.weight))
    own = {digit: k for k, digit in enumerate(feeding)}
    factored = [
        [Digit(d.size, None, 0) if d.dim is None else Digit(d.size, own[d], 1) for d in digits]
        for digits in (thread_digits, local_digits)
    ]
    chain = register_expression([d.size for d in feeding], *factored)
    return f"{chain}.reshape({tuple(shape)})"


def _product_order(
    shape: Sequence[int], thread_digits: Sequence[Digit], local_digits: Sequence[Digit], on_threads: bool
) -> list[tuple[bool, Digit]] | None:
    """All digits as (is a thread digit, digit) in one order, outermost first, that fits both lists and all dimensions.

    None where there is none (a topological sort meets a cycle). It starts with the thread list or the local list and
    stays on one list as long as it can.
    """
    queues = {True: list(thread_digits), False: list(local_digits)}
    remaining = list(shape)
    order: list[tuple[bool, Digit]] = []
    while queues[True] or queues[False]:
        for kind in (on_threads, not on_threads):
            queue = queues[kind]
            # A digit is the outermost one left of its dimension when it counts to the extent that is left.
            if queue and (queue[0].dim is None or queue[0].size * queue[0].weight == remaining[queue[0].dim]):
                digit = queue.pop(0)
                if digit.dim is not None:
                    remaining[digit.dim] = digit.weight
                order.append((kind, digit))
                on_threads = kind
                break
        else:
            return None
    return order


def _calls(order: Sequence[tuple[bool, Digit]], rank: int) -> list[str]:
    """One call for each run of digits of one kind whose dimensions rise (row-major) or fall (column-major)."""
    calls: list[str] = []
    start = 0
    while start < len(order):
        kind, first = order[start]
        run = [first]
        while (following := start + len(run)) < len(order) and order[following][0] == kind:
            candidate = [*run, order[following][1]]
            if not (_monotone(candidate, 1) or _monotone(candidate, -1)):
                break
            run = candidate
        calls.append(_call(kind, run, rank, is_first=start == 0))
        start += len(run)
    return calls


def _monotone(run: Sequence[Digit], direction: int) -> bool:
    dims = [d.dim for d in run]
    return all(a is not None and b is not None and (b - a) * direction > 0 for a, b in pairwise(dims))


def _call(on_threads: bool, run: Sequence[Digit], rank: int, is_first: bool) -> str:
    if run[0].dim is None:
        name = "replicated" if on_threads else "local_replicated"
        return f"{name}({run[0].size}, {rank})" if is_first else f"{name}({run[0].size})"
    extents = [1] * rank
    for digit in run:
        if digit.dim is not None:
            extents[digit.dim] = digit.size
    column = "" if _monotone(run, 1) else "column_"
    return f"{column}{'spatial' if on_threads else 'local'}({', '.join(map(str, extents))})"


def shared_expression(
    shape: Sequence[int],
    digits: Sequence[Sequence[tuple[int, int]]],
    origin: int,
    swizzle: tuple[int, int, int] | None,
) -> str:
    """The constructor of a memory layout with these (size, stride) digits, its origin and its swizzle (base, bits, shift)."""
    suffix = (f".at({origin})" if origin else "") + ("" if swizzle is None else f".swizzled{swizzle}")
    own = [k for k, dim in enumerate(digits) if dim]
    for name, dims in (("row_major", own[::-1]), ("column_major", own)):
        compact, stride = True, 1
        for dim in dims:
            compact = compact and list(digits[dim]) == [(shape[dim], stride)]
            stride *= shape[dim]
        if compact:
            return f"{name}({tuple(shape)}){suffix}"
    sizes = [_one_or_tuple([size for size, _ in dim]) for dim in digits]
    strides = [_one_or_tuple([stride for _, stride in dim]) for dim in digits]
    return f"strided({_tuple(sizes)}, {_tuple(strides)}){suffix}"


def _one_or_tuple(values: Sequence[int]) -> str:
    """A dimension of extent 1 has no digits; it is written with size and stride 1."""
    if len(values) > 1:
        return str(tuple(values))
    return str(values[0]) if values else "1"


def _tuple(parts: Sequence[str]) -> str:
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
