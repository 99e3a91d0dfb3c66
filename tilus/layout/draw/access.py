"""One warp's access to shared memory, phase by phase: which lanes meet in which bank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilus.layout.banks import BANK_NBYTES, NUM_BANKS
from tilus.layout.draw.picture import FAINT, FEW, IDLE, INK, MANY, Picture, colour, fitting_size
from tilus.layout.draw.tiles import WARP_SIZE
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout
from tilus.layout.shared import SharedLayout

WIDTH, HEIGHT, GUTTER = 26, 26, 150
WIDEST_NBITS = 128
MAX_PHASES = 32


@dataclass(frozen=True)
class Phase:
    """Lanes that the memory serves together, in one access of a warp.

    access: the number of the access. lanes: first and last. words: by bank, each word that is asked for and its lanes.
    """

    access: int
    lanes: tuple[int, int]
    words: tuple[dict[int, tuple[int, ...]], ...]

    @property
    def wavefronts(self) -> int:
        return max(map(len, self.words))


def access_size(memory: SharedLayout, tile: RegisterLayout, nbits: int) -> int:
    """Elements that every thread can move at once: the most, up to 16 bytes, that are neighbours in memory and aligned.

    Raises LayoutError where the shapes differ, or where not even whole bytes can be moved.
    """
    if memory.shape != tile.shape:
        raise LayoutError(f"{tile} has shape {list(tile.shape)}, but {memory} has shape {list(memory.shape)}")
    offsets = _offsets(memory, tile)
    size = WIDEST_NBITS // nbits & -(WIDEST_NBITS // nbits)
    while size >= 1 and size * nbits % 8 == 0:
        if tile.num_locals % size == 0:
            runs = offsets.reshape(tile.num_threads, -1, size)
            if np.all(runs[..., :1] % size == 0) and np.all(runs == runs[..., :1] + np.arange(size)):
                return size
        size //= 2
    raise LayoutError(
        f"threads of {tile} hold no whole aligned bytes of {memory} for {nbits}-bit elements",
        hint="choose layouts whose runs of slots are runs of memory",
    )


def phases(memory: SharedLayout, tile: RegisterLayout, nbits: int = 16, warp: int = 0) -> list[Phase]:
    """The accesses of one warp that moves a whole tile, in the order of its slots.

    Up to 4 bytes a lane all 32 lanes are one phase, of 8 bytes half of them, of 16 bytes a quarter.
    """
    size = access_size(memory, tile, nbits)
    nbytes = size * nbits // 8
    lanes_at_once = WARP_SIZE // max(1, nbytes // BANK_NBYTES)
    first = _offsets(memory, tile)[warp * WARP_SIZE : (warp + 1) * WARP_SIZE, ::size] * nbits // 8
    if not len(first):
        raise LayoutError(f"warp {warp} of {tile}, which has {tile.num_threads} threads")
    result: list[Phase] = []
    for access in range(first.shape[1]):
        for start in range(0, len(first), lanes_at_once):
            words: list[dict[int, tuple[int, ...]]] = [{} for _ in range(NUM_BANKS)]
            last = min(start + lanes_at_once, len(first))
            for lane in range(start, last):
                address = int(first[lane, access])
                for word in range(address // BANK_NBYTES, (address + nbytes - 1) // BANK_NBYTES + 1):
                    of_bank = words[word % NUM_BANKS]
                    of_bank[word] = (*of_bank.get(word, ()), lane)
            result.append(Phase(access, (start, last - 1), tuple(words)))
    return result


def access_table(memory: SharedLayout, tile: RegisterLayout, nbits: int = 16) -> str:
    """Wavefronts of each phase of the first warp, and their sum, as text."""
    found = phases(memory, tile, nbits)
    lines = [_title(memory, tile, nbits)]
    for phase in found:
        busiest = max(range(NUM_BANKS), key=lambda bank: len(phase.words[bank]))
        lanes = " ".join(str(lane) for lanes in phase.words[busiest].values() for lane in lanes)
        reason = "" if phase.wavefronts == 1 else f": lanes {lanes} want different words of bank {busiest}"
        lines.append(f"access {phase.access}, lanes {_range(phase)}: {_count(phase.wavefronts)}{reason}")
    return "\n".join([*lines, _sum(found)])


def access_svg(memory: SharedLayout, tile: RegisterLayout, nbits: int = 16) -> str:
    """The accesses of the first warp: a row is a phase, a column a bank; a cell counts the words that its lanes want.

    One word is served at once however many lanes want it; red cells make the phase take that many wavefronts.
    """
    found = phases(memory, tile, nbits)
    picture = Picture()
    lines = [_title(memory, tile, nbits), _sum(found)]
    if len(found) > MAX_PHASES:
        lines.append(f"drawn: the first {MAX_PHASES} of {len(found)} phases")
    top = picture.lines(6, 4, lines)
    entries = [(colour(0), "one word: its lane"), (FEW, "x2: two words"), (MANY, "xN: N words"), (IDLE, "idle")]
    top = picture.legend(8, top, entries)
    for bank in range(NUM_BANKS):
        picture.text(GUTTER + WIDTH * (bank + 0.5), top + 14, str(bank), ink=FAINT)
    top += 20
    for phase in found[:MAX_PHASES]:
        picture.text(6, top + 18, f"access {phase.access}, lanes {_range(phase)}", size=11, anchor="start")
        for bank, words in enumerate(phase.words):
            _cell(picture, bank, words, GUTTER + WIDTH * bank, top)
        end = GUTTER + WIDTH * NUM_BANKS
        picture.text(end + 8, top + 18, _count(phase.wavefronts), size=11, anchor="start")
        top += HEIGHT
    return picture.svg()


def _offsets(memory: SharedLayout, tile: RegisterLayout) -> npt.NDArray[np.int64]:
    """The address of every (thread, slot), in elements."""
    return memory.table()[tuple(np.moveaxis(tile.table(), -1, 0))]


def _cell(picture: Picture, bank: int, words: dict[int, tuple[int, ...]], x: float, y: float) -> None:
    fill = (IDLE, colour(0), FEW)[len(words)] if len(words) < 3 else MANY
    note = "; ".join(f"word {word}: lanes {' '.join(map(str, lanes))}" for word, lanes in sorted(words.items()))
    picture.box(x + 0.5, y + 0.5, WIDTH - 1, HEIGHT - 1, fill, f"bank {bank}: {note}" if words else "")
    if words:
        lanes = sorted({lane for of_word in words.values() for lane in of_word})
        label = str(lanes[0]) if len(lanes) == 1 else f"{lanes[0]}.." if len(words) == 1 else f"x{len(words)}"
        ink = "#FFFFFF" if fill == MANY else INK
        picture.text(x + WIDTH / 2, y + 18, label, size=fitting_size(label, WIDTH, 11), ink=ink)


def _title(memory: SharedLayout, tile: RegisterLayout, nbits: int) -> str:
    size = access_size(memory, tile, nbits)
    per_thread = tile.num_locals // size
    return f"{memory} accessed as {tile}: {per_thread} x {size * nbits} bits per thread, warp 0 of {tile.num_threads} threads"


def _range(phase: Phase) -> str:
    first, last = phase.lanes
    return f"{first}-{last}" if last > first else str(first)


def _count(wavefronts: int) -> str:
    return f"{wavefronts} wavefront{'s' if wavefronts > 1 else ''}"


def _sum(found: list[Phase]) -> str:
    total = sum(phase.wavefronts for phase in found)
    busy = Counter(phase.wavefronts for phase in found)
    extra = total - len(found)
    worst = f", at worst {max(busy)} in a phase" if extra else ""
    return f"{len(found)} phases, {_count(total)}, {extra} of them conflicts{worst}"
