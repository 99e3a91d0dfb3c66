"""Reads the text form of a function (see `ir.printer`); the grammar is grammar.lark."""

from __future__ import annotations

import ast
import difflib
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tilus.dtypes import DTYPES, DataType, int64
from tilus.errors import Loc, TilusError
from tilus.ir.expr import (
    BINARY_OPS,
    UNARY_OPS,
    BlockId,
    Const,
    Expr,
    GridDim,
    Var,
    as_expr,
    binary,
    cast,
    const,
    select,
    unary,
)
from tilus.ir.field_types import Unfit, converted, described, field_types, type_name
from tilus.ir.function import Function, Param, ScalarParam, TensorParam
from tilus.ir.instruction import Instruction, is_out
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.layout import LayoutError, parse_layout, parse_shared_layout

if TYPE_CHECKING:
    from lark import Lark

Named = Var | RegisterTensor | SharedTensor | GlobalTensor
Node = Any
"""A lark Tree or Token."""


def parse_function(
    text: str, instructions: Mapping[str, type[Instruction]], *, file: str = "<ir>", locations: bool = False
) -> Function:
    """The function of a text; `parse_function(print_function(f), INSTRUCTIONS)` is the same program as `f`.

    instructions: classes by mnemonic (`tilus.instructions.INSTRUCTIONS`). file: the name that errors show. locations: give
    the statements their places in the text, so that mistakes found later are shown there.

    Raises: TilusError with line and column for a text that is no function.
    """
    from lark.exceptions import UnexpectedInput

    try:
        tree = _lark().parse(text)
    except UnexpectedInput as error:
        raise _syntax_error(error, text, file) from None
    return _Reader(text, instructions, file, locations).function(tree)


@functools.cache
def _lark() -> Lark:
    from lark import Lark

    return Lark(
        Path(__file__).with_name("grammar.lark").read_text(),
        parser="lalr",
        propagate_positions=True,
        maybe_placeholders=True,
    )


def _syntax_error(error: Any, text: str, file: str) -> TilusError:
    line, column = max(error.line, 1), max(error.column, 1)
    if error.line < 1:  # at the end of the text
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    found = str(getattr(error, "token", None) or text[error.pos_in_stream : error.pos_in_stream + 1])
    expected = sorted(getattr(error, "accepts", None) or getattr(error, "allowed", None) or error.expected)
    names = ", ".join(_TERMINALS.get(name, str(name).lower()) for name in expected)
    what = f"found {found!r}" if found else "the text ends"
    return TilusError(f"line {line}, column {column}: {what}, expected {names}", loc=Loc(file, line, column))


_TERMINALS = {
    "NAME": "a name like %x", "WORD": "a word", "NUMBER": "a number", "STRING": "a string", "LPAR": "(", "RPAR": ")",
    "LBRACE": "{", "RBRACE": "}", "LSQB": "[", "RSQB": "]", "COMMA": ",", "COLON": ":", "EQUAL": "=", "MINUS": "-",
    "COMPARISON": "a comparison", "SIGN": "+ or -", "SCALE": "* or /", "REMAINDER": "%", "SHIFT": "<< or >>",
    "BIT_OR": "|", "BIT_XOR": "^", "BIT_AND": "&", "DOT": ".", "STAR": "*", "$END": "the end",
}  # fmt: skip


class _Reader:
    """Builds objects from the syntax tree. `names` holds everything that has been declared."""

    def __init__(self, text: str, instructions: Mapping[str, type[Instruction]], file: str, locations: bool) -> None:
        self.text = text
        self.instructions = instructions
        self.file = file
        self.locations = locations
        self.names: dict[str, Named] = {}
        self.views: dict[tuple[object, ...], GlobalTensor] = {}

    # Places in the text.

    def loc(self, node: Node) -> Loc:
        place = getattr(node, "meta", node)
        return Loc(self.file, getattr(place, "line", 1), getattr(place, "column", 1))

    def fail(self, node: Node, message: str, hint: str | None = None) -> NoReturn:
        loc = self.loc(node)
        raise TilusError(f"line {loc.line}, column {loc.column}: {message}", loc=loc, hint=hint)

    def source(self, node: Node) -> Loc | None:
        return self.loc(node) if self.locations else None

    # The header.

    def function(self, tree: Node) -> Function:
        name, params, where, grid, warps, blocks, cluster, alone, block = tree.children
        for dim in where.children if where is not None else ():
            self.declare(dim.children[0], self.scalar(*dim.children))
        listed = [param for param in params.children if param is not None]
        # Scalars first: shapes may use those that stand behind the tensor.
        scalars = {p.children[0]: self.scalar_param(p) for p in listed if p.data == "scalar_param"}
        read: list[Param] = [scalars.get(p.children[0]) or self.tensor_param(p) for p in listed]
        return Function(
            str(name),
            tuple(read),
            tuple(self.expr(extent) for extent in grid.children),
            self.integer(warps),
            self.block(block),
            self.source(name),
            1 if blocks is None else self.integer(blocks),
            1 if cluster is None else self.integer(cluster),
            alone is not None,
        )

    def scalar_param(self, tree: Node) -> ScalarParam:
        name, type_ = tree.children
        var = self.declare(name, self.scalar(name, type_))
        return ScalarParam(var.name, var)

    def tensor_param(self, tree: Node) -> TensorParam:
        token, type_, base = tree.children
        name = token[1:]
        pointer = f"{name}_ptr" if base is None else json.loads(base)
        alignment = self.integer(type_.children[-1])
        tensor = self.global_tensor(type_, Var(pointer, int64, multiple_of=alignment), name)
        return TensorParam(name, self.declare(token, tensor))

    # Declarations and types.

    def declare(self, token: Node, thing: Any) -> Any:
        if token in self.names:
            self.fail(
                token, f"{token} is declared a second time", "a variable that is assigned again is `mut` and typed once"
            )
        self.names[str(token)] = thing
        return thing

    def lookup(self, token: Node) -> Named:
        if token not in self.names:
            close = difflib.get_close_matches(token, self.names, n=3)
            self.fail(token, f"unknown name {token}", f"close: {', '.join(close)}" if close else None)
        return self.names[token]

    def dtype(self, token: Node) -> DataType:
        if token not in DTYPES:
            close = difflib.get_close_matches(token, DTYPES, n=3)
            self.fail(token, f"unknown data type {token}", f"close: {', '.join(close)}" if close else None)
        return DTYPES[token]

    def scalar(self, name: Node, type_: Node, mutable: bool = False) -> Var:
        dtype, *facts = type_.children
        known = {fact.data: self.integer(fact.children[0]) for fact in facts}
        return Var(
            name[1:], self.dtype(dtype), known.get("lower"), known.get("upper"), known.get("multiple_of", 1), mutable
        )

    def global_tensor(self, type_: Node, base: Var, name: str) -> GlobalTensor:
        dtype, shape, strides, offset, align = type_.children
        start = as_expr(0) if offset is None else self.expr(offset)
        exprs = [tuple(self.expr(e) for e in node.children if e is not None) for node in (shape, strides)]
        if len(exprs[0]) != len(exprs[1]):
            self.fail(strides, f"{len(exprs[1])} strides of a tensor of rank {len(exprs[0])}")
        return GlobalTensor(self.dtype(dtype), exprs[0], exprs[1], base, start, self.integer(align), name)

    def tile(self, name: Node, type_: Node, mutable: bool) -> RegisterTensor:
        dtype, shape, layout = type_.children
        placed = None if layout is None else self.layout(layout, parse_layout)
        return RegisterTensor(self.dtype(dtype), self.integers(shape), placed, name[1:], mutable)

    def layout(self, node: Node, parse: Callable[[str], Any]) -> Any:
        try:
            return parse(self.text[node.meta.start_pos : node.meta.end_pos])
        except LayoutError as error:
            self.fail(node, error.message, error.hint)

    def integer(self, node: Node) -> int:
        sign, digits = node.children
        if not digits.isdecimal():
            self.fail(digits, f"found {digits}, expected an integer")
        return -int(digits) if sign else int(digits)

    def integers(self, node: Node) -> tuple[int, ...]:
        return tuple(self.integer(child) for child in node.children if child is not None)

    # Statements.

    def block(self, tree: Node) -> Seq:
        return Seq(tuple(stmt for child in tree.children if (stmt := self.statement(child)) is not None))

    def statement(self, tree: Node) -> Stmt | None:
        loc = self.source(tree)
        match tree.data:
            case "shared":
                return self.shared(*tree.children)
            case "results":
                *targets, call = tree.children
                return Inst(self.call(call, targets), loc)
            case "effect":
                return Inst(self.call(tree.children[0], []), loc)
            case "assignment":
                return self.assignment(tree, loc)
            case "for_loop":
                return self.for_loop(tree, loc)
            case "while_loop":
                cond, body = tree.children
                return While(self.expr(cond), self.block(body), loc)
            case "branch":
                cond, then, orelse = tree.children
                test = self.expr(cond)
                return If(test, self.block(then), Seq(()) if orelse is None else self.block(orelse), loc)
            case "role":
                first, count, registers, body = tree.children
                limit = None if registers is None else self.integer(registers)
                return Role(self.integer(first), self.integer(count), self.block(body), limit, loc)
            case "break_loop":
                return Break(loc)
            case "continue_loop":
                return Continue(loc)
            case _:
                return Return(loc)

    def shared(self, name: Node, type_: Node) -> None:
        dtype, shape, layout = type_.children
        placed = None if layout is None else self.layout(layout, parse_shared_layout)
        self.declare(name, SharedTensor(self.dtype(dtype), self.integers(shape), placed, name[1:]))

    def target(self, tree: Node) -> Var | RegisterTensor:
        """What a statement gives a value to: declared here if it has a type."""
        mutable, name, type_ = tree.children
        if type_ is None:
            thing = self.lookup(name)
            if not isinstance(thing, (Var, RegisterTensor)) or not thing.mutable:
                self.fail(name, f"{name} is assigned a second time", "declare it as `mut`")
            return thing
        if type_.data == "tile_type":
            return self.declare(name, self.tile(name, type_, mutable is not None))
        return self.declare(name, self.scalar(name, type_, mutable is not None))

    def assignment(self, tree: Node, loc: Loc | None) -> SetScalar:
        target, value = tree.children
        expr = self.expr(value)
        var = self.target(target)
        if not isinstance(var, Var):
            self.fail(target, f"%{var.name} is a tile, expected a scalar on the left of an expression")
        return SetScalar(var, expr, loc)

    def for_loop(self, tree: Node, loc: Loc | None) -> For:
        name, type_, start, stop, step, unroll, body = tree.children
        bounds = self.expr(start), self.expr(stop)
        var = self.declare(name, self.scalar(name, type_))
        return For(
            var, *bounds, self.integer(step), self.block(body), 1 if unroll is None else self.integer(unroll), loc
        )

    # Instructions.

    def call(self, tree: Node, targets: list[Node]) -> Instruction:
        mnemonic, *fields = (child for child in tree.children if child is not None)
        if mnemonic not in self.instructions:
            close = difflib.get_close_matches(mnemonic, self.instructions, n=3)
            self.fail(mnemonic, f"unknown instruction {mnemonic}", f"close: {', '.join(close)}" if close else None)
        cls = self.instructions[mnemonic]
        hints = field_types(cls)
        given: dict[str, Any] = {}
        for field in fields:
            name, node = field.children
            if name not in hints or name in given:
                names = ", ".join(hints)
                self.fail(name, f"{mnemonic} has no field {name}, or has it already; expected {names}")
            given[str(name)] = self.field(node, hints[name], f"{name} of {mnemonic}")
        outs = [name for name in hints if is_out(name) and name not in given]
        if len(outs) != len(targets):
            self.fail(tree, f"{mnemonic} has {len(outs)} results, found {len(targets)} names in front of it")
        given |= {name: self.target(target) for name, target in zip(outs, targets, strict=True)}
        try:
            return cls(**given)
        except TypeError as error:
            self.fail(tree, f"{mnemonic}: {error}")

    def field(self, node: Node, hint: Any, what: str) -> Any:
        value = self.value(node)
        try:
            return converted(value, hint)
        except Unfit:
            self.fail(node, f"{what} is {described(value)}, expected {type_name(hint)}")

    def value(self, node: Node) -> Any:
        """An Expr, tensor, str, DataType, None, or a list of them."""
        match node.data:
            case "tuple":
                return [self.value(child) for child in node.children if child is not None]
            case "string":
                return json.loads(node.children[0])
            case "view":
                return self.view(*node.children)
            case "name":
                return self.lookup(node.children[0])
            case "word" if node.children[0] is None and node.children[1] == "none":
                return None
            case "word" if node.children[0] is None and node.children[1] in DTYPES:
                return DTYPES[node.children[1]]
            case _:
                return self.expr(node)

    def view(self, name: Node, type_: Node) -> GlobalTensor:
        """Equal views are one object, as they are where the program comes from."""
        whole = self.lookup(name)
        if not isinstance(whole, GlobalTensor):
            self.fail(name, f"{name} is no global tensor, which a view needs")
        view = self.global_tensor(type_, whole.base, f"{name[1:]}[...]")
        key = (view.dtype, view.shape, view.strides, view.base, view.offset, view.alignment)
        return self.views.setdefault(key, view)

    # Expressions.

    def expr(self, node: Node) -> Expr:
        match node.data:
            case "binary":
                lhs, op, rhs = node.children
                return self._checked(node, binary, str(op), self.expr(lhs), self.expr(rhs))
            case "name":
                thing = self.lookup(node.children[0])
                if not isinstance(thing, Var):
                    self.fail(node, f"{node.children[0]} is a tensor, expected a scalar")
                return thing
            case "number":
                sign, digits = node.children
                value = ast.literal_eval(str(digits).lstrip("0") or "0") if digits.isdecimal() else float(digits)
                return const(-value if sign else value)
            case "word":
                return self.word(node)
            case _:
                return self.function_call(node)

    def word(self, node: Node) -> Const:
        sign, word = node.children
        words = (
            {"inf": float("inf"), "nan": float("nan")} if sign else {"true": True, "false": False, "inf": float("inf")}
        )
        words |= {"nan": float("nan")}
        if word not in words:
            self.fail(word, f"found {word}, expected a value", "names start with %")
        return const(-words[word] if sign else words[word])

    def function_call(self, node: Node) -> Expr:
        token, *nodes = node.children
        name, args = str(token), [self.expr(arg) for arg in nodes]
        if name in DTYPES and len(args) == 1:
            return cast(args[0], DTYPES[name])
        if (
            name in ("block_id", "grid_dim")
            and len(args) == 1
            and isinstance(args[0], Const)
            and args[0].value in (0, 1, 2)
        ):
            return (BlockId if name == "block_id" else GridDim)(int(args[0].value))
        if name == "select" and len(args) == 3:
            return select(*args)
        if name in UNARY_OPS and len(args) == 1:
            return self._checked(node, unary, name, *args)
        if name in BINARY_OPS and name.isalpha() and len(args) == 2:
            return self._checked(node, binary, name, *args)
        known = sorted({"block_id", "grid_dim", "select", "min", "max", *UNARY_OPS})
        hint = f"functions: {', '.join(known)}, and data types"
        return self.fail(token, f"no function {name} of {len(args)} scalars", hint)

    def _checked(self, node: Node, build: Callable[..., Expr], *args: Any) -> Expr:
        try:
            return build(*args)
        except (ArithmeticError, ValueError) as error:
            self.fail(node, f"this constant has no value: {error}")
