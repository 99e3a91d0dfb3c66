"""Cached tokens as left operands of a decode kernel's products: 16-bit elements as they are, or codes of 8, 4 or 2 bits.

Codes come from shared memory by ldmatrix in units of 16 bits, transposed ones too: a thread then has, of its tokens, runs of
neighbouring codes. Which code is which element of the operand is free as long as queries and results are in the same order, so
the orders here are those in which a thread's codes are its elements, pairs of them at equal places of two half-words:

    of keys    within 16 bytes thread t (0 to 3) has the codes of word t; the fragment wants columns 8 h + 2 t + p
    of values  a thread has the unit of column g (0 to 7) of two tokens; codes of a unit become rows g, g + 8, g + 16, ...
"""

from __future__ import annotations

from typing import Any

import tilus
from tilus import f16
from tilus.dtypes import DataType
from tilus.kernels.kv_cache import KvFormat
from tilus.kernels.paged_decode_columns import Columns
from tilus.layout import Digit, RegisterLayout, local, replicated, spatial
from tilus.layout.atoms import ldmatrix_trans, mma_a

ROWS = 16  # tokens of a warp's product
UNIT_NBITS = 16


class Elements:
    """Keys and values of 16 bits."""

    def keys(self, stages: Any, step: Any, count: int) -> Any:
        """[parts, 16, head_dim]"""
        return stages.tokens(0, step, count, None)

    def values(self, stages: Any, step: Any, count: int) -> Any:
        """[parts, head_dim, 16]"""
        return tilus.transpose(stages.tokens(1, step, count, None), [0, 2, 1])

    def ordered_queries(self, queries: Any) -> Any:
        """[width, head_dim] in the order of the keys' elements, in the type in which they are multiplied."""
        return queries

    def natural(self, result: Any) -> Any:
        """[head_dim, width] from the order of the values' elements."""
        return result

    def ordered_layout(self, natural: RegisterLayout) -> RegisterLayout:
        """What `natural` turns into that layout."""
        return natural


class Codes:
    """Keys and values of codes, which become f16. parts, column_groups: of the computing warps (see `DecodePlan`)."""

    def __init__(self, dtype: DataType, head_dim: int, parts: int, column_groups: int) -> None:
        self.dtype, self.head_dim, self.parts = dtype, head_dim, parts
        self.in_unit = UNIT_NBITS // dtype.nbits
        self.blocks = head_dim // (8 * self.in_unit)  # of 16 bytes
        self.warps = spatial(parts, 1, 1) * replicated(column_groups, 3)

    def keys(self, stages: Any, step: Any, count: int) -> Any:
        """[parts, 16, head_dim]"""
        units = self.warps * local(1, 1, self.blocks) * local(1, 2, 1) * spatial(1, 8, 4) * local(1, 1, 2)
        raw = tilus.with_layout(stages.tokens(0, step, count, units), units)
        codes = (Digit(2, 2, 8), Digit(2, 2, 1))
        if self.in_unit > 2:  # columns of several products
            codes = (Digit(2, 2, 1), Digit(self.in_unit // 2, 2, 16), Digit(2, 2, 8))
        slots = (Digit(self.blocks, 2, 8 * self.in_unit), Digit(2, 1, 8), *codes)
        threads = (*self.warps.thread_digits, Digit(8, 1, 1), Digit(4, 2, 2))
        shape = (self.parts, ROWS, self.head_dim)
        found = tilus.view(raw, self.dtype, shape, RegisterLayout(shape, threads, slots))
        return tilus.cast(found, f16, layout=self.warps * local(1, 1, self.head_dim // 16) * mma_a().unsqueeze(0))

    def values(self, stages: Any, step: Any, count: int) -> Any:
        """[parts, head_dim, 16]"""
        units = self.warps * local(1, 1, self.blocks) * local(1, 2, 1) * ldmatrix_trans().unsqueeze(0)
        raw = tilus.with_layout(stages.tokens(1, step, count, units), units)
        slots = Digit(self.blocks, 1, 8 * self.in_unit), Digit(2, 2, 8), Digit(2, 2, 1), Digit(self.in_unit, 1, 8)
        threads = (*self.warps.thread_digits, Digit(8, 1, 1), Digit(4, 2, 2))
        shape = (self.parts, self.head_dim, ROWS)
        found = tilus.view(raw, self.dtype, shape, RegisterLayout(shape, threads, slots))
        return tilus.cast(found, f16, layout=self.warps * local(1, self.head_dim // 16, 1) * mma_a().unsqueeze(0))

    def ordered_queries(self, queries: Any) -> Any:
        """[width, head_dim] in the order of the keys' elements, in the type in which they are multiplied."""
        width = queries.shape[0]
        if self.in_unit == 2:
            by_place = tilus.transpose(queries.reshape([width, self.blocks, 4, 2, 2]), [0, 1, 3, 2, 4])
        else:
            by_place = tilus.transpose(
                queries.reshape([width, self.blocks, 4, 2, self.in_unit // 2, 2]), [0, 1, 4, 5, 2, 3]
            )
        return by_place.reshape([width, self.head_dim]).to(f16)

    def natural(self, result: Any) -> Any:
        """[head_dim, width] from the order of the values' elements."""
        width = result.shape[1]
        by_code = tilus.transpose(result.reshape([self.blocks, self.in_unit, 8, width]), [0, 2, 1, 3])
        return by_code.reshape([self.head_dim, width])

    def ordered_layout(self, natural: RegisterLayout) -> RegisterLayout:
        """What `natural` turns into that layout."""
        width = natural.shape[1]
        by_code = natural.reshape((self.blocks, 8, self.in_unit, width)).permute([0, 2, 1, 3])
        return by_code.reshape((self.head_dim, width))


def operands_of(kind: KvFormat | None, columns: Columns) -> Elements | Codes:
    """Of a quantised cache, or of one of elements."""
    return Elements() if kind is None else Codes(kind.code, columns.head_dim, columns.parts, columns.column_groups)
