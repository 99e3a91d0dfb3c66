"""Random pairs of register layouts of one tile: what conversions are tested with."""

from __future__ import annotations

import math
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
    bits = 5 + int(math.log2(num_slots))
    digits = [Digit(2, 0, 1 << k) for k in range(bits)]
    found: list[RegisterLayout] = []
    for _ in range(2):
        order = rng.sample(digits, bits)
        threads = (Digit(num_warps, 0, 1 << bits), *order[:5])
        found.append(RegisterLayout((num_warps << bits,), threads, tuple(order[5:])))
    return found[0], found[1]
