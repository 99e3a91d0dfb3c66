"""From one register layout to another: where each value comes from, and how far it travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tilus.layout.broadcast import slot_map
from tilus.layout.digits import Term
from tilus.layout.errors import LayoutError
from tilus.layout.register import RegisterLayout

Scope = Literal["thread", "warp", "block"]


@dataclass(frozen=True)
class Piece:
    """A piece of a thread or slot number n that adds `((n // stride) % size) * weight` to a number of the source."""

    stride: int
    size: int
    weight: int


@dataclass(frozen=True)
class Route:
    """`src^-1 . dst`: the (thread, slot) of the source for each (thread, slot) of the destination, digit by digit."""

    thread_from_thread: tuple[Piece, ...]
    thread_from_slot: tuple[Piece, ...]
    slot_from_thread: tuple[Piece, ...]
    slot_from_slot: tuple[Piece, ...]

    def thread(self, thread: int, slot: int) -> int:
        """The thread of the source that holds what `thread` needs in `slot`."""
        return _read(self.thread_from_thread, thread) + _read(self.thread_from_slot, slot)

    def slot(self, thread: int, slot: int) -> int:
        """The slot of the source with the value that `thread` needs in `slot`."""
        return _read(self.slot_from_thread, thread) + _read(self.slot_from_slot, slot)


def route(src: RegisterLayout, dst: RegisterLayout) -> Route | None:
    """The composition of `dst` with the inverse of `src`; None where their digits have no common refinement.

    Where the source replicates over threads, a thread reads the replica with its own replica digits, so that values
    stay within a warp where they can. Raises LayoutError where shapes or thread counts differ.
    """
    _require_same_tile(src, dst)
    parts = [
        _composed(src_terms, dst_terms)
        for src_terms in (src.thread_terms, src.local_terms)
        for dst_terms in (dst.thread_terms, dst.local_terms)
    ]
    thread_from_thread, thread_from_slot, slot_from_thread, slot_from_slot = parts
    if thread_from_thread is None or thread_from_slot is None or slot_from_thread is None or slot_from_slot is None:
        return None
    own = tuple(Piece(t.stride, t.size, t.stride) for t in src.thread_terms if t.dim is None)
    return Route(thread_from_thread + own, thread_from_slot, slot_from_thread, slot_from_slot)


def conversion_scope(src: RegisterLayout, dst: RegisterLayout, warp_size: int = 32) -> Scope:
    """How far values travel from `src` to `dst`.

    "thread": the conversion renames registers (`slot_map` exists); "warp": every warp already holds all values that it
    needs, so that shuffles do; "block": values cross warps, through shared memory. Raises LayoutError where shapes or
    thread counts differ.
    """
    _require_same_tile(src, dst)
    try:
        slot_map(dst, src)
    except LayoutError:
        held, needed = _elements_by_warp(src, warp_size), _elements_by_warp(dst, warp_size)
        return "block" if bool(np.any(needed & ~held)) else "warp"
    return "thread"


def _require_same_tile(src: RegisterLayout, dst: RegisterLayout) -> None:
    if src.shape != dst.shape or src.num_threads != dst.num_threads:
        raise LayoutError(
            f"a conversion from shape {src.shape} over {src.num_threads} threads to shape {dst.shape} over "
            f"{dst.num_threads} threads; expected the same shape and threads"
        )


def _read(pieces: Sequence[Piece], number: int) -> int:
    return sum(number // piece.stride % piece.size * piece.weight for piece in pieces)


def _composed(src_terms: Sequence[Term], dst_terms: Sequence[Term]) -> tuple[Piece, ...] | None:
    """The pieces that a number of the source reads from a number of the destination, through their shared weights."""
    result: list[Piece] = []
    for dst in dst_terms:
        for src in src_terms:
            low, high = max(src.weight, dst.weight), min(src.weight * src.size, dst.weight * dst.size)
            if src.dim is None or src.dim != dst.dim or low >= high:
                continue
            if low % src.weight or low % dst.weight or high % low:
                return None
            result.append(Piece(dst.stride * (low // dst.weight), high // low, src.stride * (low // src.weight)))
    return tuple(result)


def _elements_by_warp(layout: RegisterLayout, warp_size: int) -> npt.NDArray[np.bool_]:
    """Which elements each warp holds: bool of shape [warps, elements]."""
    table = layout.table()
    flat = (
        np.ravel_multi_index(tuple(table[..., dim] for dim in range(layout.rank)), layout.shape) if layout.rank else 0
    )
    warps = np.arange(layout.num_threads)[:, None] // warp_size
    held = np.zeros((-(-layout.num_threads // warp_size), layout.size), dtype=np.bool_)
    held[warps, flat] = True
    return held
