"""Give every shared tensor without a pinned layout the one under which its accesses cost least.

Every instruction says what it moves from and to shared memory (`shared_accesses`). The cost of a layout is the sum over all
accesses of instructions plus wavefronts, which counts vector width and bank conflicts alike; wavefronts are exact, as the mean
over all places at which a tile may start. An access in a loop counts as often as the loop runs, 8 times where that is not
known; both sides of a branch count. Of layouts that cost the same, the smaller one wins (padding takes memory from other
blocks), then the simpler one: row-major, another order of the dims, a swizzle, core matrices, padding. An access that works
with certain layouts only (wgmma, TMA) leaves the choice among those.

Requires: layouts of all register tiles. Ensures: every SharedTensor has a layout that all its accesses can work with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from tilus.codegen.shared_access import SharedAccess
from tilus.codegen.shared_plan import plan_shared
from tilus.errors import Loc, TilusError
from tilus.ir.expr import Const
from tilus.ir.function import Function
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import SharedTensor, Tensor
from tilus.ir.visit import replace as replace_tensors
from tilus.layout import SharedLayout, row_major
from tilus.layout.candidates import ELABORATE_KINDS, PLAIN_KINDS, Kind, orders, plain, roomy, variants
from tilus.target import Target

UNKNOWN_TRIPS = 8
SIMPLICITY = {kind: place for place, kind in enumerate((*PLAIN_KINDS, "prescribed", *ELABORATE_KINDS))}


@dataclass(frozen=True)
class Use:
    """An access of a shared tensor at a place of the program. weight: how often it runs, as far as that is known."""

    access: SharedAccess
    weight: int
    mnemonic: str
    loc: Loc | None


@dataclass(frozen=True)
class Candidate:
    """A layout that all accesses can work with, and what they cost in it (see `AccessCost.total`), each times its weight."""

    kind: Kind
    layout: SharedLayout
    cost: Fraction

    @property
    def rank(self) -> tuple[Fraction, int, int]:
        """Least first."""
        return self.cost, self.layout.size, SIMPLICITY[self.kind]


def layout_shared(function: Function, target: Target) -> Function:
    found = uses(function, target)
    for tensor, accesses in found.items():
        _check_pinned(tensor, accesses)
    free = {tensor: accesses for tensor, accesses in found.items() if tensor.layout is None}
    if not free:
        return function
    placed = _place(function, {tensor: best(tensor, accesses).layout for tensor, accesses in free.items()})
    if plan_shared(placed).nbytes > target.max_shared_nbytes:  # better slow than not at all
        placed = _place(function, {tensor: best(tensor, a, compact=True).layout for tensor, a in free.items()})
    return placed


def _place(function: Function, layouts: Mapping[SharedTensor, SharedLayout]) -> Function:
    chosen: dict[Tensor, Tensor] = {tensor: replace(tensor, layout=layout) for tensor, layout in layouts.items()}
    return replace(function, body=replace_tensors(function.body, chosen))


# ---- uses


def uses(function: Function, target: Target) -> dict[SharedTensor, list[Use]]:
    """The accesses of every shared tensor, in program order."""
    found: dict[SharedTensor, list[Use]] = {}
    for stmt, weight, num_threads in _weighted(function.body, 1, function.num_threads):
        for tensor in stmt.inst.operands:
            if isinstance(tensor, SharedTensor):
                found.setdefault(tensor, [])
        for tensor, access in stmt.inst.shared_accesses(num_threads, target):
            found.setdefault(tensor, []).append(Use(access, weight, stmt.inst.mnemonic, stmt.loc))
    return found


def _weighted(stmt: Stmt, weight: int, num_threads: int) -> Iterator[tuple[Inst, int, int]]:
    """Instructions, how often each runs, and in how many threads."""
    match stmt:
        case Seq():
            for child in stmt.stmts:
                yield from _weighted(child, weight, num_threads)
        case Inst():
            yield stmt, weight, num_threads
        case For():
            yield from _weighted(stmt.body, weight * _trips(stmt), num_threads)
        case While():
            yield from _weighted(stmt.body, weight * UNKNOWN_TRIPS, num_threads)
        case If():
            yield from _weighted(stmt.then, weight, num_threads)
            yield from _weighted(stmt.orelse, weight, num_threads)
        case Role():
            yield from _weighted(stmt.body, weight, stmt.num_threads)
        case SetScalar() | Break() | Continue() | Return():
            pass


def _trips(loop: For) -> int:
    if isinstance(loop.start, Const) and isinstance(loop.stop, Const):
        return len(range(int(loop.start.value), int(loop.stop.value), loop.step))
    return UNKNOWN_TRIPS


# ---- layouts that instructions prescribe


def _check_pinned(tensor: SharedTensor, accesses: Sequence[Use]) -> None:
    for use in accesses:
        legal = use.access.legal
        if legal is not None and tensor.layout is not None and tensor.layout not in legal:
            raise TilusError(
                f"{use.mnemonic} cannot work with layout {tensor.layout} of {tensor.name}; "
                f"expected one of {', '.join(map(str, legal)) or 'none: the shape does not fit'}",
                loc=use.loc,
                hint="leave the layout of the shared tensor to the compiler",
            )


def _prescribed(tensor: SharedTensor, accesses: Sequence[Use]) -> list[Candidate]:
    """The layouts with which all accesses can work, where some of them name theirs."""
    common: list[SharedLayout] | None = None
    named: list[Use] = []
    for use in accesses:
        if use.access.legal is None:
            continue
        left = [layout for layout in (use.access.legal if common is None else common) if layout in use.access.legal]
        if not left:
            raise _contradiction(tensor, use, named)
        common = left
        named.append(use)
    weighted = weights(accesses)
    costs = [(layout, total_cost(weighted, layout)) for layout in common or ()]
    # An access that no legal layout suits says so when it is lowered.
    possible = [Candidate("prescribed", layout, cost) for layout, cost in costs if cost is not None]
    return possible or [Candidate("prescribed", layout, Fraction(0)) for layout, _ in costs]


def _contradiction(tensor: SharedTensor, use: Use, named: Sequence[Use]) -> TilusError:
    def places(others: Sequence[Use]) -> str:
        return "".join(f"\n  {o.mnemonic} at {o.loc}\n{o.loc.snippet()}" for o in others if o.loc is not None)

    if not use.access.legal:
        return TilusError(
            f"{use.mnemonic} has no layout for {tensor.name} of shape {list(tensor.shape)} and {tensor.dtype.name}",
            loc=use.loc,
            hint="use a tile that is a multiple of what the instruction moves",
        )
    return TilusError(
        f"no layout of {tensor.name} suits {use.mnemonic}, which can work with "
        f"{', '.join(map(str, use.access.legal))}, and the accesses before it:{places(named)}",
        loc=use.loc,
        hint="give the two accesses shared tensors of their own",
    )


# ---- the choice


def total_cost(accesses: Mapping[SharedAccess, int], layout: SharedLayout) -> Fraction | None:
    """What weighted accesses cost in a layout; None when one of them cannot work with it."""
    total = Fraction(0)
    for access, weight in accesses.items():
        cost = access.cost(layout)
        if cost is None:
            return None
        total += weight * cost.total
    return total


def weights(accesses: Sequence[Use]) -> Counter[SharedAccess]:
    """Equal accesses, such as those of unrolled loops, as one."""
    result: Counter[SharedAccess] = Counter()
    for use in accesses:
        result[use.access] += use.weight
    return result


def best(tensor: SharedTensor, accesses: Sequence[Use], *, compact: bool = False) -> Candidate:
    """The candidate of least rank. compact: of those without padding.

    Raises: TilusError when no layout is legal for all accesses.
    """
    weighted = weights(accesses)
    if any(access.legal is not None for access in weighted):
        return min(_prescribed(tensor, accesses), key=lambda candidate: candidate.rank)
    floors = _floors(tensor, weighted)
    winner: Candidate | None = None
    for kind, order, layout in _layouts(tensor):
        if winner is not None and _cannot_win(winner, min(floors.values(), default=0), math.prod(tensor.shape), kind):
            break
        if compact and layout.size > math.prod(tensor.shape):
            continue
        floor = floors.get(_contiguous(order))
        if floor is None or (winner is not None and _cannot_win(winner, floor, layout.size, kind)):
            continue
        cost = total_cost(weighted, layout)
        if cost is None:
            continue
        candidate = Candidate(kind, layout, cost)
        if winner is None or candidate.rank < winner.rank:
            winner = candidate
    if winner is None:  # the instruction that no layout helps says so when it is lowered
        return Candidate("row-major", row_major(tensor.shape), Fraction(0))
    return winner


def candidates(tensor: SharedTensor, accesses: Sequence[Use]) -> list[Candidate]:
    """All layouts that the accesses can work with, least rank first, for reports and tests."""
    weighted = weights(accesses)
    if any(access.legal is not None for access in weighted):
        return sorted(_prescribed(tensor, accesses), key=lambda candidate: candidate.rank)
    found = [
        Candidate(kind, layout, cost)
        for kind, _, layout in _layouts(tensor)
        if (cost := total_cost(weighted, layout)) is not None
    ]
    return sorted(found, key=lambda candidate: candidate.rank)


def _layouts(tensor: SharedTensor) -> Iterator[tuple[Kind, tuple[int, ...], SharedLayout]]:
    """Candidates with the order of dims that they vary, simple ones first; the same layout may come more than once."""
    all_orders = orders(tensor.shape)
    yield "row-major", all_orders[0], plain(tensor.shape, all_orders[0])
    for order in all_orders[1:]:
        yield "other order", order, plain(tensor.shape, order)
    for kind in ELABORATE_KINDS:
        for order in all_orders:
            for layout in variants(kind, tensor.shape, tensor.dtype.nbits, order):
                yield kind, order, layout


def _floors(tensor: SharedTensor, accesses: Mapping[SharedAccess, int]) -> dict[int, int]:
    """For each dim that may be the contiguous one, a cost that no such layout can be below: no conflicts, widest vectors."""
    floors: dict[int, int] = {}
    for order in {_contiguous(order): order for order in orders(tensor.shape)}.values():
        memory = roomy(tensor.shape, order)
        costs = [(weight, access.least_total(memory)) for access, weight in accesses.items()]
        possible = [weight * cost for weight, cost in costs if cost is not None]
        if len(possible) == len(costs):
            floors[_contiguous(order)] = sum(possible)
    return floors


def _contiguous(order: tuple[int, ...]) -> int:
    return order[-1] if order else 0


def _cannot_win(winner: Candidate, least_cost: int, size: int, kind: Kind) -> bool:
    return (least_cost, size, SIMPLICITY[kind]) >= winner.rank
