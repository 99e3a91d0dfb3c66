"""From a kernel's Python source and a specification to `ir.Function`."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

from tilus.errors import TilusError
from tilus.ir.expr import Var
from tilus.ir.function import Function, Param, ScalarParam, TensorParam
from tilus.lang.annotations import ConstParameter, ScalarParameter, Signature, TensorParameter
from tilus.lang.calls import free_names
from tilus.lang.facts import Sizes, TensorFacts
from tilus.lang.frame import Binding, KernelBuilder, Scope, Translation
from tilus.lang.source import assigned_names, source_of
from tilus.lang.statements import Body
from tilus.lang.storage import Storage
from tilus.lang.values import Value


def translate(
    function: FunctionType,
    signature: Signature,
    facts: Mapping[str, TensorFacts | None],
    consts: Mapping[str, Any],
) -> Function:
    """The IR of a kernel for arguments with these facts (by tensor parameter) and these compile-time values.

    Raises: TilusError at the user's line for everything that a kernel cannot do.
    """
    builder = KernelBuilder()
    translation = Translation(builder, Storage(builder))
    source = source_of(function)
    params, values = _parameters(builder, signature, facts, consts)
    nodes = source.node.body if isinstance(source.node.body, list) else []
    scope = Scope(assigned_names(nodes) | frozenset(values), free_names(function))
    scope.names = {name: Binding(value, 0) for name, value in values.items()}
    translation.calls.append((function.__code__, None))
    Body(translation, source, scope, is_kernel=True).run()
    if builder.grid is None or builder.num_warps is None:
        raise TilusError(
            f"kernel {function.__name__} has no launch grid, expected tilus.grid(...) as its first statement",
            loc=signature.loc,
            hint="for example tilus.grid(tilus.cdiv(x.shape[0], block), warps=4)",
        )
    return Function(
        function.__name__, params, builder.grid, builder.num_warps, builder.body(), signature.loc, builder.blocks_per_sm,
        builder.cluster, builder.ends_alone,
    )  # fmt: skip


def _parameters(
    builder: KernelBuilder, signature: Signature, facts: Mapping[str, TensorFacts | None], consts: Mapping[str, Any]
) -> tuple[tuple[Param, ...], dict[str, Value]]:
    """The IR's parameters, and what each of the user's parameters stands for in the body."""
    known_facts = ((p, known) for p in signature.tensors if (known := facts[p.name]) is not None)
    sizes, params = Sizes(known_facts), list[Param]()
    values: dict[str, Value] = {}
    for parameter in signature.parameters:
        name = parameter.name
        builder.fresh(name)
        match parameter:
            case TensorParameter():
                known = facts[name]
                values[name] = None
                if known is not None:
                    tensor = sizes.tensor(parameter, known, consts)
                    params.append(TensorParam(name, tensor))
                    values[name] = tensor
            case ScalarParameter():
                var = Var(name, parameter.dtype)
                params.append(ScalarParam(name, var))
                values[name] = var
            case ConstParameter():
                values[name] = consts[name]
    return tuple(params), values
