"""The packed order of each code type: a search for the order of bits whose cast takes the fewest instructions.

Both lanes of a word are filled alike, so the search is about 16 cells a word. Each word holds as many whole codes as fit; its
remaining cells are pieces of codes that stretch over several words. Integers may lie anywhere in a mantissa, so the question is
where each word's remaining cells are: coordinate descent over the words. Floats have to lie at certain places; whole codes are
the image shifted by different distances, and pieces are dealt out such that one shift moves as many bits as possible.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Sequence
from functools import lru_cache

from tilus.codegen.code_order import CodeOrder, natural_order
from tilus.codegen.fields import Choice, Source, arrange, choice_of, choose, total_cost
from tilus.codegen.images import Image, images
from tilus.dtypes import DataType, bf16, f16, f32, float8_e4m3, float8_e5m2
from tilus.errors import TilusError

LANE = 16
Cells = dict[tuple[int, int], int]
"""Where each (code, bit) of one lane is: 16 * word + place."""


@lru_cache
def packed_order(dtype: DataType, packed_for: DataType = f16) -> CodeOrder:
    """The order in which codes of a type are packed: the best one for casts to `packed_for`, f16, bf16 or f32, and right for all.

    For f32 it is the little-endian order: values of 32 bits have no lanes to share. Types that hardware converts two at a time
    keep their bytes in order for f16 and bf16, too.
    Raises: TilusError for other types.
    """
    if not dtype.is_small or packed_for not in (f16, bf16, f32):
        raise TilusError(
            f"codes of {dtype} packed for {packed_for}, expected a type of 1 to 8 bits and f16, bf16 or f32",
            hint="what is packed for f16 can be cast to any type",
        )
    if packed_for == f32 or dtype in (float8_e4m3, float8_e5m2):
        return natural_order(dtype)
    # Casts of 5-bit exponents to bf16 go through f16, of which these types are the upper bits.
    dst = f16 if dtype.exponent_nbits == f16.exponent_nbits else packed_for
    ways = images(dtype, dst, scaled=True)
    if dtype.is_integer:
        return _order(dtype, _descent(dtype.nbits, ways))
    shapes = [images(dtype, float_type, scaled=True)[0] for float_type in (f16, bf16)]
    candidates = [cells for image in shapes for cells in _whole_images(dtype.nbits, image)]
    return _order(dtype, min(candidates, key=lambda cells: lane_cost(dtype.nbits, cells, ways)))


def lane_cost(nbits: int, cells: Cells, ways: Sequence[Image]) -> int:
    """Instructions for all pairs of a chunk."""
    options = [
        [lane_choice(image, tuple(cells[code, bit] for bit in range(nbits))) for image in ways]
        for code in range(len(cells) // nbits)
    ]
    return total_cost(arrange(choose(options)))


@lru_cache(maxsize=4096)
def lane_choice(image: Image, cells: tuple[int, ...]) -> Choice:
    """How a code whose bits are in these cells gets to its image, in one lane."""
    pieces: dict[Source, int] = {}
    for cell, target in zip(cells, image.places, strict=True):
        source = Source(cell // LANE * 32 + cell % LANE - target)
        pieces[source] = pieces.get(source, 0) | 1 << target
    return choice_of(image, pieces)


def _order(dtype: DataType, cells: Cells) -> CodeOrder:
    """Codes 2 r and 2 r + 1 are code r of the low and the high lane."""
    bits = [0] * (2 * len(cells))
    for (code, bit), cell in cells.items():
        for lane in (0, 1):
            bits[cell // LANE * 32 + lane * LANE + cell % LANE] = (2 * code + lane) * dtype.nbits + bit
    return CodeOrder(dtype, tuple(bits))


def _words(nbits: int) -> int:
    return nbits // math.gcd(nbits, LANE)


def _descent(nbits: int, ways: Sequence[Image]) -> Cells:
    """An order of integers that no change of one word's cut makes better."""
    whole = LANE // nbits
    cuts = [rest for rest in itertools.combinations(range(LANE), LANE % nbits) if _is_cut(rest, nbits)]
    chosen = [cuts[-1]] * _words(nbits)
    best = _fill(nbits, whole, chosen)
    cost = lane_cost(nbits, best, ways)
    improved = len(cuts) > 1
    while improved:
        improved = False
        for word, cut in itertools.product(range(len(chosen)), cuts):
            trial = [*chosen[:word], cut, *chosen[word + 1 :]]
            cells = _fill(nbits, whole, trial)
            if (trial_cost := lane_cost(nbits, cells, ways)) < cost:
                best, cost, chosen, improved = cells, trial_cost, trial, True
    return best


def _is_cut(rest: tuple[int, ...], nbits: int) -> bool:
    """Whether the cells between remaining ones are whole codes."""
    edges = [-1, *rest, LANE]
    return all((after - before - 1) % nbits == 0 for before, after in itertools.pairwise(edges))


def _fill(nbits: int, whole: int, cuts: Sequence[tuple[int, ...]]) -> Cells:
    """Whole codes in ascending order, then the pieces: the remaining cells of all words, one after the other."""
    cells: Cells = {}
    for word, rest in enumerate(cuts):
        free = [place for place in range(LANE) if place not in rest]
        for index, place in enumerate(free):
            cells[word * whole + index // nbits, index % nbits] = word * LANE + place
    pieces = [word * LANE + place for word, rest in enumerate(cuts) for place in rest]
    for index, cell in enumerate(pieces):
        cells[len(cuts) * whole + index // nbits, index % nbits] = cell
    return cells


def _whole_images(nbits: int, image: Image) -> Iterator[Cells]:
    """Orders of floats: for every set of shifts that keeps images apart, and leaves the first in place."""
    shapes = [{place - shift for place in image.places} for shift in range(LANE)]
    fitting = [shift for shift in range(1, LANE) if min(shapes[shift]) >= 0]
    for count in range(LANE // nbits):
        for others in itertools.combinations(fitting, count):
            shifts = (0, *others)
            union: set[int] = set().union(*(shapes[shift] for shift in shifts))
            if len(union) == len(shifts) * nbits:
                yield _deal(nbits, image, shifts)


def _deal(nbits: int, image: Image, shifts: Sequence[int]) -> Cells:
    """Whole images in every word; further codes in groups that lie like them, from the remaining cells."""
    words = _words(nbits)
    cells: Cells = {}
    left = [set(range(LANE)) for _ in range(words)]
    codes = itertools.count()
    for word in range(words):
        for shift in shifts:
            code = next(codes)
            for bit, place in enumerate(image.places):
                cells[code, bit] = word * LANE + place - shift
                left[word].discard(place - shift)
    for first in range(words * len(shifts), words * LANE // nbits, len(shifts)):
        group = shifts[: words * LANE // nbits - first]
        wanted = {
            place - shift: (first + index, bit)
            for index, shift in enumerate(group)
            for bit, place in enumerate(image.places)
        }
        while wanted:
            word, moves = _largest_move(left, wanted)
            for target, place in moves.items():
                cells[wanted.pop(target)] = word * LANE + place
                left[word].discard(place)
    return cells


def _largest_move(left: Sequence[set[int]], wanted: Container[int]) -> tuple[int, dict[int, int]]:
    """The word and shift that bring most of a word's remaining cells to wanted places, as place by target."""
    best: tuple[int, dict[int, int]] = 0, {}
    for word, shift in itertools.product(range(len(left)), range(-LANE + 1, LANE)):
        moves = {place - shift: place for place in left[word] if place - shift in wanted}
        if len(moves) > len(best[1]):
            best = word, moves
    return best
