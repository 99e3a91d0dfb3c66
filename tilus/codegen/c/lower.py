"""C for one kernel: a function that runs blocks of the grid one after the other.

A block is one sequential program: barriers have no meaning, asynchronous copies happen where they are started, shared tensors and
tiles are arrays. The code is written twice. The first time shows in which order the tiles of variables are computed; the second
time their storage has that order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files

from tilus.codegen.c.context import CContext
from tilus.codegen.c.memory import GlobalMemory
from tilus.codegen.c.numbers import code_type
from tilus.codegen.c.scalar import scalar_type
from tilus.codegen.c.writer import Writer
from tilus.errors import TilusError
from tilus.ir.expr import Var
from tilus.ir.function import Function, TensorParam
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import GlobalTensor, RegisterTensor
from tilus.ir.visit import instructions, walk
from tilus.layout import SharedLayout
from tilus.target import CpuTarget

ENTRY = "tilus_blocks"
# What in the prelude is written with the machine's intrinsics.
INTRINSIC = re.compile(
    r"\b(tl_(load|store)_f16|tl_lookup\w*|tl_halves\w*|tl_total\w*|tl_sum_row|tl_byte_floats\w*|tl_dot\w*|TL_KEEP)\b"
)

_SIGNATURE = f"void {ENTRY}(const uint64_t *args, const int32_t *grid, int64_t first, int64_t last)"
_BLOCK = """
    for (int64_t block = first; block < last; block++)
        run_block(args, grid, block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]);
"""


def lower_c(function: Function, target: CpuTarget) -> str:
    """The C source of a kernel, complete, with the one entry point `tilus_blocks(args, grid, first, last)`.

    args: an 8-byte slot for each of `function.kernel_params()`: pointers, int64, doubles. It runs blocks first to last - 1, x
    fastest. The function must be unrolled; it needs no register layouts but those that the program pins.
    Raises: TilusError, with the user's line, for what has no meaning on a CPU.
    """
    _refuse_gpu_code(function)
    layouts: Mapping[RegisterTensor, SharedLayout] = {}
    lowering = _Lowering(function, target, layouts)
    lowering.run()
    found = {tensor: layout for tensor, (_, layout) in lowering.ctx.found.items()}
    if found:
        lowering = _Lowering(function, target, found)
        lowering.run()
    return lowering.text()


def _refuse_gpu_code(function: Function) -> None:
    """A block of the CPU is one sequential program, in which nobody could arrive while another waits."""
    for stmt in walk(function.body):
        found = None
        if isinstance(stmt, Role):
            found = f"tilus.warps ({stmt})"
        elif isinstance(stmt, Inst) and stmt.inst.needs_gpu:
            found = f"tilus.{stmt.inst.mnemonic}"
        if found is not None:
            raise TilusError(
                f"kernel {function.name} uses {found}, which needs a GPU: there is no code of it for CPUs",
                loc=stmt.loc if isinstance(stmt, (Role, Inst)) else None,
                hint='run it on device "reference" or "emulator", or write a kernel without it for CPUs',
            )


class _Lowering:
    def __init__(self, function: Function, target: CpuTarget, layouts: Mapping[RegisterTensor, SharedLayout]) -> None:
        self.function = function
        writer = Writer()
        names = {var: writer.name(var.name) for var in function.kernel_params()}
        pointers = {p.tensor.base: p.tensor for p in function.params if isinstance(p, TensorParam)}
        written = {
            t.base for s in instructions(function.body) for t in s.inst.effects().writes if isinstance(t, GlobalTensor)
        }
        memory = GlobalMemory({base: names[base] for base in pointers}, frozenset(pointers.keys() - written))
        uses = Counter(t for s in instructions(function.body) for t in s.inst.register_operands)
        self.ctx = CContext(target, function.num_threads, writer, names, memory, uses, layouts)
        self.pointers = pointers

    def run(self) -> None:
        self._arguments()
        self.statement(self.function.body)

    def text(self) -> str:
        ctx = self.ctx
        prelude = files("tilus.codegen.c").joinpath("prelude.h").read_text()
        head = (
            "static __attribute__((noinline)) void run_block(const uint64_t *args, const int32_t *grid, "
            "int64_t block_x, int64_t block_y, int64_t block_z) {"
        )
        hoisted = ["    " + line for line in ctx.hoisted]
        body = "\n".join([head, *hoisted, *ctx.writer.lines, "}"])
        if INTRINSIC.search(body) is None:
            prelude = "#define TL_NO_INTRINSICS\n" + prelude
        return "\n\n".join([prelude, "\n".join(ctx.tables.values()), body, f"{_SIGNATURE} {{{_BLOCK}}}\n"])

    def _arguments(self) -> None:
        writer = self.ctx.writer
        for slot, var in enumerate(self.function.kernel_params()):
            name = self.ctx.names[var]
            if var in self.pointers:
                kind = code_type(self.pointers[var].dtype)
                constant = "const " if var in self.ctx.memory.read_only else ""
                writer.line(f"{constant}{kind} *const {name} = ({kind} *)(uintptr_t)args[{slot}];")
            elif var.dtype.is_float:
                writer.line(f"double {name}_wide; memcpy(&{name}_wide, &args[{slot}], 8);")
                writer.line(f"const float {name} = (float){name}_wide;")
            else:
                writer.line(f"const int64_t {name} = (int64_t)args[{slot}];")

    # ---- statements

    def statement(self, stmt: Stmt) -> None:
        ctx = self.ctx
        match stmt:
            case Seq():
                for child in stmt.stmts:
                    self.statement(child)
            case Inst():
                self._instruction(stmt)
            case SetScalar(var, value):
                self._set_scalar(var, ctx.scalar(value), scalar_type(var))
            case For():
                self._for(stmt)
            case While(cond, body):
                self._settle(body)
                with ctx.writer.block("for (;;)"):
                    ctx.writer.line(f"if (!({ctx.scalar(cond)})) break;")
                    self._body(body)
            case If(cond, then, orelse):
                self._if(ctx.scalar(cond), then, orelse)
            case Break():
                ctx.writer.line("break;")
            case Continue():
                ctx.writer.line("continue;")
            case Role():
                raise TilusError(f"no C of the role of {stmt}", loc=stmt.loc)  # refused before
            case Return():
                ctx.writer.line("return;")

    def _instruction(self, stmt: Inst) -> None:
        self.ctx.writer.line(f"/* {stmt.inst.mnemonic}{f' line {stmt.loc.line}' if stmt.loc else ''} */")
        try:
            stmt.inst.emit_c(self.ctx)
        except TilusError as error:
            raise error.at(stmt.loc) from None

    def _set_scalar(self, var: Var, value: str, kind: str) -> None:
        name = self.ctx.names.get(var)
        if name is None:
            name = self.ctx.names[var] = self.ctx.writer.name(var.name)
            self.ctx.hoisted.append(f"{kind} {name} = 0;")
        self.ctx.writer.line(f"{name} = {value};")

    def _for(self, stmt: For) -> None:
        ctx = self.ctx
        stop = ctx.let("int64_t", "stop", ctx.scalar(stmt.stop))
        name = ctx.names[stmt.var] = ctx.writer.name(stmt.var.name)
        self._settle(stmt.body)
        with ctx.writer.block(
            f"for (int64_t {name} = {ctx.scalar(stmt.start)}; {name} < {stop}; {name} += {stmt.step})"
        ):
            self._body(stmt.body)

    def _body(self, body: Stmt) -> None:
        self.ctx.loop_depth += 1
        self.statement(body)
        self.ctx.loop_depth -= 1

    def _if(self, cond: str, then: Stmt, orelse: Stmt) -> None:
        self._settle(then)
        self._settle(orelse)
        with self.ctx.writer.block(f"if ({cond})"):
            self.statement(then)
        if not (isinstance(orelse, Seq) and not orelse.stmts):
            with self.ctx.writer.block("else"):
                self.statement(orelse)

    def _settle(self, body: Stmt) -> None:
        """Before a branch or loop: compute what is read inside of it, and give variables their storage outside of it."""
        ctx = self.ctx
        for inst in (s.inst for s in instructions(body)):
            for tensor in inst.register_operands:
                tile = ctx.tiles.get(tensor)
                if tile is not None and not tensor.mutable and not tile.is_plain:
                    ctx.tiles[tensor] = ctx.computed(tile, tensor.name)
            for tensor in inst.register_results:
                if tensor.mutable:
                    ctx.storage(tensor)
                    ctx.settle(tensor)
            for tensor in inst.effects().writes:
                ctx.settle(tensor)
