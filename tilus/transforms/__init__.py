"""The passes between the front end and code generation, as one visible list. The verifier runs after each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tilus.errors import TilusError
from tilus.ir.function import Function
from tilus.ir.verify import verify
from tilus.target import Target
from tilus.transforms.accumulate_in_place import accumulate_in_place
from tilus.transforms.check_under_way import check_under_way
from tilus.transforms.eliminate_dead_code import eliminate_dead_code
from tilus.transforms.finish_loads import finish_loads
from tilus.transforms.infer_layouts import infer_layouts
from tilus.transforms.layout_shared import layout_shared
from tilus.transforms.select_instructions import select_instructions
from tilus.transforms.unroll import unroll


@dataclass(frozen=True)
class Pass:
    """A named function from IR to IR; the same object comes back when nothing changed."""

    name: str
    run: Callable[[Function, Target], Function]


# What code for CPUs starts from: no tile has a layout but those that the program pins.
WITHOUT_LAYOUTS: tuple[Pass, ...] = (
    Pass("eliminate_dead_code", eliminate_dead_code),
    Pass("unroll", unroll),
    Pass("accumulate_in_place", accumulate_in_place),
)

PIPELINE: tuple[Pass, ...] = (
    *WITHOUT_LAYOUTS,
    Pass("infer_layouts", infer_layouts),
    Pass("check_under_way", check_under_way),
    Pass("layout_shared", layout_shared),
    Pass("select_instructions", select_instructions),
    Pass("clean_up", eliminate_dead_code),
    Pass("finish_loads", finish_loads),
)


def run_pipeline(
    function: Function,
    target: Target,
    *,
    passes: Sequence[Pass] = PIPELINE,
    after: str | None = None,
    observe: Callable[[str, Function], None] | None = None,
) -> Function:
    """Run passes, all of them or those up to and including `after`. `observe` sees the function after each one (dumps).

    Raises: TilusError for a mistake in the program, or when `after` names no pass.
    """
    names = [p.name for p in passes]
    if after is not None and after not in names:
        raise TilusError(f"no pass is called {after!r}", hint=f"passes: {', '.join(names)}")
    verify(function)
    for step in passes:
        before, function = function, step.run(function, target)
        if function is not before:
            verify(function)
        if observe is not None:
            observe(step.name, function)
        if step.name == after:
            break
    return function
