"""atom and red (PTX ISA 9.7.13.5): one lane after another, in random order where lanes meet at an address."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.decode import DTYPES, PAIRS, Array, Mask, Site, Step, instruction
from tilus.runtime.emulator.floating import narrow, widen
from tilus.runtime.emulator.memory import SPACES, Access, elements_of, space_of

Lanes = npt.NDArray[np.int64]
_SEMANTICS = ("relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys", "noftz", "L2::cache_hint")
_OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
Update = Callable[[Array, Array, Array], Array]
"""(old, b, c) -> new, elements of the type."""


def addition(type_name: str) -> Callable[[Array, Array], Array]:
    """The sum of two arrays of a type: rounded once, integers wrap."""
    if "f" in type_name and type_name not in ("f32", "f64"):
        return lambda a, b: narrow(widen(a, type_name) + widen(b, type_name), type_name)
    return lambda a, b: a + b


def _update(site: Site, type_name: str) -> Update:
    operation = site.one_of(*_OPERATIONS)
    is_float = "f" in type_name
    match operation:
        case "add":
            add = addition(type_name)
            return lambda old, b, c: add(old, b)
        case "min" | "max" if is_float:
            less = np.minimum if operation == "min" else np.maximum
            return lambda old, b, c: narrow(less(widen(old, type_name), widen(b, type_name)), type_name)
        case "min":
            return lambda old, b, c: np.minimum(old, b)
        case "max":
            return lambda old, b, c: np.maximum(old, b)
        case "and":
            return lambda old, b, c: old & b
        case "or":
            return lambda old, b, c: old | b
        case "xor":
            return lambda old, b, c: old ^ b
        case "exch":
            return lambda old, b, c: b
        case "cas":
            return lambda old, b, c: np.where(old == b, c, old)
        case "inc":
            return lambda old, b, c: np.where(old >= b, np.uint32(0), old + np.uint32(1))
        case "dec":
            return lambda old, b, c: np.where((old == 0) | (old > b), b, old - np.uint32(1))
        case _:
            raise site.unsupported("an atomic without an operation", f"expected one of {', '.join(_OPERATIONS)}")


@instruction("atom")
def atomic(site: Site) -> Step:
    return _atomic(site, has_result=True)


@instruction("red")
def reduction(site: Site) -> Step:
    if site.has("async"):
        raise site.unsupported("modifier .async")
    return _atomic(site, has_result=False)


def _atomic(site: Site, *, has_result: bool) -> Step:
    """All elements of a vector atomic (.v2, .v4 of f32 and so on) are updated one by one."""
    site.allow(*SPACES, *_SEMANTICS, *_OPERATIONS, "v2", "v4", "v8")
    type_name = site.type()
    position = 1 if has_result else 0
    site.expect_operands(
        *((position + 2, position + 3) if site.has("cas") or site.has("L2::cache_hint") else (position + 2,))
    )
    update = _update(site, type_name)
    element = np.dtype(DTYPES[type_name])
    size = element.itemsize * (2 if type_name in PAIRS else 1)
    raw = f"b{size * 8}"
    sources = [site.source(operand, raw) for operand in elements_of(site, site.operands[position + 1])]
    third = site.source(position + 2, raw) if site.has("cas") else sources[0]
    outs = [site.target(operand, raw) for operand in elements_of(site, site.operands[0])] if has_result else []
    access = Access(site, site.operands[position], space_of(site), size * len(sources), align=size * len(sources))
    acquires = site.one_of("acquire", "acq_rel") is not None
    machine, pc, shift = site.machine, site.pc, size.bit_length() - 1

    def typed(values: Array) -> Array:
        values = np.ascontiguousarray(values).view(element)
        return values.reshape(-1, 2) if type_name in PAIRS else values

    def step(mask: Mask) -> None:
        for shared, lanes, where in access.split(site.lanes(mask)):
            if shared:
                machine.shared_shadow.write(pc, where, access.nbytes, lanes, None, atomic=True)
            elif acquires:
                machine.global_shadow.acquire(lanes)
            data = (machine.shared if shared else machine.memory).views[size]
            for chosen in _turns(where, machine.rng):
                who = lanes[chosen]
                for index, source in enumerate(sources):
                    place = (where[chosen] >> shift) + index
                    old = data[place]
                    b = np.broadcast_to(source, machine.lanes)[who]
                    c = np.broadcast_to(third, machine.lanes)[who]
                    new = np.ascontiguousarray(update(typed(old), typed(b), typed(c)))
                    data[place] = new.view(data.dtype).reshape(-1)
                    if outs:
                        outs[index][who] = old

    return step


def _turns(where: Lanes, rng: np.random.Generator) -> list[Lanes]:
    """Positions in rounds, so that no address occurs twice in a round; the order at an address is random."""
    order = rng.permutation(len(where))
    order = order[np.argsort(where[order], kind="stable")]
    places = where[order]
    first = np.flatnonzero(np.concatenate(([True], places[1:] != places[:-1])))
    rank = np.arange(len(places)) - np.repeat(first, np.diff(np.append(first, len(places))))
    return [order[rank == turn] for turn in range(int(rank.max(initial=-1)) + 1)]
