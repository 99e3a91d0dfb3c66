"""Kernels: decorated functions that are specialised for their arguments, compiled and launched."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, overload

from tilus import config
from tilus.errors import TilusError
from tilus.ir.function import Function
from tilus.lang.annotations import Signature, signature_of
from tilus.lang.binding import Binder, bound, checked, make_launcher, specification
from tilus.lang.facts import Specification, assumed_facts, typed
from tilus.target import DEFAULT_TARGET, Target, get_target

if TYPE_CHECKING:
    from tilus.compiler import Compiled


@dataclass(frozen=True, eq=False)
class Specialization:
    """A kernel for one set of facts and compile-time values."""

    kernel: Kernel
    specification: Specification
    consts: Mapping[str, Any]

    @functools.cached_property
    def function(self) -> Function:
        """The IR, with all instructions still without layouts."""
        from tilus.lang.frontend import translate

        signature = self.kernel.signature
        facts = {p.name: f for p, f in zip(signature.tensors, self.specification.tensors, strict=True)}
        try:
            return translate(self.kernel.python, signature, facts, self.consts)
        except TilusError as error:  # the frames of the front end say nothing to the user
            raise error.with_traceback(None) from error.__cause__


class Kernel:
    """A GPU kernel. Calling it launches it; `ir`, `ptx` and `report` show what it is compiled to.

    Without arrays these show the kernel for aligned contiguous tensors whose sizes are multiples of 16; dtype names,
    Const parameters and dims of a known size are given by keyword. With arguments as for a call they show what that call
    would run.
    """

    def __init__(self, function: FunctionType, names: Mapping[str, object], varying: Sequence[str] = ()) -> None:
        functools.update_wrapper(self, function)
        self.python = function
        self.signature: Signature = signature_of(function, names, varying)
        self._specializations: dict[Specification, Specialization] = {}
        self._launchers: dict[str | None, Callable[..., None]] = {}
        self._launch = self.on(None)

    def __repr__(self) -> str:
        return f"<tilus.kernel {self.python.__qualname__}{self.signature.python}>"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Launch on the device that TILUS_DEVICE (read at the first launch) and the arguments choose.

        Raises: TilusError for arguments that do not fit the parameters.
        """
        try:
            self._launch(*args, **kwargs)
        except TypeError:
            self._match(args, kwargs)
            raise

    def on(self, device: str | None) -> Callable[..., None]:
        """The kernel's launches on a device: reference, emulator, cpu or cuda; None for the default."""
        if device is not None and device not in config.DEVICES:
            raise TilusError(f"unknown device {device!r}", hint=f"expected one of {', '.join(config.DEVICES)}")
        if device not in self._launchers:
            self._launchers[device] = make_launcher(self, device)
        return self._launchers[device]

    def specialization(self, specification: Specification, consts: Mapping[str, Any]) -> Specialization:
        """The specialisation for these facts, made once."""
        found = self._specializations.get(specification)
        if found is None:
            found = self._specializations[specification] = Specialization(self, specification, dict(consts))
        return found

    def specialize(self, *args: Any, **kwargs: Any) -> Specialization:
        """The specialisation that a call with these arguments runs on a GPU; without arrays, the usual one (see the class)."""
        given = {p.name for p in (*self.signature.tensors, *self.signature.scalars)}
        if args or given & kwargs.keys():
            return checked(self, self._match(args, kwargs), "cuda")[0].specialization
        dtypes = {p.type.dtype for p in self.signature.tensors if isinstance(p.type.dtype, str)}
        consts = {p.name: kwargs.pop(p.name, p.default) for p in self.signature.consts}
        names = {name: kwargs.pop(name) for name in dtypes & kwargs.keys()}
        dims = {d for p in self.signature.tensors for d in p.type.dims if isinstance(d, str)} - consts.keys()
        sizes = {name: kwargs.pop(name) for name in dims & kwargs.keys()}
        missing = [name for name, value in consts.items() if value is inspect.Parameter.empty]
        if missing or kwargs:
            what = (
                f"missing compile-time argument {missing[0]}" if missing else f"unknown argument {next(iter(kwargs))}"
            )
            raise TilusError(f"{self.signature.name}: {what}", loc=self.signature.loc, hint=self._usage())
        binder = Binder(self.signature, consts)
        key = tuple(typed(binder.const(p)) for p in self.signature.consts)
        return self.specialization(
            Specification(assumed_facts(self.signature, {**names, **consts}, sizes), key), consts
        )

    def specification(self, *args: Any, **kwargs: Any) -> Specification:
        """What a call with these arguments is specialised for on a GPU: calls that agree in it run the same code. Nothing is
        translated."""
        return specification(*bound(self, self._match(args, kwargs)), "cuda")

    def ir(self, *args: Any, after: str | None = None, **kwargs: Any) -> Function:
        """The IR as translated, or after a pass of tilus.transforms."""
        function = self.specialize(*args, **kwargs).function
        if after is None:
            return function
        from tilus.transforms import run_pipeline

        return run_pipeline(function, DEFAULT_TARGET, after=after)

    def ptx(self, *args: Any, target: Target | str = DEFAULT_TARGET, **kwargs: Any) -> str:
        """The PTX text."""
        return self._compiled(args, target, kwargs).ptx

    def report(self, *args: Any, target: Target | str = DEFAULT_TARGET, **kwargs: Any) -> str:
        """Registers, memory accesses, bank conflicts, layouts, conversions and instruction mix (see tilus.report)."""
        from tilus.report import make_report

        return make_report(self._compiled(args, target, kwargs)).render()

    def _compiled(self, args: Any, target: Target | str, kwargs: Any) -> Compiled:
        from tilus.compiler import compile_function

        chosen = get_target(target) if isinstance(target, str) else target
        return compile_function(self.specialize(*args, **kwargs).function, chosen)

    def _match(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, defaults included."""
        try:
            bound = self.signature.python.bind(*args, **kwargs)
        except TypeError as error:
            raise TilusError(f"{self.signature.name}: {error}", loc=self.signature.loc, hint=self._usage()) from None
        bound.apply_defaults()
        return dict(bound.arguments)

    def _usage(self) -> str:
        return f"its parameters are {', '.join(p.name for p in self.signature.parameters)}"


@overload
def kernel(function: Callable[..., None]) -> Kernel: ...
@overload
def kernel(*, varying: Sequence[str]) -> Callable[[Callable[..., None]], Kernel]: ...
def kernel(
    function: Callable[..., None] | None = None, *, varying: Sequence[str] = ()
) -> Kernel | Callable[[Callable[..., None]], Kernel]:
    """Make a Python function a kernel. Its body is parsed when it is first needed, and never run by Python.

    varying: names of dims that differ from call to call, such as a number of tokens: one specialisation serves every extent of
    theirs, of which it then knows neither that it is 1 nor what divides it. `@tilus.kernel(varying=("m",))`.
    """
    frame = inspect.currentframe()
    caller = frame.f_back if frame is not None else None
    names = {} if caller is None else dict(caller.f_locals)

    def decorated(function: Callable[..., None]) -> Kernel:
        if not isinstance(function, FunctionType):
            raise TilusError(
                f"@tilus.kernel on {function!r}, expected a function", hint="put it directly above a `def`"
            )
        return Kernel(function, names, varying)

    return decorated if function is None else decorated(function)
