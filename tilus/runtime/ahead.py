"""Compiling all kernels that some code will launch, at once and in processes, instead of one by one at their first launch.

The code itself says which: it runs dry, so that no list of kernels can fall behind it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tilus.errors import TilusError
from tilus.runtime.compile_pool import CompilePool

if TYPE_CHECKING:
    from tilus.lang.facts import Specification
    from tilus.lang.kernel import Specialization
    from tilus.target import Target

# What each launcher has prepared, by the arguments' facts.
_prepared: WeakKeyDictionary[Callable[..., None], dict[Any, Any]] = WeakKeyDictionary()
# The kernels that launches of a dry run need, and whether they are on the disk; None where launches launch.
_needed: dict[tuple[Specialization, Target | None], bool] | None = None


def compile_ahead(
    run: Callable[[], object], *, done: Callable[[int, int], None] = lambda count, total: None, processes: int | None = None,
) -> int:  # fmt: skip
    """Have the kernels on the disk that `run()` launches; the number of those that had to be compiled.

    run: is called with all launches left out, on every device, so that results are what their memory held before. It is called
    again after kernels were compiled: where the registers of one do not suffice, a function may then take another plan. It may
    not launch from several threads, and no other thread may launch meanwhile. done: called with (kernels done, kernels in all)
    of each round. processes: as of `CompilePool`; they touch no GPU. Kernels that are not of tilus are left to their first
    launch.

    Raises: what run raises; TilusError naming a kernel that cannot be compiled, or when a process ended, and inside of run.
    """
    compiled: set[tuple[Specialization, Target | None]] = set()
    with CompilePool(processes) as pool:
        while True:
            with _dry() as needed:
                run()
            # What has been compiled and is not there all the same is on a disk that keeps nothing.
            new = [kernel for kernel, is_there in needed.items() if not is_there and kernel not in compiled]
            if not new:
                return len(compiled)
            pool.compile_all([_job(*kernel) for kernel in new], done=done)
            compiled.update(new)


def is_dry() -> bool:
    """Whether launches are only noted."""
    return _needed is not None


def note(specialization: Specialization, target: Target | None) -> None:
    """A launch of a dry run needs this kernel, for a GPU or (None) for this processor.

    Raises: SpillError where it has been compiled and registers did not suffice.
    """
    from tilus.runtime import binaries

    kernel = specialization, target
    if _needed is None or kernel in _needed or not binaries.has_entry(specialization):
        return
    found = binaries.find_on_cpu(specialization) if target is None else binaries.find_on_gpu(specialization, target)
    _needed[kernel] = found is not None


def register(launch: Callable[..., None], prepared: dict[Any, Any]) -> None:
    """A launcher, with what it has prepared, which a dry run sets aside."""
    _prepared[launch] = prepared


@contextmanager
def _dry() -> Generator[dict[tuple[Specialization, Target | None], bool]]:
    global _needed
    if _needed is not None:
        raise TilusError("compile_ahead inside of compile_ahead", hint="compile what the outer one runs")
    kept = {launch: dict(prepared) for launch, prepared in _prepared.items()}
    for prepared in _prepared.values():
        prepared.clear()
    needed = _needed = {}
    try:
        yield needed
    finally:
        _needed = None
        for launch, prepared in _prepared.items():
            prepared.clear()
            prepared.update(kept.get(launch, {}))


def _job(specialization: Specialization, target: Target | None) -> Callable[[], None]:
    kernel = specialization.kernel.python
    return partial(
        _compile, kernel.__module__, kernel.__qualname__, specialization.specification, specialization.consts, target
    )


def _compile(module: str, name: str, specification: Specification, consts: Any, target: Target | None) -> None:
    """In a process of the pool. Registers that do not suffice are no mistake: that is an entry on the disk, too."""
    from tilus.ptx.assembler import SpillError
    from tilus.runtime import binaries

    specialization = getattr(importlib.import_module(module), name).specialization(specification, consts)
    try:
        if target is None:
            binaries.on_cpu(specialization)
        else:
            binaries.on_gpu(specialization, target)
    except SpillError:
        return
    except TilusError as error:
        text = f"cannot compile the kernel {name} of {module}: {error.message}"
        raise TilusError(text, loc=error.loc, hint=error.hint, notes=error.notes) from error
