"""Random pairs of register layouts of one tile: what conversions are tested with."""

from __future__ import annotations

import random

from tilus.layout import Digit, RegisterLayout

SHAPES = ((64,), (96,), (16, 16), (32, 8), (8, 24), (4, 4, 12), (64, 16), (6, 64), (128,), (2, 48), (7, 32), (40, 12))


def primes(n: int) -> list[int]:
    found: list[int] = []
    for p in (2, 3, 5, 7):
        while n % p == 0:
            found.append(p)
            n //= p
    return found


def random_layout_of(
    rng: random.Random, shape: tuple[int, ...], num_threads: int, order: float = 0.5
) -> RegisterLayout:
    """A layout of the shape: prime digits go to threads or slots, threads that are left replicate, sometimes slots do.

    order: how often the digits keep the order that neighbours in memory have.
    """
    factors: list[Digit] = []
    for dim, extent in enumerate(shape):
        weight = 1
        for p in rng.sample(primes(extent), len(primes(extent))):
            factors.append(Digit(p, dim, weight))
            weight *= p
    if rng.random() > order:
        rng.shuffle(factors)
    threads: list[Digit] = []
    slots: list[Digit] = []
    room = num_threads
    for digit in rng.sample(factors, len(factors)):
        if room % digit.size == 0 and rng.random() < 0.85:
            threads.append(digit)
            room //= digit.size
        else:
            slots.append(digit)
    threads = [d for d in factors if d in threads]
    slots = [d for d in factors if d in slots]
    for p in primes(room):
        threads.insert(rng.randint(0, len(threads)), Digit(p, None, 0))
    if rng.random() < 0.2:
        slots.insert(rng.randint(0, len(slots)), Digit(2, None, 0))
    return RegisterLayout(shape, tuple(threads), tuple(slots))


def random_pair(
    rng: random.Random, num_warps: int, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> tuple[RegisterLayout, RegisterLayout]:
    shape = rng.choice(shapes)
    return random_layout_of(rng, shape, 32 * num_warps), random_layout_of(rng, shape, 32 * num_warps)


def pair_within_warps(rng: random.Random, num_slots: int, num_warps: int) -> tuple[RegisterLayout, RegisterLayout]:
    """Layouts of powers of two without replication in which every warp keeps its own part of the tile."""
    size = 32 * num_slots
    warps = Digit(num_warps, 0, size)
    return _binary(rng, size, 32, (warps,)), _binary(rng, size, 32, (warps,))


def pair_of_powers_of_two(rng: random.Random, num_slots: int, num_warps: int) -> tuple[RegisterLayout, RegisterLayout]:
    """Layouts of powers of two without replication, whose bits are anywhere."""
    size = 32 * num_warps * num_slots
    return _binary(rng, size, 32 * num_warps, ()), _binary(rng, size, 32 * num_warps, ())


def _binary(rng: random.Random, size: int, num_threads: int, warps: tuple[Digit, ...]) -> RegisterLayout:
    """The bits of `size` indices in any order, the first ones in the thread number."""
    digits = [Digit(2, 0, 1 << k) for k in range(size.bit_length() - 1)]
    order = rng.sample(digits, len(digits))
    cut = num_threads.bit_length() - 1
    total = size if not warps else warps[0].size * warps[0].weight
    return RegisterLayout((total,), (*warps, *order[:cut]), tuple(order[cut:]))
