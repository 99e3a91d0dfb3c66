"""Give every register tile a layout, and make each conversion that is then needed a visible `convert`.

A worklist over the instructions' layout rules. Pinned layouts spread first: an instruction that knows one layout takes the way
that moves the fewest bits, and so decides its other tiles. When nothing follows any more, the undecided instruction whose turn
it is chooses: by priority (matrix products, loads, stores, copies, arithmetic, constants), then the innermost loop, then the
most elements, then the narrowest of them (which need the longest runs for a full vector), then program order. Loads that came
off badly choose first in a second round. A tile is decided once, so the work is linear in the number of (tile, use) pairs, and
each decision remembers the instruction that it comes from.

Requires: a verified function. Ensures: every RegisterTensor has a layout, and every instruction can run in those of its tiles.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tilus.errors import Note, TilusError
from tilus.ir.function import Function
from tilus.ir.layout_rules import LayoutRule, Way, conversion_cost, moved, moved_nbits
from tilus.ir.stmt import For, If, Inst, Role, Seq, Stmt, While
from tilus.ir.tensor import LayoutOrigin, RegisterTensor, Tensor
from tilus.ir.visit import replace as replace_tensors
from tilus.layout import RegisterLayout
from tilus.target import Target
from tilus.transforms.insert_conversions import insert_conversions

PINNED = "pinned"
TRIALS = 16  # alternatives that are tried in one function,
BUDGET = 8000  # and instructions in all of them together
Decisions = dict[RegisterTensor, tuple[RegisterLayout, LayoutOrigin]]


def infer_layouts(function: Function, target: Target) -> Function:
    first, *others = rounds(uses(function))
    inference = min((first, *others), key=lambda x: x.cost) if others else first
    tensors: dict[Tensor, Tensor] = {
        tile: replace(tile, layout=layout, origin=inference.origins[tile])
        for tile, layout in inference.known.items()
        if tile.layout is None or tile.origin is None
    }
    body = replace_tensors(function.body, tensors)
    placed = function if body is function.body else replace(function, body=body)
    return insert_conversions(placed)


def rounds(program: Sequence[Use]) -> Iterator[Inference]:
    """The first decisions for a program, then those after each alternative on top of the best so far.

    Raises: TilusError with both lines where two pinned layouts contradict each other.
    """
    best = Inference(program, {})
    yield best
    trials = min(TRIALS, BUDGET // max(1, len(program)))
    for decisions in itertools.islice(best.alternatives(), trials):
        other = Inference(program, {**best.first, **decisions})
        yield other
        best = other if other.cost < best.cost else best


@dataclass(frozen=True, eq=False)
class Use:
    """An instruction with its tiles and its rule. depth: of the loops around it."""

    stmt: Inst
    tiles: tuple[RegisterTensor, ...]
    rule: LayoutRule
    depth: int


class Inference:
    """One round. first: what is decided beforehand. known: the layouts. origins: whom each comes from. evaluations: how often
    a rule was asked for its ways.
    """

    def __init__(self, program: Sequence[Use], first: Decisions) -> None:
        self.program = program
        self.first = first
        self.known = {tile: layout for tile, (layout, _) in first.items()}
        self.origins = {tile: origin for tile, (_, origin) in first.items()}
        self.evaluations = 0
        self._chosen: list[tuple[Use, LayoutOrigin, list[RegisterTensor]]] = []
        self._users: dict[RegisterTensor, list[int]] = {}
        for position, use in enumerate(program):
            for tile in dict.fromkeys(use.tiles):
                self._users.setdefault(tile, []).append(position)
                if tile.layout is not None and tile not in self.known:
                    self.known[tile] = tile.layout
                    self.origins[tile] = tile.origin or self._pinned(use, tile)
        self._work = deque(range(len(program)))
        self._queued = set(self._work)
        self._run()

    def _pinned(self, use: Use, tile: RegisterTensor) -> LayoutOrigin:
        """Storage has the layout of the variable's first value, which is where the program says it."""
        sources = (self.origins[t] for t in use.tiles if tile.mutable and t in self.origins and t.layout == tile.layout)
        return next(sources, LayoutOrigin(PINNED, use.stmt.loc))

    def _run(self) -> None:
        for use in self.program:
            if (pins := use.rule.contradiction()) is not None:
                raise self._contradiction(use, *pins)
        for position in sorted(range(len(self.program)), key=self._turn):
            self._spread()
            self._choose(self.program[position])
        self._spread()

    def _turn(self, position: int) -> tuple[int, int, int, int, int]:
        use = self.program[position]
        size, nbits = max((tile.size, -tile.dtype.nbits) for tile in use.tiles)
        return use.stmt.inst.layout_priority, -use.depth, -size, -nbits, position

    def _spread(self) -> None:
        while self._work:
            position = self._work.popleft()
            self._queued.discard(position)
            use = self.program[position]
            if use.rule.propagates and self._is_open(use):
                self._take(use, propagated=True)

    def _choose(self, use: Use) -> None:
        if self._is_open(use):
            self._take(use, propagated=False)

    def _is_open(self, use: Use) -> bool:
        return any(tile not in self.known for tile in use.tiles)

    def _take(self, use: Use, *, propagated: bool) -> None:
        """Decide the open tiles of an instruction by the way that moves the fewest bits."""
        self.evaluations += 1
        try:
            ways = use.rule.ways(self.known)
        except TilusError as error:
            raise error.at(use.stmt.loc) from None
        if not ways and propagated:
            return
        way = self._cheapest(ways or use.rule.defaults())
        origin = self._origin(use, way)
        fresh = [tile for tile in way if tile not in self.known]
        if not propagated and len(ways) > 1:
            self._chosen.append((use, origin, fresh))
        for tile in fresh:
            self.known[tile] = way[tile]
            self.origins[tile] = origin
            for user in self._users[tile]:
                if user not in self._queued:
                    self._queued.add(user)
                    self._work.append(user)

    def _cheapest(self, ways: Sequence[Way]) -> Way:
        if len(ways) == 1:
            return ways[0]
        return min(ways, key=lambda way: moved_nbits(way, self.known))

    def alternatives(self) -> Iterator[Decisions]:
        """What else could be decided first: what instructions with a bad layout insist on, and choices that others regret."""
        insisted = {
            tile: (layout, LayoutOrigin(use.stmt.inst.mnemonic, use.stmt.loc))
            for use in self.program
            for tile, layout in use.rule.insists(self.known).items()
            if tile.layout is None
        }
        if insisted:
            yield insisted
        regretted = {id(self.origins[tile]) for _, converted in self._runs for tile in converted}
        for use, origin, fresh in self._chosen:
            if id(origin) in regretted:
                for way in use.rule.ways(self.known):
                    yield {tile: (way[tile], origin) for tile in fresh}

    @functools.cached_property
    def _runs(self) -> list[tuple[Way, list[RegisterTensor]]]:
        """How each instruction runs now that all layouts are known, and the tiles that are converted for it."""
        ways = [self._cheapest(use.rule.ways(self.known) or use.rule.defaults()) for use in self.program]
        return [(way, moved(way, self.known)) for way in ways]

    @functools.cached_property
    def cost(self) -> int:
        """Cycles of a warp, by the plans of conversions and the estimates of the rules; a loop is taken to make eight trips."""
        total = 0
        for use, (way, converted) in zip(self.program, self._runs, strict=True):
            conversions = sum(conversion_cost(tile.dtype, self.known[tile], way[tile]) for tile in converted)
            total += (use.rule.cost(way) + conversions) << 3 * use.depth
        return total

    def _origin(self, use: Use, way: Way) -> LayoutOrigin:
        """Of the known tile that the way follows from; the instruction's own where there is none."""
        if use.rule.propagates:
            for tile in use.tiles:
                if tile in self.known and way.get(tile) == self.known[tile]:
                    return self.origins[tile]
        return LayoutOrigin(use.stmt.inst.mnemonic, use.stmt.loc)

    def _contradiction(self, use: Use, variable: RegisterTensor, value: RegisterTensor) -> TilusError:
        return TilusError(
            f"variable {variable.name} has the layout {variable.layout}, and is assigned a tile pinned to {value.layout}",
            loc=use.stmt.loc,
            notes=[self._pin(variable), self._pin(value)],
            hint=f"pin only one of them, or convert the value: tilus.with_layout(x, {variable.layout})",
        )

    def _pin(self, tile: RegisterTensor) -> Note:
        return Note(f"{tile.name} is pinned to {tile.layout} here", self.origins[tile].loc)


def uses(function: Function) -> list[Use]:
    """The instructions that touch tiles, in program order."""
    return list(_uses(function.body, function.num_threads, 0))


def _uses(stmt: Stmt, num_threads: int, depth: int) -> Iterator[Use]:
    match stmt:
        case Seq(stmts):
            for child in stmts:
                yield from _uses(child, num_threads, depth)
        case For(body=body) | While(body=body):
            yield from _uses(body, num_threads, depth + 1)
        case If(_, then, orelse):
            yield from _uses(then, num_threads, depth)
            yield from _uses(orelse, num_threads, depth)
        case Role(body=body):
            yield from _uses(body, stmt.num_threads, depth)
        case Inst(inst):
            if tiles := (*inst.register_results, *inst.register_operands):
                yield Use(stmt, tiles, inst.layout_rule(num_threads), depth)
        case _:
            pass
