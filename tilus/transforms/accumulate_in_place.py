"""Let accumulating instructions write their variable's storage directly.

`t = dot(a, b, acc); acc = t` becomes one dot. A result that must share the registers of its accumulator (`accumulator`, wgmma)
does so where nothing else uses the accumulator: both become one mutable tile.

Requires: a verified function. Ensures: no instruction with `accumulates` is followed by a copy of its only use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tilus.instructions.view import Assign
from tilus.ir.function import Function
from tilus.ir.stmt import For, If, Inst, Role, Seq, Stmt, While
from tilus.ir.tensor import RegisterTensor, Tensor
from tilus.ir.visit import instructions, walk
from tilus.ir.visit import replace as replace_tensors
from tilus.target import Target


def accumulate_in_place(function: Function, target: Target) -> Function:
    uses = Counter(t for stmt in instructions(function.body) for t in stmt.inst.register_operands)
    body = _rewrite(function.body, uses)
    shared = _shared_registers(pair for stmt in walk(body) if isinstance(stmt, Seq) for pair in _chains(stmt, uses))
    body = replace_tensors(body, shared) if shared else body
    return function if body is function.body else replace(function, body=body)


def _chains(block: Seq, uses: Counter[RegisterTensor]) -> Iterator[tuple[RegisterTensor, RegisterTensor]]:
    """(result, accumulator) of instructions that alone use their accumulator, and as often as it is written."""
    defined: set[RegisterTensor] = set()
    for stmt in block.stmts:
        if not isinstance(stmt, Inst):
            continue
        acc = stmt.inst.accumulator()
        for out in stmt.inst.register_results:
            if acc is not None and acc in defined and uses[acc] == 1 and _may_share(out, acc):
                yield out, acc
            if not out.mutable:
                defined.add(out)


def _may_share(out: RegisterTensor, acc: RegisterTensor) -> bool:
    return not out.mutable and (out.layout is None or acc.layout is None or out.layout == acc.layout)


def _shared_registers(pairs: Iterable[tuple[RegisterTensor, RegisterTensor]]) -> dict[Tensor, Tensor]:
    """One mutable tile for each chain of tiles, in program order."""
    tiles: dict[Tensor, Tensor] = {}
    for out, acc in pairs:
        first = tiles.setdefault(acc, replace(acc, mutable=True))
        tiles[out] = first
    return tiles


def _rewrite(stmt: Stmt, uses: Counter[RegisterTensor]) -> Stmt:
    match stmt:
        case Seq(stmts):
            merged = _merge([_rewrite(child, uses) for child in stmts], uses)
            same = len(merged) == len(stmts) and all(a is b for a, b in zip(merged, stmts, strict=True))
            return stmt if same else Seq(tuple(merged))
        case For(body=body) | While(body=body) | Role(body=body):
            new = _rewrite(body, uses)
            return stmt if new is body else replace(stmt, body=new)
        case If(_, then, orelse):
            sides = _rewrite(then, uses), _rewrite(orelse, uses)
            same = sides[0] is then and sides[1] is orelse
            return stmt if same else replace(stmt, then=sides[0], orelse=sides[1])
        case _:
            return stmt


def _merge(stmts: list[Stmt], uses: Counter[RegisterTensor]) -> list[Stmt]:
    """Without the copies of results to a variable that nothing touches between the result and the copy."""
    result: list[Stmt] = []
    places: dict[RegisterTensor, int] = {}  # of the results of accumulating instructions
    for stmt in stmts:
        if isinstance(stmt, Inst) and isinstance(stmt.inst, Assign):
            temporary, storage = stmt.inst.src, stmt.inst.out
            place = places.get(temporary)
            if place is not None and uses[temporary] == 1 and not _touches(result[place + 1 :], storage):
                made = result[place]
                if isinstance(made, Inst):
                    result[place] = Inst(replace(made.inst, out=storage), made.loc)
                    continue
        if isinstance(stmt, Inst) and stmt.inst.accumulates:
            places |= {out: len(result) for out in stmt.inst.register_results}
        result.append(stmt)
    return result


def _touches(stmts: Iterable[Stmt], tile: RegisterTensor) -> bool:
    inner = (inst.inst for stmt in stmts for inst in instructions(stmt))
    return any(tile in (*inst.register_results, *inst.register_operands) for inst in inner)
