"""Rows of an embedding table, dense or quantised to 8 bits with group scales."""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32, int32
from tilus.kernels.allocate import empty

BLOCK = 1024  # elements of a row that a block gathers


@tilus.kernel(varying=("tokens",))
def dense_embedding_kernel(
    ids: Tensor[int32, "tokens"],
    table: Tensor["dtype", "vocabulary", "hidden"],
    out: Tensor["dtype", "tokens", "hidden"],
):
    tilus.grid(ids.shape[0], tilus.cdiv(out.shape[1], BLOCK), warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    token, first = tilus.block_id(0), tilus.block_id(1) * BLOCK
    tilus.store(out, [token, first], tilus.load(table, [ids[token], first], [BLOCK]))


@tilus.kernel(varying=("tokens",))
def quantized_embedding_kernel(
    ids: Tensor[int32, "tokens"],
    codes: Tensor["code", "vocabulary", "groups", "group"],
    scales: Tensor["dtype", "vocabulary", "groups"],
    out: Tensor["dtype", "tokens", "groups", "group"],
    *,
    group: Const,
):
    """The product of a code and a scale is exact in f32, so it is rounded once."""
    rows = BLOCK // group
    tilus.grid(ids.shape[0], tilus.cdiv(scales.shape[1], rows), warps=4)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    token, first = tilus.block_id(0), tilus.block_id(1) * rows
    row = ids[token]
    values = tilus.load(codes, [row, first, 0], [rows, group]).to(f32)
    factors = tilus.load(scales, [row, first], [rows]).to(f32)
    tilus.store(out, [token, first, 0], (values * factors.reshape([rows, 1])).to(out.dtype))


def embedding(ids: Any, table: Any, scales: Any | None = None, *, device: str | None = None) -> Any:
    """The rows `ids` of a table, multiplied by their group scales when there are any.

    ids: int32 [M]; an id outside of the table gives a row of zeros. table: float16 or bfloat16 [V, H], or int8 codes [V, H] with
    scales float16 or bfloat16 [V, H / group], the group being a power of two up to 1024. Torch tensors or numpy arrays. device:
    where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Returns: [M, H] in the dtype of the scales, or of the table where there are none. Rounded once.
    Raises: TilusError when shapes, dtypes or devices do not fit together.
    """
    if ids.ndim != 1 or table.ndim != 2:
        raise TilusError(
            f"embedding: ids of shape {list(ids.shape)} and a table of shape {list(table.shape)}, "
            "expected [tokens] and [vocabulary, hidden]",
            hint="flatten the ids: ids.reshape(-1)",
        )
    tokens, (vocabulary, hidden) = int(ids.shape[0]), (int(extent) for extent in table.shape)
    if scales is None:
        out = empty(table, (tokens, hidden))
        dense_embedding_kernel.on(device)(ids, table, out)
        return out
    group = _group(table, scales)
    out = empty(scales, (tokens, hidden // group, group))
    codes = table.reshape(vocabulary, hidden // group, group)
    quantized_embedding_kernel.on(device)(ids, codes, scales, out, group=group)
    return out.reshape(tokens, hidden)


def _group(table: Any, scales: Any) -> int:
    """How many columns share a scale."""
    hidden, groups = int(table.shape[1]), int(scales.shape[-1])
    group = hidden // groups if groups else 0
    if scales.ndim != 2 or not 1 <= group <= BLOCK or group * groups != hidden or group & (group - 1):
        raise TilusError(
            f"embedding: scales of shape {list(scales.shape)} for a table of shape {list(table.shape)}, expected "
            f"[{table.shape[0]}, {hidden} / group] with a power of two up to {BLOCK} as group",
            hint=f"for groups of 32: [{table.shape[0]}, {hidden // 32}]" if hidden % 32 == 0 else None,
        )
    return group
