"""The kernel library: what serving a language model needs, as functions on torch tensors.

Functions are imported when they are first used, so that `import tilus.kernels` is quick.
"""

from __future__ import annotations

from typing import Any

# Exported names by the module that has them.
_MODULES = {
    "tilus.kernels.attention": ("paged_attention",),
    "tilus.kernels.rope": ("rope_append",),
}
_OWNER = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _OWNER:
        raise AttributeError(f"module 'tilus.kernels' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_OWNER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_OWNER})
