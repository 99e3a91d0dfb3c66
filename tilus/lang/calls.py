"""Calls: functions of the language build IR, helpers are inlined, compile-time functions are run by Python."""

from __future__ import annotations

import builtins as python
import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from tilus.errors import TilusError
from tilus.ir.builder import Builtin
from tilus.ir.expr import Expr
from tilus.lang.builtin_arguments import TENSORS, check_kinds, usage
from tilus.lang.frame import Frame
from tilus.lang.operators import python_value
from tilus.lang.python_builtins import MUTATORS, RUNTIME, STRUCTURAL
from tilus.lang.values import BoundBuiltin, LocalFunction, Value, describe, is_runtime

Arguments = tuple[Sequence[Value], Mapping[str, Value]]


def call(frame: Frame, callee: Value, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
    """`callee(*args, **kwargs)`.

    Raises: TilusError when the callee or its arguments are not what a kernel can call.
    """
    match callee:
        case Builtin():
            return _build(frame, callee, args, kwargs)
        case BoundBuiltin():
            return _build(frame, callee.builtin, (callee.receiver, *args), kwargs)
        case LocalFunction():
            return frame.inline(callee, args, kwargs)
        case MethodType():
            return call(frame, callee.__func__, (callee.__self__, *args), kwargs)
        case functools.partial():
            return call(frame, callee.func, (*callee.args, *args), {**callee.keywords, **kwargs})
        case FunctionType():
            return _function(frame, callee, args, kwargs)
        case BuiltinMethodType() if isinstance(getattr(callee, "__self__", None), (list, dict, set)):
            return _container_method(frame, callee, args, kwargs)
        case _ if _is_hashable(callee) and callee in STRUCTURAL:
            return _structural(frame, callee, args, kwargs)
        case type() if callee not in RUNTIME:
            return _instance(frame, callee, args, kwargs)
        case _:
            return _other(frame, callee, args, kwargs)


def _is_hashable(value: Value) -> bool:
    return getattr(type(value), "__hash__", None) is not None


def _build(frame: Frame, builtin: Builtin, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
    name = getattr(builtin, "__name__", "?")
    signature = _signature(builtin)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TilusError(f"tilus.{name}: {error}", hint=usage(name, signature)) from None
    check_kinds(name, bound)
    try:
        return builtin.build(frame.builder, *args, **kwargs)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, ZeroDivisionError) as error:
        check_kinds(name, bound, TENSORS)
        message = f"tilus.{name} does not take these arguments: {error}"
        raise TilusError(message, hint=usage(name, signature)) from error


@functools.cache
def _signature(builtin: Builtin) -> inspect.Signature:
    return inspect.signature(builtin)


def _all_known(frame: Frame, args: Sequence[Value], kwargs: Mapping[str, Value]) -> bool:
    values = (*args, *kwargs.values())
    return not any(is_runtime(v) or frame.translation.owner_level(v) is not None for v in values)


def _function(frame: Frame, function: FunctionType, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
    if _all_known(frame, args, kwargs) and not uses_language(frame, function):
        return python_value(lambda: function(*args, **kwargs))
    return frame.inline(function, args, kwargs)


def _structural(
    frame: Frame, function: Callable[..., Any], args: Sequence[Value], kwargs: Mapping[str, Value]
) -> Value:
    if function is len and args and is_runtime(args[0]) and not isinstance(args[0], (tuple, list, dict, set)):
        raise TilusError(f"len of {describe(args[0])}", hint="use x.shape[0]")
    result = python_value(lambda: function(*args, **kwargs))
    if isinstance(result, (zip, enumerate, reversed)):
        return tuple(result)
    return frame.translation.own(result) if isinstance(result, (list, dict)) else result


def _container_method(
    frame: Frame, method: BuiltinMethodType, args: Sequence[Value], kwargs: Mapping[str, Value]
) -> Value:
    container, name = method.__self__, method.__name__
    if name in MUTATORS:
        check_mutable(frame, container, f".{name}()")
        args = [frame.storage.snapshot(arg) for arg in args]
    result = python_value(lambda: method(*args, **kwargs))
    return result if isinstance(result, (int, float, str)) or not hasattr(result, "__iter__") else _owned(frame, result)


def _owned(frame: Frame, value: Value) -> Value:
    if isinstance(value, (tuple, list, dict, set)):
        return frame.translation.own(value) if isinstance(value, (list, dict)) else value
    return tuple(value)


def check_mutable(frame: Frame, container: Value, what: str) -> None:
    """Raise unless the kernel made this list, dict or object, at the present level of loops and branches."""
    level = frame.translation.owner_level(container)
    if level is None:
        raise TilusError(
            f"{what} changes {describe(container)}, which was made outside of the kernel",
            hint="make it in the kernel: a kernel must not change the program that compiles it",
        )
    if level < frame.translation.level:
        raise TilusError(
            f"{what} in a run-time loop or branch changes a {type(container).__name__} made before it",
            hint="unroll the loop with tilus.static_range, or keep the values in variables",
        )


def _instance(frame: Frame, cls: type, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
    """An instance of a class: its __init__ is inlined when it may see run-time values."""
    if _all_known(frame, args, kwargs) and not uses_language(frame, cls):
        result = python_value(lambda: cls(*args, **kwargs))
        return result if isinstance(result, (int, float, str, tuple)) else frame.translation.own(result)
    if cls.__module__ == "builtins" or issubclass(cls, BaseException):
        raise TilusError(f"{cls.__name__}() of run-time values is not supported in a kernel")
    constructor = inspect.getattr_static(cls, "__init__")
    if not isinstance(constructor, FunctionType) or constructor.__code__.co_filename == "<string>":
        kept = [frame.storage.snapshot(arg) for arg in args]
        named = {key: frame.storage.snapshot(value) for key, value in kwargs.items()}
        return frame.translation.own(python_value(lambda: cls(*kept, **named)))
    instance = frame.translation.own(object.__new__(cls))
    frame.inline(constructor, (instance, *args), kwargs)
    return instance


def _other(frame: Frame, callee: Value, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
    if not callable(callee):
        raise TilusError(f"{describe(callee)} is called, but is not a function")
    method = inspect.getattr_static(type(callee), "__call__", None)
    if isinstance(method, FunctionType) and frame.translation.owner_level(callee) is not None:
        return frame.inline(method, (callee, *args), kwargs)
    if not any(is_runtime(v) for v in (*args, *kwargs.values())):
        return python_value(lambda: callee(*args, **kwargs))
    if callee in RUNTIME and not kwargs:
        return RUNTIME[callee](frame.builder, args)
    name = getattr(callee, "__name__", describe(callee))
    runtime = next(describe(v) for v in (*args, *kwargs.values()) if is_runtime(v))
    raise TilusError(
        f"{name} is called with {runtime}; Python functions without source work on compile-time values only",
        hint=_instead(name, callee),
    )


def _instead(name: str, callee: Value) -> str:
    """A hint for a call of a Python function without source."""
    import tilus

    if callee is print or isinstance(getattr(tilus, name, None), Builtin):
        return f"use tilus.{name}"
    return "only functions of tilus, and functions in Python made of those, work on run-time values"


def uses_language(frame: Frame, function: FunctionType | type) -> bool:
    """Whether a helper, or a function that it calls, belongs to the language, so that it must be inlined."""
    known = frame.translation.uses_language
    if function not in known:
        known[function] = _uses_language(function, set())
    return known[function]


def _uses_language(function: FunctionType | type, seen: set[object]) -> bool:
    if function in seen:
        return False
    seen.add(function)
    if getattr(function, "__tilus_inline__", False):
        return True
    if isinstance(function, type):
        if function.__module__ == "builtins":
            return False
        return any(isinstance(f, FunctionType) and _uses_language(f, seen) for f in vars(function).values())
    for value in _mentioned(function, function.__code__):
        if isinstance(value, (Builtin, Expr)):
            return True
        if isinstance(value, (FunctionType, type)) and _uses_language(value, seen):
            return True
    return False


def _mentioned(function: FunctionType, code: CodeType) -> Iterator[Any]:
    """The values of the global and closure names, and of the module attributes, that code refers to."""
    closure = free_names(function)
    value: Any = None
    for is_attribute, name in _references(code):
        if not is_attribute:
            value = closure.get(name)
        else:
            value = getattr(value, name, None) if isinstance(value, ModuleType) else None
        if value is not None:
            yield value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _mentioned(function, constant)


@functools.lru_cache(maxsize=4096)
def _references(code: CodeType) -> tuple[tuple[bool, str], ...]:
    """(is an attribute, name) of what code refers to: global and closure names, and attributes straight behind one of them."""
    found: list[tuple[bool, str]] = []
    follows = False
    for instruction in dis.get_instructions(code):
        is_name = instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_FROM_DICT_OR_DEREF")
        is_attribute = follows and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        follows = is_name or is_attribute
        if follows:
            found.append((is_attribute, str(instruction.argval)))
    return tuple(found)


def free_names(function: FunctionType) -> dict[str, Value]:
    """What names mean in a function that are not its own: closure, globals, builtins."""
    closure: dict[str, Value] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            closure[name] = cell.cell_contents
        except ValueError:  # a name of the enclosing function that has no value yet
            continue
    return {**vars(python), **function.__globals__, **closure}
