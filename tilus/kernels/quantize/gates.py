"""The order of the rows of a gated weight: of each 16 rows 8 gates, then the 8 factors of the same outputs.

Rows r and r + 8 of a product of tensor cores are results of one thread, so that a linear layer multiplies each gate with its
factor where it has both, and writes neither.
"""

from __future__ import annotations

from typing import Any

GATE_ROWS = 8
PAIR_ROWS = 2 * GATE_ROWS


def interleaved(rows: Any) -> Any:
    """Rows [2 F, ...], first F gates, then their F factors, in the order of a gated weight; F is a multiple of 8."""
    blocks = rows.reshape(2, -1, GATE_ROWS, *rows.shape[1:])
    return blocks.swapaxes(0, 1).reshape(rows.shape)


def separated(rows: Any) -> Any:
    """What `interleaved` made of rows, back in order."""
    pairs = rows.reshape(-1, 2, GATE_ROWS, *rows.shape[1:])
    return pairs.swapaxes(0, 1).reshape(rows.shape)
