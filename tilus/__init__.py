"""tilus: GPU kernels as decorated Python functions, for any bit width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilus.errors import TilusError

if TYPE_CHECKING:
    from tilus.dtypes import *  # noqa: F403
    from tilus.lang.annotations import Const as Const
    from tilus.lang.annotations import Tensor as Tensor
    from tilus.runtime.ahead import compile_ahead as compile_ahead
    from tilus.runtime.capture import LaunchGraph as LaunchGraph
    from tilus.runtime.capture import capture as capture
    from tilus.runtime.execute import default_device as default_device

# Names of the language by the module that has them. They are imported when they are first used, so that `import tilus`
# is quick and needs neither a driver nor torch.
_MODULES = {
    "tilus.dtypes": ("DataType", "dtype"),
    "tilus.lang.annotations": ("Const", "Tensor"),
    "tilus.lang.arguments": ("PackedTensor", "packed"),
    "tilus.lang.builtins": ("block_id", "cdiv", "grid", "grid_dim", "inline", "range", "static_range"),
    "tilus.lang.kernel": ("Kernel", "kernel"),
    "tilus.lang.roles": ("warps",),
    "tilus.runtime.ahead": ("compile_ahead",),
    "tilus.runtime.capture": ("LaunchGraph", "capture"),
    "tilus.runtime.compilations": ("num_compilations",),
    "tilus.runtime.execute": ("default_device",),
    "tilus.target": ("Target", "get_target"),
}
_OWNER = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Find a public name: of the front end, a data type, or a function of the instructions."""
    import importlib

    if name.startswith("_"):
        raise AttributeError(f"module 'tilus' has no attribute {name!r}")
    if name in _OWNER:
        value = getattr(importlib.import_module(_OWNER[name]), name)
    elif name in (dtypes := importlib.import_module("tilus.dtypes").DTYPES):
        value = dtypes[name]
    elif name in (functions := importlib.import_module("tilus.instructions").BUILTINS):
        value = functions[name]
    else:
        raise AttributeError(f"module 'tilus' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from tilus.dtypes import DTYPES
    from tilus.instructions import BUILTINS

    return sorted({*globals(), *_OWNER, *DTYPES, *BUILTINS})


__all__ = ["TilusError"]
