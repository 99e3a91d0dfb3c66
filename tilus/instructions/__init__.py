"""The tile instructions, one file per family.

`INSTRUCTIONS` maps mnemonics to classes for the text form and the docs; `BUILTINS` maps the names that users write to functions.
"""

from __future__ import annotations

from tilus.instructions import (
    async_copy,
    atomic,
    barrier,
    bulk_copy,
    cast,
    cluster,
    convert,
    debug,
    dependent_launch,
    elementwise,
    fill,
    gather,
    gathered_copy,
    item,
    lookup,
    math_functions,
    matrix,
    mbarrier,
    memory,
    mma,
    multiply_high,
    packed_codes,
    reduce,
    scan,
    shared,
    tensor_copy,
    view,
    wgmma,
)
from tilus.ir.builder import Builtin
from tilus.ir.instruction import Instruction

FAMILIES = (
    async_copy,
    atomic,
    barrier,
    bulk_copy,
    cast,
    cluster,
    convert,
    debug,
    dependent_launch,
    elementwise,
    fill,
    gather,
    gathered_copy,
    item,
    lookup,
    math_functions,
    matrix,
    mbarrier,
    memory,
    mma,
    multiply_high,
    packed_codes,
    reduce,
    scan,
    shared,
    tensor_copy,
    view,
    wgmma,
)


def _registry() -> dict[str, type[Instruction]]:
    classes: dict[str, type[Instruction]] = {}
    for family in FAMILIES:
        for value in vars(family).values():
            if isinstance(value, type) and issubclass(value, Instruction) and "mnemonic" in vars(value):
                classes[value.mnemonic] = value
    return classes


INSTRUCTIONS: dict[str, type[Instruction]] = _registry()
BUILTINS: dict[str, Builtin] = {
    value.__name__: value for family in FAMILIES for value in vars(family).values() if isinstance(value, Builtin)
}
