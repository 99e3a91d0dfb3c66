"""Assignments: to names, attributes of the kernel's own objects, items of its own containers, and tuples of these."""

from __future__ import annotations

import ast
import copy
from typing import Any

from tilus.errors import TilusError
from tilus.ir.tensor import GlobalTensor, SharedTensor, SharedView
from tilus.lang.calls import check_mutable
from tilus.lang.expression import BINARY, evaluate, iterate, operands, unpack
from tilus.lang.frame import Frame
from tilus.lang.operators import apply_binary, python_value
from tilus.lang.regions import bind, bind_attribute
from tilus.lang.values import Value, describe, is_runtime


def assignment(frame: Frame, node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
    match node:
        case ast.Assign():
            value = evaluate(frame, node.value)
            if len(node.targets) > 1 or isinstance(node.targets[0], (ast.Tuple, ast.List)):
                value = frame.storage.snapshot(value)
            for target in node.targets:
                assign(frame, target, value)
        case ast.AnnAssign():
            if node.value is not None:
                assign(frame, node.target, evaluate(frame, node.value))
        case ast.AugAssign():
            _augmented(frame, node)


def assign(frame: Frame, target: ast.expr, value: Value) -> None:
    with frame.at(target):
        match target:
            case ast.Name(name):
                bind(frame, name, value)
            case ast.Attribute(owner, name):
                bind_attribute(frame, evaluate(frame, owner), name, value)
            case ast.Subscript():
                _assign_item(frame, target, value)
            case ast.Tuple(elts) | ast.List(elts) if not any(isinstance(e, ast.Starred) for e in elts):
                items = iterate(frame, value, "the unpacked value")
                if len(items) != len(elts):
                    raise TilusError(f"{len(items)} values are unpacked into {len(elts)} names")
                for elt, item in zip(elts, items):
                    assign(frame, elt, item)
            case _:
                unpack(frame, target, value, lambda name, v: bind(frame, name, v))


def _assign_item(frame: Frame, target: ast.Subscript, value: Value) -> None:
    container, index = operands(frame, [target.value, target.slice])
    match container:
        case GlobalTensor():
            raise TilusError(
                f"{describe(container)} is assigned by [], expected a store", hint="tilus.store(x, [i], tile)"
            )
        case SharedTensor() | SharedView():
            raise TilusError(
                f"{describe(container)} is assigned by [], expected a store", hint="tilus.store_shared(s, tile)"
            )
        case list() | dict() if not is_runtime(index):
            check_mutable(frame, container, "[...] =")
            kept = frame.storage.snapshot(value)
            python_value(lambda: container.__setitem__(index, kept))
        case _:
            raise TilusError(f"items of {describe(container)} cannot be assigned")


def _augmented(frame: Frame, node: ast.AugAssign) -> None:
    """`x += y` is `x = x + y`: tiles and scalars are values."""
    op, target = BINARY[type(node.op)], node.target
    match target:
        case ast.Name():
            old: Value = frame.scope.lookup(target.id)
        case ast.Attribute():
            old = evaluate(frame, _loaded(target))
        case ast.Subscript():
            old = evaluate(frame, _loaded(target))
    if isinstance(old, (list, dict, set)):
        raise TilusError(f"{op}= on {describe(old)} is not supported in a kernel", hint="use .append() or .extend()")
    reads = {slot: frame.storage.writes[slot] for slot in frame.storage.slots(old)}
    rhs = evaluate(frame, node.value)
    if any(frame.storage.writes[slot] != count for slot, count in reads.items()):
        raise TilusError(
            "the target changes while the right side is evaluated", hint="assign the right side to a name before"
        )
    assign(frame, target, apply_binary(frame.builder, op, old, rhs))


def _loaded(target: ast.expr) -> ast.expr:
    """The target of an augmented assignment as an expression that reads it."""
    node: Any = copy.copy(target)
    node.ctx = ast.Load()
    return node
