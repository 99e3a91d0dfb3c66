"""The second half of `infer_layouts`: conversions where an instruction cannot run in the layouts that its tiles have.

Each instruction runs in the way that moves the fewest bits: operands are converted before it, results after it. A conversion of
a tile that is written once stands outside of all loops that the tile is defined outside of, and serves all later uses there.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tilus.instructions.convert import Convert
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction, is_out
from tilus.ir.layout_rules import Layouts, moved_nbits, same_owners
from tilus.ir.stmt import For, If, Inst, Role, Seq, Stmt, While
from tilus.ir.tensor import LayoutOrigin, RegisterTensor, Tensor
from tilus.layout import RegisterLayout


def insert_conversions(function: Function) -> Function:
    """The function with a `convert` for each layout that does not fit; all tiles must have layouts.

    Raises: TilusError with the line where an instruction can run in no layout at all.
    """
    inserter = _Inserter(function.num_threads)
    body = inserter.block(function.body, is_loop=False)
    return function if body is function.body else replace(function, body=body)


@dataclass
class _Block:
    """A block under construction. defined: tiles that it writes so far. copies: conversions in it, by tile and layout."""

    is_loop: bool
    stmts: list[Stmt] = field(default_factory=list[Stmt])
    defined: set[RegisterTensor] = field(default_factory=set[RegisterTensor])
    copies: dict[tuple[RegisterTensor, RegisterLayout], RegisterTensor] = field(
        default_factory=dict[tuple[RegisterTensor, RegisterLayout], RegisterTensor]
    )


class _Inserter:
    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.open: list[_Block] = []
        self.count = 0  # of tiles that are made
        self.changed = 0  # instructions, also those that take what another one had converted

    def block(self, body: Stmt, *, is_loop: bool) -> Stmt:
        """The body with its conversions; the same object when it needs none."""
        changed = self.changed
        self.open.append(_Block(is_loop))
        self.statement(body)
        done = self.open.pop()
        return body if self.changed == changed else Seq(tuple(done.stmts))

    def statement(self, stmt: Stmt) -> None:
        match stmt:
            case Seq(stmts):
                for child in stmts:
                    self.statement(child)
            case For(body=body) | While(body=body):
                new = self.block(body, is_loop=True)
                self.open[-1].stmts.append(stmt if new is body else replace(stmt, body=new))
            case If(_, then, orelse):
                sides = self.block(then, is_loop=False), self.block(orelse, is_loop=False)
                same = sides[0] is then and sides[1] is orelse
                self.open[-1].stmts.append(stmt if same else replace(stmt, then=sides[0], orelse=sides[1]))
            case Role(body=body):
                outer, self.num_threads = self.num_threads, stmt.num_threads
                new = self.block(body, is_loop=False)
                self.num_threads = outer
                self.open[-1].stmts.append(stmt if new is body else replace(stmt, body=new))
            case Inst():
                self.instruction(stmt)
            case _:
                self.open[-1].stmts.append(stmt)

    def instruction(self, stmt: Inst) -> None:
        inst = stmt.inst
        rule, layouts = inst.layout_rule(self.num_threads), _layouts(inst)
        ways = rule.ways(layouts) or rule.defaults()
        way = min(ways, key=lambda way: moved_nbits(way, layouts))

        def fits(tile: RegisterTensor) -> bool:
            return (same_owners if rule.renames else operator.eq)(way[tile], layouts[tile])

        operands: dict[Tensor, Tensor] = {
            t: self._converted(t, way[t], stmt)
            for t in dict.fromkeys(inst.register_operands)
            if t in way and not fits(t)
        }
        made: dict[RegisterTensor, RegisterTensor] = {
            t: self._tile(t, way[t], stmt) for t in inst.register_results if t in way and not fits(t)
        }
        block = self.open[-1]
        changed = _over(inst, operands, made) if operands or made else inst
        self.changed += changed is not inst
        block.stmts.append(stmt if changed is inst else Inst(changed, stmt.loc))
        block.stmts.extend(Inst(Convert(tile, source), stmt.loc) for tile, source in made.items())
        block.defined.update(inst.register_results)

    def _converted(self, tile: RegisterTensor, layout: RegisterLayout, stmt: Inst) -> RegisterTensor:
        """The tile in another layout: an earlier conversion, or a new one in front of the outermost loop that allows it."""
        if tile.mutable:
            copy = self._tile(tile, layout, stmt)
            self.open[-1].stmts.append(Inst(Convert(copy, tile), stmt.loc))
            return copy
        for block in self.open:
            if (tile, layout) in block.copies:
                return block.copies[tile, layout]
        place = len(self.open) - 1
        while self.open[place].is_loop and tile not in self.open[place].defined:
            place -= 1
        copy = self._tile(tile, layout, stmt)
        self.open[place].stmts.append(Inst(Convert(copy, tile), stmt.loc))
        self.open[place].copies[tile, layout] = copy
        return copy

    def _tile(self, tile: RegisterTensor, layout: RegisterLayout, stmt: Inst) -> RegisterTensor:
        self.count += 1
        origin = LayoutOrigin(stmt.inst.mnemonic, stmt.loc)
        return RegisterTensor(tile.dtype, tile.shape, layout, f"{tile.name}_converted_{self.count}", origin=origin)


def _layouts(inst: Instruction) -> Layouts:
    return {t: t.layout for t in (*inst.register_results, *inst.register_operands) if t.layout is not None}


def _over(
    inst: Instruction, operands: Mapping[Tensor, Tensor], results: Mapping[RegisterTensor, Tensor]
) -> Instruction:
    """The instruction over other tiles; one that it both reads and writes may become two."""
    changed = inst.replace(operands)
    outs = {name: results.get(value, value) for name, value in inst.fields() if is_out(name)}
    return replace(changed, **outs)
