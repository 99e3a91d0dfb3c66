"""Columns of activations in another order, for weights whose columns were reordered (activation order)."""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Tensor, int32
from tilus.errors import TilusError
from tilus.kernels.allocate import empty

ROWS = 8
COLUMNS = 256


@tilus.kernel
def take_columns_kernel(
    x: Tensor["dtype", "m", "source"],
    columns: Tensor[int32, "k"],
    out: Tensor["dtype", "m", "k"],
):
    tilus.grid(tilus.cdiv(out.shape[1], COLUMNS), tilus.cdiv(out.shape[0], ROWS), warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    first, row = tilus.block_id(0) * COLUMNS, tilus.block_id(1) * ROWS
    index = tilus.load(columns, [first], [COLUMNS])
    tilus.store(out, [row, first], tilus.gather(x, [row, 0], index, [ROWS, COLUMNS]))


def take_columns(x: Any, columns: Any, *, device: str | None = None) -> Any:
    """x[:, columns].

    x: float16, bfloat16 or float32 [M, S], rows may be strided. columns: int32 [K], each less than S; an index outside gives
    zeros. Torch tensors or numpy arrays. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.
    Returns: [M, K] in the dtype of x.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    if x.ndim != 2 or columns.ndim != 1:
        raise TilusError(
            f"take_columns: x of shape {list(x.shape)} and columns of shape {list(columns.shape)}, expected [M, S] and [K]"
        )
    out = empty(x, (int(x.shape[0]), int(columns.shape[0])))
    take_columns_kernel.on(device)(x, columns, out)
    return out
