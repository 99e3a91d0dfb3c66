"""The report of a GPU kernel: what it costs (registers, memory accesses, bank conflicts, conversions) and what it became."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from tilus.codegen.shared_access import AccessCost
from tilus.compiler import Compiled
from tilus.errors import Loc, TilusError
from tilus.ir.tensor import RegisterTensor, SharedTensor
from tilus.ir.visit import by_warps, instructions
from tilus.layout.conversion import ConversionPlan, ScratchWay
from tilus.ptx import sass
from tilus.ptx.assembler import Cubin
from tilus.report.text import aligned, render_mix, render_sections
from tilus.runtime import cache
from tilus.transforms.layout_shared import Use, candidates, total_cost, uses, weights


@dataclass(frozen=True)
class Report:
    """Everything that `render` shows, as data. `sass` is None without a disassembler; `no_sass` then says why."""

    compiled: Compiled
    cubin: Cubin
    sass: sass.SassKernel | None
    no_sass: str = ""

    def render(self) -> str:
        """The report as text: a section each for resources, accesses, bank conflicts, layouts, conversions and SASS."""
        function = self.compiled.function
        head = f"{function.name} for {self.compiled.target}: {function.num_threads} threads a block"
        sections = [
            ("resources", self._resources()),
            ("memory and tensor-core instructions", self._notes()),
            ("shared memory", self._shared()),
            ("bank conflicts (extra wavefronts of a block)", self._conflicts()),
            ("layouts", self._layouts()),
            ("conversions", self._conversions()),
            ("machine code", self._mix()),
        ]
        return render_sections(head, sections)

    def _resources(self) -> Iterator[str]:
        usage = self.cubin.kernel(self.compiled.kernel_name)
        lowered = self.compiled.lowered
        dynamic = lowered.shared_nbytes if lowered.dynamic_shared else 0
        spills = f"{usage.spill_store_nbytes} bytes stored, {usage.spill_load_nbytes} bytes loaded"
        yield from aligned(
            [
                ("registers", f"{usage.registers} a thread"),
                ("spills", spills if usage.spill_store_nbytes or usage.spill_load_nbytes else "none"),
                ("stack", f"{usage.stack_nbytes} bytes a thread"),
                ("shared memory", f"{usage.shared_nbytes} bytes static, {dynamic} bytes dynamic"),
                ("assembler", f"ptxas {self.cubin.assembler.version}"),
            ]
        )

    def _notes(self) -> Iterable[str]:
        counts = dict[tuple[str, str], int]()
        for note in self.compiled.lowered.notes:
            key = (_place(note.loc), note.text)
            counts[key] = counts.get(key, 0) + 1
        return aligned([(place, _times(text, count)) for (place, text), count in counts.items()])

    def _shared(self) -> Iterable[str]:
        found = uses(self.compiled.function, self.compiled.target)
        return aligned(
            [(t.name, _tensor(t), f"{t.nbytes} bytes", str(t.layout), _choice(t, a)) for t, a in found.items()]
        )

    def _conflicts(self) -> Iterable[str]:
        rows: dict[tuple[str, str, AccessCost], int] = {}
        for tensor, accesses in uses(self.compiled.function, self.compiled.target).items():
            for use in accesses:
                cost = None if tensor.layout is None else use.access.cost(tensor.layout)
                if cost is not None:
                    key = (_place(use.loc), f"{use.mnemonic} {tensor.name}", cost)
                    rows[key] = rows.get(key, 0) + 1
        accesses = [
            (place, what, f"{cost.nbytes} bytes a lane", _times(_conflicts(cost), count))
            for (place, what, cost), count in rows.items()
        ]
        return aligned([*accesses, *self._scratch_conflicts()])

    def _scratch_conflicts(self) -> Iterator[tuple[str, ...]]:
        """Of the stores and loads of conversions; both are executed by every warp, or once by all warps together."""
        for place, names, plan, num_threads in self._plans():
            if isinstance(plan.chosen, ScratchWay):
                scratch = plan.chosen.scratch
                repeats = num_threads // scratch.num_threads
                for what, side in (("store", scratch.store), ("load", scratch.load)):
                    count = f"{repeats * side.extra} in {repeats * side.wavefronts} wavefronts"
                    yield place, f"{what} {names}", f"{scratch.access_nbytes(side)} bytes a lane", count

    def _layouts(self) -> Iterable[str]:
        tiles: dict[RegisterTensor, None] = {}
        for stmt in instructions(self.compiled.function.body):
            tiles.update(dict.fromkeys((*stmt.inst.register_results, *stmt.inst.register_operands)))
        return aligned([(t.name, _tensor(t), _origin(t), str(t.layout)) for t in tiles])

    def _conversions(self) -> Iterable[str]:
        """Every way that a tile could take, the chosen one first; costs in cycles of a warp (see tilus.layout.conversion)."""
        return aligned((place, names, str(plan)) for place, names, plan, _ in self._plans())

    def _plans(self) -> Iterator[tuple[str, str, ConversionPlan, int]]:
        """Conversions, with the number of threads that do each."""
        function = self.compiled.function
        for stmt, warps in by_warps(function.body, function.warps):
            for plan in stmt.inst.conversions():
                names = f"{stmt.inst.register_operands[0].name} -> {stmt.inst.register_results[0].name}"
                yield _place(stmt.loc), names, plan, 32 * len(warps)

    def _mix(self) -> Iterator[str]:
        if self.sass is None:
            yield self.no_sass
            return
        loop = self.sass.innermost_loop()
        yield from aligned(
            (which, render_mix(sass.instruction_mix(code)))
            for which, code in (("all", self.sass.instructions), ("loop", loop))
            if code
        )


def make_report(compiled: Compiled) -> Report:
    """Assemble a kernel (from the cache when it was assembled before) and disassemble it when there is a disassembler.

    Raises: TilusError when there is no assembler, or it refuses the kernel. A kernel that spills is reported like any other.
    """
    cubin = cache.assemble(compiled.ptx, compiled.target, allow_spills=True)
    try:
        tool = sass.find_disassembler()
    except TilusError as error:
        return Report(compiled, cubin, None, f"{error.message}: {error.hint}")
    kernels = {kernel.name: kernel for kernel in sass.disassemble(cubin.cubin, tool)}
    return Report(compiled, cubin, kernels[compiled.kernel_name])


def _conflicts(cost: AccessCost) -> str:
    text = f"{_number(cost.conflicts)} in {_number(cost.wavefronts)} wavefronts of {cost.instructions} instructions"
    if cost.worst == cost.wavefronts:
        return text
    return f"{text} in the mean, {cost.worst_conflicts} in {cost.worst} at the worst offset"


def _choice(tensor: SharedTensor, accesses: Sequence[Use]) -> str:
    """What the layout costs (see `layout_shared`), a cheaper one if there is one, and the cheapest of each other kind."""
    found = candidates(tensor, accesses)
    cost = None if tensor.layout is None else total_cost(weights(accesses), tensor.layout)
    if cost is None:
        return "-"
    own = next((c.kind for c in found if c.layout == tensor.layout), "pinned")
    parts = [f"{own}: costs {_number(cost)}"]
    if found and found[0].cost < cost:
        parts.append(f"{found[0].layout} would cost {_number(found[0].cost)}")
    cheapest = [c for i, c in enumerate(found) if all(c.kind != other.kind for other in found[:i])]
    parts += [f"{c.kind} {_number(c.cost)}" for c in cheapest if c.kind != own]
    return "; ".join(parts)


def _number(value: Fraction) -> str:
    return f"{float(value):.1f}".removesuffix(".0")


def _tensor(tensor: RegisterTensor | SharedTensor) -> str:
    return f"{tensor.dtype.name}[{', '.join(map(str, tensor.shape))}]"


def _origin(tile: RegisterTensor) -> str:
    """Which instruction the layout follows from."""
    return "-" if tile.origin is None else str(tile.origin)


def _place(loc: Loc | None) -> str:
    return f"{Path(loc.file).name}:{loc.line}" if loc is not None else "-"


def _times(text: str, count: int) -> str:
    return text if count == 1 else f"{text}, {count} times"
