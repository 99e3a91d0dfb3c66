"""What a memory layout means, written a second time: plain Python bit by bit, no code shared with tilus.layout.

A raw memory layout is (digits of each dimension as (size, stride), outermost first; swizzle (base, bits, shift) or None;
origin).
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

from hypothesis import strategies as st

from tilus.layout import Digit, SharedLayout, Swizzle

Triple = tuple[int, int, int]
RawMemory = tuple[list[list[tuple[int, int]]], Triple | None, int]
Addresses = dict[tuple[int, ...], int]


def shape_of(raw: RawMemory) -> tuple[int, ...]:
    return tuple(prod(size for size, _ in dim) for dim in raw[0])


def build(raw: RawMemory) -> SharedLayout:
    dims, swizzle, origin = raw
    digits = tuple(tuple(Digit(size, 0, stride) for size, stride in dim) for dim in dims)
    return SharedLayout(shape_of(raw), digits, None if swizzle is None else Swizzle(*swizzle), origin)


def swizzled_address(address: int, triple: Triple | None) -> int:
    bits = [address >> k & 1 for k in range(40)]
    if triple is not None:
        base, count, shift = triple
        for k in range(base, base + count):
            bits[k] ^= address >> (k + shift) & 1
    return sum(bit << k for k, bit in enumerate(bits))


def addresses(raw: RawMemory) -> Addresses:
    """index -> address."""
    dims, swizzle, origin = raw
    result = {}
    for index in product(*map(range, shape_of(raw))):
        address = origin
        for x, dim in zip(index, dims):
            for size, stride in reversed(dim):
                address += x % size * stride
                x //= size
        result[index] = swizzled_address(address, swizzle)
    return result


def table_of(layout: SharedLayout) -> Addresses:
    """index -> address, by the layout's table (which test_addresses_are_the_oracle checks)."""
    return dict(zip(product(*map(range, layout.shape)), layout.table().reshape(-1).tolist()))


def has_layout(function: Addresses) -> bool:
    """Whether some swizzle of some strides has these addresses, by trying each swizzle on every address."""
    top = max(function.values()).bit_length()
    triples: list[Triple | None] = [None]
    triples += [t for t in product(range(top), range(1, top), range(1, top)) if sum(t) <= top]
    return any(is_sum(function, triple) for triple in triples)


def is_sum(function: Addresses, triple: Triple | None) -> bool:
    """Whether the addresses before the swizzle are a sum over dimensions of sums over mixed-radix digits."""
    top = max(function.values()).bit_length()
    before = {swizzled_address(x, triple): x for x in range(1 << top)}
    linear = {index: before[address] for index, address in function.items()}
    rank = len(next(iter(linear)))
    shape = tuple(max(index[d] for index in linear) + 1 for d in range(rank))
    origin = linear[(0,) * rank]
    lines = [
        [linear[tuple(x if k == d else 0 for k in range(rank))] - origin for x in range(n)] for d, n in enumerate(shape)
    ]
    sums = all(value == origin + sum(line[x] for line, x in zip(lines, index)) for index, value in linear.items())
    return sums and all(_is_mixed_radix(line) for line in lines)


def _is_mixed_radix(line: list[int]) -> bool:
    """Whether line(x) = line(x // n * n) + line(x % n) for an innermost digit of some size n, and so on outwards."""
    count = len(line)
    if count == 1:
        return line[0] == 0
    return any(
        count % n == 0
        and line[1] >= 0
        and all(line[x] == line[x // n * n] + x % n * line[1] for x in range(count))
        and _is_mixed_radix(line[::n])
        for n in range(2, count + 1)
    )


@st.composite
def raw_memory(
    draw: Any, rank: int | None = None, with_swizzle: bool = True, with_origin: bool = True, room: int = 256
) -> RawMemory:
    """Any digits, with strides that collide, nest, interleave and leave gaps; any swizzle and origin."""
    if rank is None:
        rank = draw(st.integers(0, 3))
    digit = st.tuples(st.sampled_from([1, 2, 2, 3, 4, 8]), st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 24, 32, 64]))
    dims: list[list[tuple[int, int]]] = [[] for _ in range(rank)]
    for size, stride in draw(st.lists(digit, max_size=2 * rank)) if rank else []:
        if size <= room:
            room //= size
            draw(st.sampled_from(dims)).append((size, stride))
    triples = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4))
    swizzle = draw(st.none() | triples) if with_swizzle else None
    return dims, swizzle, draw(st.sampled_from([0, 0, 1, 2, 8, 12, 64])) if with_origin else 0


@st.composite
def raw_bits(draw: Any, rank: int = 2, max_bits: int = 8) -> RawMemory:
    """Powers of two that fill their memory in any order, and a swizzle: what kernels use."""
    count = draw(st.integers(0, max_bits))
    order = draw(st.permutations(range(count)))
    dims: list[list[tuple[int, int]]] = [[] for _ in range(rank)]
    for bit in order:
        draw(st.sampled_from(dims)).append((2, 1 << bit))
    return dims, draw(st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 5))), 0
