"""From the arguments of a call to a specialisation and run-time values.

`checked` looks at everything and explains what is wrong. `make_launcher` generates, for each kernel and device, a Python
function that only builds a key (dtypes, shapes, strides, alignments, types of scalars, constants) and looks up what a
checked call with the same key prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.lang.annotations import ConstParameter, ScalarParameter, Signature, TensorParameter
from tilus.lang.arguments import Array, describe_argument
from tilus.lang.facts import MAX_EXTENT, Specification, TensorFacts, facts_of, typed, without_extents
from tilus.runtime import ahead

if TYPE_CHECKING:
    from tilus.lang.kernel import Kernel, Specialization

Run = Callable[[Sequence[int], Sequence[Any], Sequence[Any]], None]

MAX_PREPARED = 1024  # calls with distinct keys that are remembered per kernel and device; one is about 5 KB


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a kernel, checked; what the runtime prepares launches from.

    arrays: by tensor parameter, in order, None for an absent optional one. device: as asked for by name, None for the default.
    The prepared launch is called with the tensors' pointers, the scalars, and the tensor arguments themselves, each in the order
    of the parameters.
    """

    specialization: Specialization
    arrays: tuple[Array | None, ...]
    device: str | None


class Binder:
    """The arguments of one call while they are checked; collects what names are bound to."""

    def __init__(self, signature: Signature, values: Mapping[str, Any]) -> None:
        self.signature = signature
        self.values = values
        self.consts = {p.name: values[p.name] for p in signature.consts}
        self.bound: dict[str, tuple[Any, str]] = {name: (value, f"Const {name}") for name, value in self.consts.items()}

    def error(self, message: str, hint: str | None = None) -> TilusError:
        return TilusError(f"{self.signature.name}: {message}", loc=self.signature.loc, hint=hint)

    def array(self, parameter: TensorParameter) -> Array | None:
        """The description of a tensor argument, checked against its annotation."""
        name, value = parameter.name, self.values[parameter.name]
        if value is None and parameter.optional:
            return None
        try:
            array = describe_argument(value)
        except TilusError as error:
            raise self.error(f"parameter {name}: {error.message}", error.hint) from None
        if array is None:
            raise self.error(
                f"parameter {name}: found a {type(value).__name__}, expected an array for {parameter.type}"
            )
        self._dtype(parameter, array.dtype)
        if len(array.shape) != len(parameter.type.dims):
            raise self.error(
                f"parameter {name}: found rank {len(array.shape)} (shape {list(array.shape)}), "
                f"expected rank {len(parameter.type.dims)} for {parameter.type}"
            )
        for dim, extent, stride in zip(parameter.type.dims, array.shape, array.strides):
            self._extent(name, dim, extent)
            if not 0 <= stride <= MAX_EXTENT or extent > MAX_EXTENT:
                raise self.error(
                    f"parameter {name}: shape {list(array.shape)} and strides {list(array.strides)}, "
                    f"expected extents and strides from 0 to {MAX_EXTENT}",
                    "pass a contiguous copy, or a part of the tensor",
                )
        return array

    def _dtype(self, parameter: TensorParameter, found: DataType) -> None:
        expected = parameter.type.dtype
        if isinstance(expected, str):
            value, origin = self.bound.setdefault(expected, (found, f"parameter {parameter.name}"))
            if value != found:
                raise self.error(
                    f"parameter {parameter.name}: found dtype {found}, expected {value} ({expected!r} bound by {origin})"
                )
        elif found != expected:
            hint = f"wrap the bytes: tilus.packed(array, tilus.{expected}, shape)" if found.kind == "uint" else None
            raise self.error(f"parameter {parameter.name}: found dtype {found}, expected {expected}", hint)

    def _extent(self, name: str, dim: str | int, found: int) -> None:
        if isinstance(dim, int):
            if dim != found:
                raise self.error(f"parameter {name}: found extent {found}, expected {dim}")
            return
        value, origin = self.bound.setdefault(dim, (found, f"parameter {name}"))
        if value != found:
            raise self.error(f"parameter {name}: found {dim} = {found}, expected {value} ({dim!r} bound by {origin})")

    def scalar(self, parameter: ScalarParameter) -> Any:
        """A scalar argument, checked against its dtype."""
        name, value, dtype = parameter.name, self.values[parameter.name], parameter.dtype
        number = value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
        wanted = (int, float) if dtype.is_float else (bool,) if dtype.kind == "bool" else (int,)
        if not isinstance(number, wanted) or (isinstance(number, bool) and dtype.kind != "bool"):
            raise self.error(
                f"parameter {name}: found {value!r} ({type(value).__name__}), expected a number for {dtype}"
            )
        if dtype.is_integer and not dtype.min_value <= number <= dtype.max_value:
            raise self.error(
                f"parameter {name}: found {number}, expected {dtype.min_value} to {dtype.max_value} for {dtype}"
            )
        return number

    def const(self, parameter: ConstParameter) -> Any:
        """A compile-time argument, which must be hashable and no array."""
        value = self.values[parameter.name]
        if describe_kind(value) is not None:
            raise self.error(
                f"parameter {parameter.name}: found {describe_kind(value)}, expected a compile-time value",
                'annotate it with Tensor[dtype, "n", ...] to pass an array',
            )
        try:
            hash(value)
        except TypeError:
            raise self.error(
                f"parameter {parameter.name}: found an unhashable {type(value).__name__}, expected a hashable compile-time value",
                "pass a tuple instead of a list" if isinstance(value, list) else None,
            ) from None
        return value

    def device(self, arrays: Sequence[Array | None]) -> None:
        """All arrays must be in one memory."""
        found = [(p.name, a.device) for p, a in zip(self.signature.tensors, arrays) if a is not None]
        for name, device in found[1:]:
            if device != found[0][1]:
                raise self.error(
                    f"parameter {name}: found on {_device_name(device)}, expected {_device_name(found[0][1])} "
                    f"like parameter {found[0][0]}",
                    "move all arguments to one device",
                )


def describe_kind(value: Any) -> str | None:
    """What to call a value that is an array."""
    is_array = (
        hasattr(value, "__array_interface__")
        or hasattr(value, "__cuda_array_interface__")
        or hasattr(value, "__dlpack__")
        or hasattr(value, "data_ptr")
    )
    return f"a {type(value).__name__}" if is_array else None


def _device_name(device: int) -> str:
    return "the CPU" if device < 0 else f"cuda:{device}"


def specification(binder: Binder, arrays: Sequence[Array | None], device: str | None) -> Specification:
    """The specialisation key of checked arguments."""
    from tilus.runtime.execute import place

    on_gpu = any(a is not None and a.device >= 0 for a in arrays)
    vectors = place(device, on_gpu) != "cpu"
    signature = binder.signature
    tensors: list[TensorFacts | None] = []
    for parameter, array in zip(signature.tensors, arrays, strict=True):
        facts = None
        if array is not None:
            facts = facts_of(array.dtype, array.shape, array.strides, array.pointer, vectors=vectors)
            facts = without_extents(facts, parameter.type.dims, signature.varying)
        tensors.append(facts)
    return Specification(tuple(tensors), tuple(typed(binder.const(p)) for p in signature.consts))


def bound(kernel: Kernel, values: Mapping[str, Any]) -> tuple[Binder, tuple[Array | None, ...]]:
    """Compile-time arguments and arrays, checked. Raises: TilusError, as `checked` does."""
    signature = kernel.signature
    binder = Binder(signature, values)
    for parameter in signature.consts:
        binder.const(parameter)
    arrays = tuple(binder.array(p) for p in signature.tensors)
    binder.device(arrays)
    return binder, arrays


def checked(kernel: Kernel, values: Mapping[str, Any], device: str | None) -> tuple[Call, tuple[Any, ...]]:
    """The call that these arguments (by parameter) make, and its scalars.

    Raises: TilusError naming the parameter, what was found and what was expected.
    """
    binder, arrays = bound(kernel, values)
    scalars = tuple(binder.scalar(p) for p in kernel.signature.scalars)
    specialization = kernel.specialization(specification(binder, arrays, device), binder.consts)
    return Call(specialization, arrays, device), scalars


def make_launcher(kernel: Kernel, device: str | None) -> Callable[..., None]:
    """A function with the kernel's parameters that launches it on a device.

    The generated text reads an argument's facts with a handful of attribute reads and makes one dict look-up; whatever is not
    a torch-like tensor, or was not seen before, takes the checked way.
    """
    signature = kernel.signature
    prepared: dict[Any, Run] = {}

    def slow(key: Any, values: dict[str, Any]) -> None:
        call, scalars = checked(kernel, values, device)
        key = key or (call.arrays, call.specialization.specification, tuple(type(s) for s in scalars))
        run = prepared.get(key)
        if run is None:
            from tilus.runtime.execute import prepare

            if len(prepared) >= MAX_PREPARED:
                prepared.clear()
            run = prepared[key] = prepare(call)
        pointers = [0 if a is None else a.pointer for a in call.arrays]
        run(pointers, scalars, [values[p.name] for p in signature.tensors])

    namespace: dict[str, Any] = {"prepared": prepared, "slow": slow, "typed": typed}
    parameters: list[str] = []
    for parameter in signature.python.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        namespace[f"default_{parameter.name}"] = parameter.default
        has_default = parameter.default is not parameter.empty
        parameters.append(f"{parameter.name}=default_{parameter.name}" if has_default else parameter.name)
    exec(_launcher_source(signature, parameters), namespace)
    namespace["launch"].__qualname__ = signature.name  # what Python's errors of missing arguments call it
    ahead.register(namespace["launch"], prepared)
    return namespace["launch"]


def _launcher_source(signature: Signature, parameters: Sequence[str]) -> str:
    pointers: list[str] = []
    key: list[str] = []
    for p in signature.parameters:
        n = p.name
        match p:
            case TensorParameter(optional=False):
                pointers.append(f"p_{n} = {n}.data_ptr()")
                key += [f"{n}.dtype", f"{n}.shape", f"{n}.stride()", f"{n}.get_device()", f"p_{n} & 15"]
            case TensorParameter():
                pointers.append(f"p_{n} = 0 if {n} is None else {n}.data_ptr()")
                key.append(
                    f"None if {n} is None else ({n}.dtype, {n}.shape, {n}.stride(), {n}.get_device(), p_{n} & 15)"
                )
            case ScalarParameter(dtype=dtype):
                key.append(f"type({n})")
                if dtype.is_integer:
                    key.append(f"{dtype.min_value} <= {n} <= {dtype.max_value}")
            case ConstParameter():
                key += [f"type({n})", f"typed({n}) if type({n}) is tuple else {n}"]
    names = [p.name for p in signature.parameters]
    tensors, scalars = [p.name for p in signature.tensors], [p.name for p in signature.scalars]
    values = "{" + ", ".join(f"{n!r}: {n}" for n in names) + "}"
    lines = [
        f"def launch({', '.join(parameters)}):",
        "    key = None",
        "    try:",
        *(f"        {line}" for line in pointers),
        f"        key = ({', '.join(key)},)",
        "        run = prepared[key]",
        "    except (AttributeError, KeyError, TypeError):",
        f"        return slow(key, {values})",
        f"    run(({_tuple(f'p_{n}' for n in tensors)}), ({_tuple(scalars)}), ({_tuple(tensors)}))",
    ]
    return "\n".join(lines)


def _tuple(names: Any) -> str:
    return "".join(f"{name}, " for name in names)
