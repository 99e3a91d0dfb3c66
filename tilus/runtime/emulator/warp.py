"""Instructions in which the lanes of a warp exchange values (PTX ISA 9.7.9.6 and 9.7.13): shfl, vote, match, redux."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tilus.ptx.module import Pair, Special
from tilus.runtime.emulator.decode import DTYPES, Array, Mask, Site, Step, instruction
from tilus.runtime.emulator.machine import WARP

Active = npt.NDArray[np.bool_]


def _by_warp(site: Site, mask: Mask) -> Active:
    """The executing lanes as [warps, 32]."""
    machine = site.machine
    return (np.ones(machine.lanes, np.bool_) if mask is None else mask).reshape(-1, WARP)


def _full(site: Site, values: Array) -> Array:
    """A source as [warps, 32], constants included."""
    return np.broadcast_to(values, site.machine.lanes).reshape(-1, WARP)


@instruction("shfl.sync")
def shuffle(site: Site) -> Step:
    """shfl.sync.{up,down,bfly,idx}.b32 d{|p}, a, b, c, membermask, by the pseudo code of the ISA.

    Raises when a lane reads from one that does not execute the instruction: its value would be undefined.
    """
    site.allow("sync", "up", "down", "bfly", "idx")
    site.expect_operands(5)
    mode = site.one_of("up", "down", "bfly", "idx")
    target = site.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Special("_"))
    out, valid_out = site.target(first, "b32"), site.target(second, "pred")
    value, offset, clamp = site.source(1, "b32"), site.source(2, "u32"), site.source(3, "u32")
    members = site.source(4, "u32")
    lane = np.arange(WARP)

    def step(mask: Mask) -> None:
        site.check_members(mask, members)
        active = _by_warp(site, mask)
        b = (_full(site, offset) & 31).astype(np.int64)
        c = _full(site, clamp).astype(np.int64)
        segment = c >> 8 & 31
        highest = (lane & segment) | (c & 31 & ~segment)
        lowest = lane & segment
        match mode:
            case "up":
                source = lane - b
                valid = source >= highest  # the ISA gives `up` the clamp as its lower bound
            case "down":
                source = lane + b
                valid = source <= highest
            case "bfly":
                source = lane ^ b
                valid = source <= highest
            case _:
                source = lowest | (b & ~segment)
                valid = source <= highest
        source = np.where(valid, source, lane)
        missing = active & ~np.take_along_axis(active, source, axis=1)
        if missing.any():
            place = int(np.flatnonzero(missing)[0])
            raise site.fault(f"reads from lane {source.reshape(-1)[place]}, which does not execute the shuffle", place)
        result = np.take_along_axis(_full(site, value), source, axis=1).reshape(-1)
        where = True if mask is None else mask
        np.copyto(out, result, where=where)
        np.copyto(valid_out, valid.reshape(-1), where=where)

    return step


@instruction("vote.sync")
def vote(site: Site) -> Step:
    """vote.sync.{all,any,uni}.pred d, {!}a, membermask and vote.sync.ballot.b32."""
    site.allow("sync", "all", "any", "uni", "ballot")
    site.expect_operands(3)
    mode = site.one_of("all", "any", "uni", "ballot")
    out = site.target(0, "b32" if mode == "ballot" else "pred")
    votes, members = site.predicate(site.operands[1]), site.source(2, "u32")
    bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)

    def step(mask: Mask) -> None:
        site.check_members(mask, members)
        active, ballot = _by_warp(site, mask), _full(site, votes())
        every, some = (ballot | ~active).all(axis=1), (ballot & active).any(axis=1)
        match mode:
            case "all":
                result = every
            case "any":
                result = some
            case "uni":
                result = every | ~some
            case _:
                result = np.where(ballot & active, bits, np.uint32(0)).sum(axis=1, dtype=np.uint32)
        np.copyto(out, np.repeat(result, WARP), where=True if mask is None else mask)

    return step


@instruction("activemask")
def active_mask(site: Site) -> Step:
    out = site.target(0, "b32")
    bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)

    def step(mask: Mask) -> None:
        present = np.where(_by_warp(site, mask), bits, np.uint32(0)).sum(axis=1, dtype=np.uint32)
        np.copyto(out, np.repeat(present, WARP), where=True if mask is None else mask)

    return step


@instruction("elect.sync")
def elect(site: Site) -> Step:
    """elect.sync d|p, membermask: the leader and whether this lane is it.

    The ISA says only that the same member mask gives the same leader: here it is any of the lanes, drawn at the start.
    """
    site.allow("sync")
    target = site.operands[0]
    if not isinstance(target, Pair):
        raise site.fault("expected a destination of the form d|p")
    out, leads, members = site.target(target.first, "b32"), site.target(target.second, "pred"), site.source(1, "u32")

    def step(mask: Mask) -> None:
        site.check_members(mask, members)
        rank = np.where(_by_warp(site, mask), site.machine.leadership, -1)
        leader = np.repeat(rank.argmax(axis=1), WARP)
        where = True if mask is None else mask
        np.copyto(out, leader.astype(np.uint32), where=where)
        np.copyto(leads, leader == np.arange(leader.size) % WARP, where=where)

    return step


@instruction("redux.sync")
def reduce_warp(site: Site) -> Step:
    """redux.sync.{add,min,max,and,or,xor}.{s32,u32,b32} d, a, membermask. The members of a lane form one reduction."""
    site.allow("sync", "add", "min", "max", "and", "or", "xor")
    site.expect_operands(3)
    type_name = site.type()
    if type_name not in ("s32", "u32", "b32"):
        raise site.unsupported(f"type .{type_name}")
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    function = functions[site.words[1]]
    out, value, members = site.target(0, type_name), site.source(1, type_name), site.source(2, "u32")

    def step(mask: Mask) -> None:
        site.check_members(mask, members)
        active, values, named = _by_warp(site, mask), _full(site, value), _full(site, members)
        result = np.empty(values.shape, DTYPES[type_name])
        for warp in np.flatnonzero(active.any(axis=1)):
            for group in np.unique(named[warp, active[warp]]):
                lanes = active[warp] & (named[warp] == group)
                result[warp, lanes] = function.reduce(values[warp, lanes])  # pyright: ignore[reportFunctionMemberAccess]
        np.copyto(out, result.reshape(-1), where=True if mask is None else mask)

    return step


@instruction("match.any.sync", "match.all.sync")
def match_value(site: Site) -> Step:
    """match.any: the lanes with this lane's value. match.all: all members if they agree, else 0, and whether."""
    site.allow("any", "all", "sync")
    site.expect_operands(3)
    target = site.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Special("_"))
    out, agree_out = site.target(first, "b32"), site.target(second, "pred")
    value, members = site.source(1, site.type()), site.source(2, "u32")
    bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
    every = site.has("all")

    def step(mask: Mask) -> None:
        site.check_members(mask, members)
        active, values = _by_warp(site, mask), _full(site, value)
        equal = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        same = np.where(equal, bits, np.uint32(0)).sum(axis=2, dtype=np.uint32)
        present = np.where(active, bits, np.uint32(0)).sum(axis=1, dtype=np.uint32)[:, None]
        agree = same == present
        where = True if mask is None else mask
        np.copyto(out, (np.where(agree, same, np.uint32(0)) if every else same).reshape(-1), where=where)
        np.copyto(agree_out, agree.reshape(-1), where=where)

    return step
