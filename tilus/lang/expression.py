"""Expressions of a kernel: from syntax to values."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tilus.errors import TilusError
from tilus.ir.expr import Expr
from tilus.ir.stmt import If
from tilus.lang.access import attribute, subscript
from tilus.lang.calls import call
from tilus.lang.frame import Binding, Frame
from tilus.lang.operators import apply_binary, apply_unary, chain, choice, may_trap, negated, python_value, truth
from tilus.lang.refusals import refuse
from tilus.lang.regions import bind, promoting, region
from tilus.lang.source import Source, parameter_names
from tilus.lang.storage import is_storable
from tilus.lang.values import LocalFunction, RuntimeRange, Value, describe, is_runtime, is_scalar, simplified

BINARY: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.MatMult: "@", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>",
}  # fmt: skip

_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.In: "in",
    ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not",
}  # fmt: skip

_UNARY: dict[type[ast.unaryop], str] = {ast.USub: "neg", ast.UAdd: "pos", ast.Invert: "invert"}


_CONVERSIONS: dict[int, Callable[[Any], Any]] = {-1: lambda v: v, 115: str, 114: repr, 97: ascii}


def evaluate(frame: Frame, node: ast.expr) -> Value:
    """The value of an expression; instructions that it needs are emitted.

    Raises: TilusError at the position of the innermost expression that is wrong.
    """
    with frame.at(node):
        return _evaluate(frame, node)


def _evaluate(frame: Frame, node: ast.expr) -> Value:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return frame.scope.lookup(node.id)
        case ast.Attribute():
            return attribute(frame, evaluate(frame, node.value), node.attr)
        case ast.Subscript():
            value, index = operands(frame, [node.value, node.slice])
            return subscript(frame, value, index)
        case ast.BinOp():
            lhs, rhs = operands(frame, [node.left, node.right])
            return apply_binary(frame.builder, BINARY[type(node.op)], lhs, rhs)
        case ast.UnaryOp(ast.Not(), operand):
            return negated(truth(evaluate(frame, operand), "the operand of `not`"))
        case ast.UnaryOp():
            return apply_unary(frame.builder, _UNARY[type(node.op)], evaluate(frame, node.operand))
        case ast.Compare():
            return _compare(frame, node)
        case ast.BoolOp():
            return _bool_op(frame, node.values, isinstance(node.op, ast.And))
        case ast.IfExp():
            return _conditional(frame, node)
        case ast.Call():
            return _call(frame, node)
        case _:
            return _display(frame, node)


def _display(frame: Frame, node: ast.expr) -> Value:
    match node:
        case ast.Tuple():
            return tuple(operands(frame, node.elts))
        case ast.List():
            return frame.translation.own(operands(frame, node.elts))
        case ast.Set():
            return set(_compile_time(operands(frame, node.elts), "a set"))
        case ast.Dict():
            return _dict(frame, node)
        case ast.Slice():
            parts = (None if part is None else evaluate(frame, part) for part in (node.lower, node.upper, node.step))
            return slice(*parts)
        case ast.JoinedStr() | ast.FormattedValue():
            return _formatted(frame, node)
        case ast.NamedExpr(ast.Name(name), value):
            bind(frame, name, evaluate(frame, value))
            return frame.scope.lookup(name)
        case ast.Lambda():
            return local_function(frame, node, "<lambda>")
        case ast.ListComp() | ast.GeneratorExp():
            items = list(_comprehension(frame, node.generators, lambda: evaluate(frame, node.elt)))
            return frame.translation.own(items) if isinstance(node, ast.ListComp) else tuple(items)
        case ast.SetComp():
            items = list(_comprehension(frame, node.generators, lambda: evaluate(frame, node.elt)))
            return set(_compile_time(items, "a set"))
        case ast.DictComp():
            pairs = _comprehension(frame, node.generators, lambda: tuple(operands(frame, [node.key, node.value])))
            return frame.translation.own(dict(pairs))
        case ast.Starred():
            raise TilusError("a starred expression is supported in calls and displays only")
        case _:
            raise refuse(node)


def _compile_time(values: list[Value], what: str) -> list[Value]:
    for value in values:
        if is_runtime(value):
            raise TilusError(
                f"{what} holds {describe(value)}, expected compile-time values", hint="use a tuple or list"
            )
    return values


def operands(frame: Frame, nodes: Sequence[ast.expr]) -> list[Value]:
    """The values of several expressions, left to right; none may change while the others are evaluated."""
    values: list[Value] = []
    before: list[tuple[ast.expr, dict[Any, int]]] = []
    for node in nodes:
        if isinstance(node, ast.Starred):
            items = iterate(frame, evaluate(frame, node.value), "the starred expression")
            values.extend(items)
            found = items
        else:
            found = evaluate(frame, node)
            values.append(found)
        if len(nodes) > 1:
            before.append((node, {slot: frame.storage.writes[slot] for slot in frame.storage.slots(found)}))
    for node, writes in before:
        if any(frame.storage.writes[slot] != count for slot, count in writes.items()):
            raise TilusError(
                "this value changes while the rest of the expression is evaluated",
                loc=frame.source.loc(node),
                hint="assign the value to a name before",
            )
    return values


def _dict(frame: Frame, node: ast.Dict) -> Value:
    keys = [key for key in node.keys if key is not None]
    if len(keys) != len(node.keys):
        raise TilusError("** in a dict is not supported in a kernel", hint="write the entries")
    values = operands(frame, [*keys, *node.values])
    return frame.translation.own(dict(zip(_compile_time(values[: len(keys)], "a dict key"), values[len(keys) :])))


def _formatted(frame: Frame, node: ast.expr) -> str:
    match node:
        case ast.JoinedStr():
            return "".join(_formatted(frame, part) for part in node.values)
        case ast.FormattedValue():
            value = evaluate(frame, node.value)
            if is_runtime(value):
                raise TilusError(
                    f"{describe(value)} in a string, expected a compile-time value", hint="use tilus.print"
                )
            convert = _CONVERSIONS[node.conversion]
            spec = _formatted(frame, node.format_spec) if node.format_spec is not None else ""
            return python_value(lambda: format(convert(value), spec))
        case _:
            return str(evaluate(frame, node))


def _compare(frame: Frame, node: ast.Compare) -> Value:
    """`a < b < c` is `a < b and b < c` with b evaluated once; the operands have no effects that could be skipped."""
    values = operands(frame, [node.left, *node.comparators])
    parts: list[Value] = []
    for op, lhs, rhs in zip(node.ops, values, values[1:]):
        parts.append(apply_binary(frame.builder, _COMPARE[type(op)], lhs, rhs))
        if parts[-1] is False:
            return False
    return chain(parts, frame.builder)


def _bool_op(frame: Frame, nodes: Sequence[ast.expr], conjunction: bool) -> Value:
    """`and` / `or` with Python's short circuit: what it would skip and has an effect or can trap is put into a branch."""
    value = evaluate(frame, nodes[0])
    if len(nodes) == 1:
        return value
    decided = truth(value, f"an operand of `{'and' if conjunction else 'or'}`")
    if isinstance(decided, bool):
        return _bool_op(frame, nodes[1:], conjunction) if decided == conjunction else value

    def rest() -> Value:
        return _bool_op(frame, nodes[1:], conjunction)

    def first() -> Value:
        return value

    return branch(frame, decided, rest, first) if conjunction else branch(frame, decided, first, rest)


def _conditional(frame: Frame, node: ast.IfExp) -> Value:
    cond = truth(evaluate(frame, node.test), "the condition")
    if isinstance(cond, bool):
        return evaluate(frame, node.body if cond else node.orelse)
    return branch(frame, cond, lambda: evaluate(frame, node.body), lambda: evaluate(frame, node.orelse))


def branch(frame: Frame, cond: Expr, on_true: Callable[[], Value], on_false: Callable[[], Value]) -> Value:
    """`on_true() if cond else on_false()`: a select when both are scalars that anyone may compute, else a branch."""
    return promoting(frame, lambda: _branch(frame, cond, on_true, on_false))


def _branch(frame: Frame, cond: Expr, on_true: Callable[[], Value], on_false: Callable[[], Value]) -> Value:
    with region(frame) as then:
        a = on_true()
    with region(frame) as orelse:
        b = on_false()
    if is_scalar(a) and is_scalar(b) and not (then.stmts or orelse.stmts or may_trap(a) or may_trap(b)):
        return simplified(choice(cond, a, b))
    if not is_storable(a) or not is_storable(b):
        raise TilusError(
            f"a run-time condition chooses between {describe(a)} and {describe(b)}, expected scalars or tiles",
            hint="use `if` with a compile-time condition",
        )
    slot = frame.storage.allocate(choice(cond, a, b) if is_scalar(a) and is_scalar(b) else a, "chosen")
    then.assign(frame, slot, a, "the conditional expression")
    orelse.assign(frame, slot, b, "the conditional expression")
    frame.storage.freeze(slot)
    frame.builder.append(If(cond, then.body(), orelse.body(), frame.builder.loc))
    return slot


def _call(frame: Frame, node: ast.Call) -> Value:
    plain = [keyword.value for keyword in node.keywords]
    values = operands(frame, [node.func, *(n for n in node.args), *plain])
    callee, kwargs = values[0], {}
    split = len(values) - len(plain)
    for keyword, value in zip(node.keywords, values[split:]):
        if keyword.arg is not None:
            kwargs[keyword.arg] = value
        elif isinstance(value, dict):
            kwargs.update(value)
        else:
            raise TilusError(f"** of {describe(value)}, expected a compile-time dict")
    return call(frame, callee, values[1:split], kwargs)


def iterate(frame: Frame, value: Value, what: str) -> list[Value]:
    """The items of a compile-time container.

    Raises: TilusError for run-time values, which cannot be unrolled.
    """
    if isinstance(value, RuntimeRange) or (is_runtime(value) and not isinstance(value, (tuple, list, dict, set))):
        raise TilusError(
            f"{what} is {describe(value)}, expected a compile-time tuple, list or range",
            hint="use a `for` statement over tilus.range for a run-time loop",
        )
    return python_value(lambda: list(frame.storage.snapshot(value)))


def _comprehension(
    frame: Frame, generators: Sequence[ast.comprehension], element: Callable[[], Value]
) -> Iterator[Value]:
    """The elements of a comprehension; its targets are names of its own."""
    if not generators:
        yield frame.storage.snapshot(element())
        return
    generator, saved = generators[0], dict(frame.scope.names)
    targets = [n.id for n in ast.walk(generator.target) if isinstance(n, ast.Name)]
    for item in iterate(frame, evaluate(frame, generator.iter), "the iterable of a comprehension"):
        unpack(frame, generator.target, item, functools.partial(_bind_hidden, frame))
        conditions = [truth(evaluate(frame, c), "the condition of a comprehension") for c in generator.ifs]
        if any(isinstance(c, Expr) for c in conditions):
            raise TilusError("a run-time condition in a comprehension", hint="use an `if` statement or tilus.where")
        if all(conditions):
            yield from _comprehension(frame, generators[1:], element)
    for name in targets:
        if name in saved:
            frame.scope.names[name] = saved[name]
        else:
            frame.scope.names.pop(name, None)


def _bind_hidden(frame: Frame, name: str, value: Value) -> None:
    frame.scope.names[name] = Binding(value, frame.translation.level)


def unpack(frame: Frame, target: ast.expr, value: Value, bind: Callable[[str, Value], None]) -> None:
    """Bind the names of a target made of names, tuples and lists."""
    match target:
        case ast.Name(name):
            bind(name, value)
        case ast.Tuple(elts) | ast.List(elts):
            if any(isinstance(elt, ast.Starred) for elt in elts):
                raise TilusError(
                    "a starred target is not supported in a kernel", hint="slice the tuple: first, rest = t[0], t[1:]"
                )
            items = iterate(frame, value, "the unpacked value")
            if len(items) != len(elts):
                raise TilusError(f"{len(items)} values are unpacked into {len(elts)} names")
            for elt, item in zip(elts, items):
                unpack(frame, elt, item, bind)
        case _:
            raise TilusError("expected names as the target of a loop or comprehension")


def local_function(frame: Frame, node: ast.FunctionDef | ast.Lambda, name: str) -> LocalFunction:
    """A function written inside a kernel. Its defaults are evaluated here, its names when it is called."""
    args = node.args
    if args.vararg or args.kwarg:
        raise TilusError(f"{name} takes any number of arguments, which is not supported in a kernel", hint="name them")
    positional = [*args.posonlyargs, *args.args]
    defaults: dict[str, Value] = {}
    for arg, default in zip(positional[len(positional) - len(args.defaults) :], args.defaults):
        defaults[arg.arg] = frame.storage.snapshot(evaluate(frame, default))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults):
        if default is not None:
            defaults[arg.arg] = frame.storage.snapshot(evaluate(frame, default))
    kinds = {arg.arg: inspect.Parameter.POSITIONAL_ONLY for arg in args.posonlyargs}
    kinds |= {arg.arg: inspect.Parameter.KEYWORD_ONLY for arg in args.kwonlyargs}
    parameters = [
        inspect.Parameter(
            n, kinds.get(n, inspect.Parameter.POSITIONAL_OR_KEYWORD), default=defaults.get(n, inspect.Parameter.empty)
        )
        for n in parameter_names(node)
    ]
    source = Source(frame.source.file, node, frame.source.lines)
    return LocalFunction(name, source, inspect.Signature(parameters), frame)
