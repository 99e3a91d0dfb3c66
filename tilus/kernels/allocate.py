"""Outputs and workspaces like a given array: torch tensors on its device, or numpy arrays."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from tilus.errors import TilusError

# Counters that kernels leave at zero, per device and stream: blocks of different streams must not share them.
_counters: dict[tuple[int, int], Any] = {}


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_cuda(array: Any) -> bool:
    return bool(getattr(array, "is_cuda", False))


def empty(like: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """An uninitialised array of the kind and on the device of `like`; dtype: a torch or numpy dtype, or its name."""
    if is_torch(like):
        import torch

        wanted = like.dtype if dtype is None else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return torch.empty(shape, dtype=wanted, device=like.device)
    return np.empty(shape, like.dtype if dtype is None else dtype)


def result_of(name: str, like: Any, shape: tuple[int, ...], dtype: Any, out: Any | None) -> Any:
    """`out` where it is given, else an `empty` array. Raises: TilusError, with the name of the function, for another shape."""
    if out is None:
        return empty(like, shape, dtype)
    if tuple(out.shape) != shape:
        raise TilusError(f"{name}: out has shape {list(out.shape)}, expected {list(shape)}")
    return out


def counters(like: Any, count: int) -> Any:
    """int32 counters that are zero, [at least count], for kernels that leave them at zero. One array per device and stream."""
    if not is_cuda(like):
        return np.zeros(count, np.int32) if not is_torch(like) else _zeros(like, count)
    from tilus.runtime import cuda

    key = (like.get_device(), cuda.current_stream(like.get_device()))
    found = _counters.get(key)
    if found is None or found.shape[0] < count:
        found = _counters[key] = _zeros(like, max(count, 1 << 14))
    return found


def _zeros(like: Any, count: int) -> Any:
    import torch

    return torch.zeros(count, dtype=torch.int32, device=like.device)
