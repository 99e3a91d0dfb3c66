"""Logits of a batch as requests want them before a token is drawn: tokens that are forbidden, penalised or favoured."""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import Tensor, TilusError, f32, int32, uint8
from tilus.kernels.allocate import empty

BYTES = 512  # of bits that a block looks at


@tilus.kernel(varying=("requests", "masks"))
def allow_kernel(
    logits: Tensor[f32, "requests", "vocabulary"],
    bits: Tensor[uint8, "masks", "bytes"],
    mask_of: Tensor[int32, "requests"],
    out: Tensor[f32, "requests", "vocabulary"],
):
    """A block for 8 * BYTES tokens of a row."""
    tilus.grid(tilus.cdiv(logits.shape[1], 8 * BYTES), logits.shape[0], warps=8)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    first, request = tilus.block_id(0) * BYTES, tilus.block_id(1)
    tile = tilus.load(logits, [request, 8 * first], [8 * BYTES])
    mask = mask_of[request]
    if mask >= 0:
        found = tilus.load(bits, [mask, first], [BYTES]).to(int32)
        found = tilus.reshape(found, [BYTES, 1]) >> tilus.reshape(tilus.arange(8), [1, 8])
        tile = tilus.where(tilus.reshape(found & 1, [8 * BYTES]) == 1, tile, -math.inf)
    tilus.store(out, [request, 8 * first], tile)


@tilus.kernel(varying=("requests", "edits"))
def edit_kernel(
    out: Tensor[f32, "requests", "vocabulary"],
    rows: Tensor[int32, "edits"],
    tokens: Tensor[int32, "edits"],
    penalties: Tensor[f32, "edits"],
    addends: Tensor[f32, "edits"],
):
    """A block an edit. No two are of the same token of a row."""
    tilus.grid(rows.shape[0], warps=1)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    edit = tilus.block_id(0)
    row, token = rows[edit], tokens[edit]
    penalty, addend = tilus.load(penalties, [edit], [1]), tilus.load(addends, [edit], [1])
    logit = tilus.load(out, [row, token], [1])
    logit = tilus.where(logit > 0.0, logit / penalty, logit * penalty)
    tilus.store(out, [row, token], logit + addend)


def edit_logits(
    logits: Any, *, bits: Any, mask_of: Any, rows: Any, tokens: Any, penalties: Any, addends: Any, out: Any = None,
    device: str | None = None,
) -> Any:  # fmt: skip
    """Logits f32 [R, V] with some tokens forbidden and some changed. Two launches, one where there are no edits.

    bits: uint8 [masks, at least V / 8 bytes], a bit for each token, the first in the lowest bit of the first byte: 0 makes its
    logit minus infinity. mask_of: int32 [R], the mask of each row, negative for none. Then each of the edits, [E], no two of the
    same token of a row: rows, tokens int32; penalties f32 above 0, which positive logits are divided by and others multiplied
    with (N. S. Keskar et al., "CTRL", arXiv 1909.05858); addends f32, added afterwards. Torch tensors or numpy arrays. out: where
    the result goes, f32 [R, V], other memory than logits. device: where to run (reference, emulator, cpu, cuda), by default as
    the arguments say.

    Raises: TilusError when shapes do not fit together.
    """
    if logits.ndim != 2 or list(mask_of.shape) != [logits.shape[0]]:
        raise TilusError(
            f"edit_logits: logits of shape {list(logits.shape)} and mask_of of shape {list(mask_of.shape)}, expected "
            "[requests, vocabulary] and [requests]"
        )
    if bits.ndim != 2 or 8 * bits.shape[1] < logits.shape[1]:
        raise TilusError(
            f"edit_logits: bits of shape {list(bits.shape)}, expected [masks, {-(-logits.shape[1] // 8)} bytes or more]"
        )
    out = empty(logits, tuple(logits.shape)) if out is None else out
    allow_kernel.on(device)(logits, bits, mask_of, out)
    if rows.shape[0]:
        edit_kernel.on(device)(out, rows, tokens, penalties, addends)
    return out
