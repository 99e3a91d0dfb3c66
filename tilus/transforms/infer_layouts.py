"""Give every register tile a layout, and make each conversion that is then needed a visible `convert`.

A worklist: pinned layouts spread through the instructions' own rules; when nothing follows any more, the undecided instruction
of the highest priority (dot, then loads, then the rest, constants last; program order among equals) chooses its default,
which spreads in turn. Deterministic, and linear in the number of (tile, use) pairs.

Requires: a verified function. Ensures: every RegisterTensor has a layout, and every instruction accepts those of its operands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from tilus.errors import Loc, TilusError
from tilus.instructions.convert import Convert
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import Inst, Seq, Stmt
from tilus.ir.tensor import RegisterTensor, Tensor
from tilus.ir.visit import instructions, rewrite
from tilus.ir.visit import replace as replace_tensors
from tilus.layout import RegisterLayout
from tilus.target import Target

Known = dict[RegisterTensor, RegisterLayout]


def infer_layouts(function: Function, target: Target) -> Function:
    known = _solve(function)
    tensors: dict[Tensor, Tensor] = {t: replace(t, layout=layout) for t, layout in known.items() if t.layout is None}
    placed = replace_tensors(function.body, tensors)
    count = 0

    def with_conversions(stmt: Stmt) -> Stmt:
        nonlocal count
        if not isinstance(stmt, Inst):
            return stmt
        layouts = {t: t.layout for t in _tiles(stmt.inst) if t.layout is not None}
        needed = stmt.inst.required_layouts(layouts, function.num_threads)
        if not needed:
            return stmt
        converted: dict[Tensor, Tensor] = {}
        before: list[Stmt] = []
        for tile, layout in needed.items():
            count += 1
            copy = RegisterTensor(tile.dtype, tile.shape, layout, f"{tile.name}_converted_{count}")
            before.append(Inst(Convert(copy, tile), stmt.loc))
            converted[tile] = copy
        return Seq((*before, Inst(_replace_operands(stmt.inst, converted), stmt.loc)))

    body = rewrite(placed, with_conversions)
    return function if body is function.body else replace(function, body=body)


def _replace_operands(inst: Instruction, converted: dict[Tensor, Tensor]) -> Instruction:
    """Replace operands but not results: an instruction may read and write the same mutable tile."""
    changed = inst.replace(converted)
    results = {name: value for name, value in inst.fields() if name == "out" or name.startswith("out_")}
    return replace(changed, **results)


def _tiles(inst: Instruction) -> list[RegisterTensor]:
    return [*inst.register_results, *inst.register_operands]


def _solve(function: Function) -> Known:
    program = list(instructions(function.body))
    users: dict[RegisterTensor, list[int]] = {}
    known: Known = {}
    for position, stmt in enumerate(program):
        for tile in _tiles(stmt.inst):
            users.setdefault(tile, []).append(position)
            if tile.layout is not None:
                known[tile] = tile.layout
    work = deque(range(len(program)))
    queued = set(work)

    def learn(layouts: dict[RegisterTensor, RegisterLayout], loc: Loc | None) -> None:
        for tile, layout in layouts.items():
            if tile in known:
                continue
            _check(tile, layout, function.num_threads, loc)
            known[tile] = layout
            for user in users[tile]:
                if user not in queued:
                    queued.add(user)
                    work.append(user)

    undecided = sorted(range(len(program)), key=lambda i: (program[i].inst.layout_priority, i))
    while True:
        while work:
            position = work.popleft()
            queued.discard(position)
            stmt = program[position]
            learn(dict(stmt.inst.infer_layouts(known, function.num_threads)), stmt.loc)
        undecided = [i for i in undecided if any(t not in known for t in _tiles(program[i].inst))]
        if not undecided:
            return known
        _choose(program, undecided, known, function, learn)


def _choose(
    program: list[Inst], undecided: list[int], known: Known, function: Function,
    learn: Callable[[Known, Loc | None], None],
) -> None:  # fmt: skip
    for position in undecided:
        stmt = program[position]
        try:
            layouts = dict(stmt.inst.default_layouts(known, function.num_threads))
        except TilusError as error:
            raise error.at(stmt.loc) from None
        fresh = {t: layout for t, layout in layouts.items() if t not in known}
        if fresh:
            learn(fresh, stmt.loc)
            return
    stmt = program[undecided[0]]
    names = [t.name for t in _tiles(stmt.inst) if t not in known]
    raise TilusError(f"no layout follows for {', '.join(names)}", loc=stmt.loc, hint="pin one with tilus.with_layout")


def _check(tile: RegisterTensor, layout: RegisterLayout, num_threads: int, loc: Loc | None) -> None:
    if layout.shape != tile.shape:
        raise TilusError(
            f"layout {layout} has shape {list(layout.shape)}, tile {tile.name} {list(tile.shape)}", loc=loc
        )
    if layout.num_threads != num_threads:
        raise TilusError(
            f"layout {layout} is for {layout.num_threads} threads, the block has {num_threads}",
            loc=loc,
            hint="change `warps` in tilus.grid or the layout",
        )
