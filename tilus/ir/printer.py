"""The text form of a function: complete, so that `ir.parser` reads it back to the same program.

Every name starts with % and stands for one object; the first statement that gives it a value declares its type. Tiles and shared
tensors show their layouts once they have them. Instructions print their fields; there is no code for particular classes here.
Source positions are not part of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import cast

from tilus.dtypes import DataType, boolean
from tilus.errors import TilusError
from tilus.ir.expr import (
    Binary,
    BlockId,
    CastExpr,
    Const,
    Expr,
    GridDim,
    Select,
    Unary,
    Var,
    const,
    walk,
)
from tilus.ir.function import Function, ScalarParam, TensorParam
from tilus.ir.instruction import Instruction, is_out
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.ir.visit import instructions
from tilus.layout import RegisterLayout, SharedLayout

Named = Var | RegisterTensor | SharedTensor | GlobalTensor

# How tightly each operator binds; all associate to the left, comparisons not at all.
_COMPARISON = 3
PRECEDENCE = {
    "or": 1, "and": 2,
    "<": _COMPARISON, "<=": _COMPARISON, ">": _COMPARISON, ">=": _COMPARISON, "==": _COMPARISON, "!=": _COMPARISON,
    "|": 4, "^": 5, "&": 6, "<<": 7, ">>": 7, "+": 8, "-": 8, "*": 9, "/": 9, "//": 9, "%": 9,
}  # fmt: skip


def print_function(function: Function, *, remarks: bool = False) -> str:
    """The text form of a function, ending with a newline. remarks: whether to add comments of instructions, for people to read.

    Raises: TilusError for a tensor whose pointer is no parameter.
    """
    return _Printer(function, remarks).text()


class _Printer:
    def __init__(self, function: Function, remarks: bool) -> None:
        self.function = function
        self.remarks = remarks
        self.names: dict[Named, str] = {}
        self.taken: set[str] = set()
        self.lines: list[str] = []

    def text(self) -> str:
        self.lines.append(self._header())
        self._shared_tensors()
        self._statement(self.function.body, 1)
        self.lines.append("}")
        return "\n".join(self.lines) + "\n"

    # Names and types.

    def name(self, thing: Named) -> str:
        """The one name of an object, after its own; later objects of that name get a number."""
        return self.names[thing] if thing in self.names else self._named(thing, thing.name)

    def _named(self, thing: Named, name: str) -> str:
        stem = "".join(c if c.isalnum() or c == "_" else "_" for c in name) or "_"
        stem = f"_{stem}" if stem[0].isdigit() else stem
        unique, count = stem, 0
        while unique in self.taken:
            count += 1
            unique = f"{stem}_{count}"
        self.taken.add(unique)
        self.names[thing] = f"%{unique}"
        return self.names[thing]

    def _declared(self, thing: Var | RegisterTensor) -> str:
        """A result: with its type where it appears first."""
        if thing in self.names:
            return self.names[thing]
        mutable = "mut " if thing.mutable else ""
        return f"{mutable}{self.name(thing)}: {_scalar_type(thing) if isinstance(thing, Var) else _tile_type(thing)}"

    # The header.

    def _header(self) -> str:
        function = self.function
        for param in function.params:
            self._named(param.tensor if isinstance(param, TensorParam) else param.var, param.name)
        dims = [f"{self.name(var)}: {_scalar_type(var)}" for var in self._dims()]
        params = "".join(f"\n  {self._param(param)}," for param in function.params).removesuffix(",")
        where = f" where {', '.join(dims)}" if dims else ""
        grid = ", ".join(map(self.expr, function.grid))
        blocks = "" if function.blocks_per_sm == 1 else f" blocks_per_sm({function.blocks_per_sm})"
        cluster = "" if function.cluster == 1 else f" cluster({function.cluster})"
        limits = f"{blocks}{cluster}{' ends_alone' if function.ends_alone else ''}"
        return f"kernel {function.name}({params}\n){where} grid({grid}) warps({function.num_warps}){limits} {{"

    def _dims(self) -> Iterator[Var]:
        """Variables of the parameters' shapes and strides that are no parameters themselves."""
        scalars = {param.var for param in self.function.params if isinstance(param, ScalarParam)}
        seen: dict[Var, None] = {}
        for param in self.function.params:
            if isinstance(param, TensorParam):
                for expr in (*param.tensor.shape, *param.tensor.strides, param.tensor.offset):
                    seen.update((e, None) for e in walk(expr) if isinstance(e, Var) and e not in scalars)
        yield from seen

    def _param(self, param: TensorParam | ScalarParam) -> str:
        if isinstance(param, ScalarParam):
            return f"{self.name(param.var)}: {_scalar_type(param.var)}"
        base = param.tensor.base.name
        suffix = "" if base == f"{self.name(param.tensor)[1:]}_ptr" else f" base {json.dumps(base)}"
        return f"{self.name(param.tensor)}: global {self._global_type(param.tensor)}{suffix}"

    def _global_type(self, tensor: GlobalTensor) -> str:
        offset = "" if tensor.offset == const(0) else f" offset {self.expr(tensor.offset)}"
        shape, strides = (", ".join(map(self.expr, exprs)) for exprs in (tensor.shape, tensor.strides))
        return f"{tensor.dtype}[{shape}] strides[{strides}]{offset} align {tensor.alignment}"

    def _shared_tensors(self) -> None:
        for stmt in instructions(self.function.body):
            for tensor in stmt.inst.operands:
                if isinstance(tensor, SharedTensor) and tensor not in self.names:
                    layout = "" if tensor.layout is None else f" in {tensor.layout}"
                    shape = ", ".join(map(str, tensor.shape))
                    self.lines.append(f"  shared {self.name(tensor)}: {tensor.dtype}[{shape}]{layout}")

    # Statements.

    def _statement(self, stmt: Stmt, depth: int) -> None:
        match stmt:
            case Seq(stmts):
                for child in stmts:
                    self._statement(child, depth)
            case Inst(inst):
                self._line(depth, self._instruction(inst))
            case SetScalar(var, value):
                text = self.expr(value)
                self._line(depth, f"{self._declared(var)} = {text}")
            case For():
                self._for(stmt, depth)
            case While(cond, body):
                self._block(depth, f"while {self.expr(cond)}", body)
            case If(cond, then, orelse):
                self._block(depth, f"if {self.expr(cond)}", then)
                if not _is_empty(orelse):
                    self.lines.pop()
                    self._block(depth, "} else", orelse)
            case Role(first, count, body, registers):
                limit = "" if registers is None else f" registers {registers}"
                self._block(depth, f"warps {first}, {count}{limit}", body)
            case Break() | Continue() | Return():
                self._line(depth, type(stmt).__name__.lower())

    def _line(self, depth: int, text: str) -> None:
        self.lines.append("  " * depth + text)

    def _block(self, depth: int, head: str, body: Stmt) -> None:
        self._line(depth, f"{head} {{")
        self._statement(body, depth + 1)
        self._line(depth, "}")

    def _for(self, loop: For, depth: int) -> None:
        bounds = f"{self.expr(loop.start)}, {self.expr(loop.stop)}, {loop.step}"
        unroll = f" unroll {loop.unroll}" if loop.unroll != 1 else ""
        self._block(depth, f"for {self._declared(loop.var)} in range({bounds}){unroll}", loop.body)

    def _instruction(self, inst: Instruction) -> str:
        fields = [f"{name}={self.value(value)}" for name, value in inst.fields() if not is_out(name) or value is None]
        targets = ", ".join(self._declared(result) for result in inst.results)
        remark = f"  # {inst.remark()}" if self.remarks and inst.remark() else ""
        return f"{targets}{' = ' if targets else ''}{inst.mnemonic}({', '.join(fields)}){remark}"

    # Values.

    def value(self, value: object) -> str:
        """A field of an instruction."""
        match value:
            case None:
                return "none"
            case bool():
                return "true" if value else "false"
            case Expr():
                return self.expr(value)
            case RegisterTensor() | SharedTensor():
                return self.name(value)
            case GlobalTensor():
                return self._view(value)
            case tuple():
                return f"[{', '.join(map(self.value, cast('tuple[object, ...]', value)))}]"
            case str() | RegisterLayout() | SharedLayout():
                return json.dumps(str(value))
            case DataType() | int() | float():
                return str(value)
            case _:
                raise TilusError(f"a field of type {type(value).__name__} has no text form")

    def _view(self, tensor: GlobalTensor) -> str:
        """A parameter by its name, or a view of one."""
        for param in self.function.params:
            if isinstance(param, TensorParam) and param.tensor.base is tensor.base:
                name = self.name(param.tensor)
                same = _contents(tensor) == _contents(param.tensor)
                return name if same else f"{name} as {self._global_type(tensor)}"
        raise TilusError(f"the pointer {tensor.base.name} of {tensor.name} is no parameter of {self.function.name}")

    def expr(self, expr: Expr, outer: int = 0) -> str:
        """A scalar expression with the parentheses that it needs inside of an operator that binds as tightly as `outer`."""
        match expr:
            case Const():
                return _constant(expr)
            case Var():
                return self.name(expr)
            case BlockId() | GridDim():
                return str(expr)
            case Unary(op, operand):
                return self._call(op, operand)
            case CastExpr(operand, dtype):
                return self._call(dtype.name, operand)
            case Select(cond, on_true, on_false):
                return self._call("select", cond, on_true, on_false)
            case Binary(op, lhs, rhs) if op not in PRECEDENCE:
                return self._call(op, lhs, rhs)
            case Binary(op, lhs, rhs):
                level = PRECEDENCE[op]
                left = self.expr(lhs, level + 1 if level == _COMPARISON else level)
                text = f"{left} {op} {self.expr(rhs, level + 1)}"
                return f"({text})" if level < outer else text
            case _:
                raise TilusError(f"an expression of type {type(expr).__name__} has no text form")

    def _call(self, name: str, *args: Expr) -> str:
        return f"{name}({', '.join(map(self.expr, args))})"


def _is_empty(stmt: Stmt) -> bool:
    return isinstance(stmt, Seq) and all(_is_empty(child) for child in stmt.stmts)


def _contents(tensor: GlobalTensor) -> Sequence[object]:
    return tensor.dtype, tensor.shape, tensor.strides, tensor.offset, tensor.alignment


def _scalar_type(var: Var) -> str:
    """The type of a variable and what is known of its values."""
    lower = f" >= {var.lower}" if var.lower is not None else ""
    upper = f" <= {var.upper}" if var.upper is not None else ""
    multiple = f" % {var.multiple_of}" if var.multiple_of != 1 else ""
    return f"{var.dtype}{lower}{upper}{multiple}"


def _tile_type(tile: RegisterTensor) -> str:
    layout = "" if tile.layout is None else f" in {tile.layout}"
    return f"{tile.dtype}[{', '.join(map(str, tile.shape))}]{layout}"


def _constant(expr: Const) -> str:
    """A literal; its type is spelled out unless the literal alone would have it."""
    if expr.type == boolean:
        return "true" if expr.value else "false"
    text = repr(float(expr.value)) if expr.type.is_float else str(int(expr.value))
    return text if const(expr.value).type == expr.type else f"{expr.type}({text})"
