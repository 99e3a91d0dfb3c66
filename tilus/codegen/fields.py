"""Fields to lanes: which shifts, merges and masks bring the bits of two codes into the two 16-bit lanes of a register.

The bits of a string of words are reached through *sources*: a word; a window, 32 bits of the string from any bit on (one
shift, or funnel shift); two half-words of the string side by side (one `prmt`), shifted or not. A pair of codes is a set of
pieces, each a source and a mask, merged by one `lop3` each. Pairs share sources, so the cost of a choice depends on the others.
Pairs whose bits lie alike are a *family*: put together once, with one mask, and then shifted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tilus.codegen.images import Image

LANES = 0xFFFFFFFF
Place = Callable[[int, int], int]
"""The position in the string of one bit of a slot's code: place(slot, bit)."""


class Source(NamedTuple):
    """32 bits: the half-words `low` and `high` of the string side by side, shifted right by `shift` (left if negative).

    `high` is None for a window: the string from bit `low` on, words side by side.
    """

    low: int
    high: int | None = None
    shift: int = 0

    def needs(self) -> tuple[Source, ...]:
        """The sources that have to be made for this one, itself included: one instruction each."""
        if self.high is None:
            return (self,) if self.low % 32 else ()
        joined = Source(self.low, self.high)
        return (joined, self) if self.shift else (joined,)


@dataclass(frozen=True)
class Choice:
    """One way to bring a pair of slots into lanes: an image, and the pieces that make it, a mask for each source.

    whole_bytes: instead of pieces, the two bytes of the string that one `prmt` puts beside the pattern's upper byte.
    """

    image: Image
    pieces: dict[Source, int]
    needs: frozenset[Source]
    whole_bytes: tuple[int, int] | None = None

    @property
    def own_cost(self) -> int:
        """Instructions besides those that make the sources."""
        return len(self.pieces) + (self.whole_bytes is not None) + self.image.num_steps

    @property
    def mask(self) -> int:
        return sum(self.pieces.values())


def choice_of(image: Image, pieces: dict[Source, int]) -> Choice:
    """The choice with these pieces."""
    return Choice(image, pieces, frozenset(need for source in pieces for need in source.needs()))


def choices(place: Place, pair: tuple[int, int], images: Sequence[Image]) -> list[Choice]:
    """Every way: for each image, with pieces of both lanes at once where the codes lie alike, and with pieces of one lane."""
    found: list[Choice] = []
    places = [[place(slot, bit) for bit in range(len(images[0].places))] for slot in pair]
    for image in images:
        if image.mask == 0xFF and not image.pattern & 0xFF and (found_bytes := _bytes_of_one_word(places)):
            found.append(Choice(image, {}, frozenset(), found_bytes))
        windows: dict[Source, int] = {}
        joined: dict[Source, int] | None = {}
        for bit, target in enumerate(image.places):
            here = [places[lane][bit] for lane in (0, 1)]
            for lane in (0, 1):
                source = Source(here[lane] - target - 16 * lane)
                windows[source] = windows.get(source, 0) | 1 << target + 16 * lane
            if joined is not None:
                joined = _joined(joined, here[0], here[1], target)
        found.append(choice_of(image, windows))
        if joined is not None and joined.keys() != windows.keys():
            found.append(choice_of(image, joined))
    return found


def _bytes_of_one_word(places: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """The numbers of the bytes that two codes are, if they are bytes of the same word."""
    first, second = (lane[0] for lane in places)
    whole = all(lane[0] % 8 == 0 and list(lane) == list(range(lane[0], lane[0] + 8)) for lane in places)
    return (first // 8, second // 8) if whole and first // 32 == second // 32 else None


def _joined(pieces: dict[Source, int], low: int, high: int, target: int) -> dict[Source, int] | None:
    """One more bit for both lanes at once; None when the two bits have different offsets in their half-words."""
    if low % 16 != high % 16:
        return None
    halves, shift = (low // 16, high // 16), low % 16 - target
    aligned = halves[0] % 2 == 0 and halves[1] == halves[0] + 1
    source = Source(16 * halves[0] + shift) if aligned else Source(*halves, shift)
    return pieces | {source: pieces.get(source, 0) | 0x10001 << target}


def choose(options: Sequence[Sequence[Choice]]) -> list[Choice]:
    """One choice for each pair, greedily: the fewest new instructions, then the sources that can serve most other pairs."""
    in_need = [ways for ways in options if all(way.needs for way in ways)]
    popularity = Counter(need for ways in in_need for need in {need for way in ways for need in way.needs})
    made: set[Source] = set()
    chosen: list[Choice] = []

    def cost(way: Choice) -> tuple[int, int]:
        new = way.needs - made
        return way.own_cost + len(new), -sum(popularity[need] for need in new)

    for ways in options:
        best = min(ways, key=cost)
        made |= best.needs
        chosen.append(best)
    return chosen


@dataclass(frozen=True)
class Family:
    """Pairs whose bits lie alike, those of pair i `offsets[i]` bits behind those of the first: put together once, then shifted.

    members: indices into the list of choices.
    """

    first: Choice
    members: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def pieces(self) -> dict[Source, int]:
        """Those of the first pair, with the bits of the others beside them."""
        return {s: sum(moved(mask, offset) for offset in self.offsets) for s, mask in self.first.pieces.items()}

    def accepts(self, offset: int) -> bool:
        """Whether another pair's bits stay inside of 32 bits and clear of those that are there."""
        mask = moved(self.first.mask, offset)
        taken = sum(moved(self.first.mask, other) for other in self.offsets)
        return mask & LANES == mask and moved(mask, -offset) == self.first.mask and not mask & taken


def moved(mask: int, left: int) -> int:
    return mask << left if left >= 0 else mask >> -left


def families(chosen: Sequence[Choice]) -> list[Family]:
    """The choices in as few families as they fit into."""
    found: list[Family] = []
    for member, way in enumerate(chosen):
        for index, family in enumerate(found):
            offset = _offset(family.first, way)
            if offset is not None and family.accepts(offset):
                found[index] = Family(family.first, (*family.members, member), (*family.offsets, offset))
                break
        else:
            found.append(Family(way, (member,), (0,)))
    return found


def _offset(first: Choice, other: Choice) -> int | None:
    """How many bits behind those of the first pair the other's lie; None if they lie differently or are in one piece already."""
    if len(first.pieces) < 2 or first.image != other.image:
        return None
    if any(source.high is not None for source in (*first.pieces, *other.pieces)):
        return None
    theirs = {mask: source.low for source, mask in other.pieces.items()}
    offsets = {theirs.get(mask, source.low - 1) - source.low for source, mask in first.pieces.items()}
    return offsets.pop() if theirs.keys() == set(first.pieces.values()) and len(offsets) == 1 else None


def arrange(chosen: Sequence[Choice]) -> list[Family]:
    """The choices in families where that saves instructions, otherwise each alone."""
    apart = [Family(way, (index,), (0,)) for index, way in enumerate(chosen)]
    return min((apart, families(chosen)), key=total_cost)


def total_cost(arranged: Sequence[Family]) -> int:
    """Instructions for all pairs of all families, sources counted once."""
    cost = len({need for family in arranged for need in family.first.needs})
    for family in arranged:
        cost += family.first.own_cost + (len(family.members) - 1) * family.first.image.num_steps
        if len(family.members) > 1:
            cost += len(family.members) + sum(offset != 0 for offset in family.offsets) - 1
    return cost
