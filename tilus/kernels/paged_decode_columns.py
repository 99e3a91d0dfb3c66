"""Query heads as columns of a decode kernel's products, and where their results go: to the output, or to be merged.

Sums of parts merged by their log-sum-exp: T. Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import math
from typing import Any

import tilus
from tilus import int32
from tilus.kernels.online_softmax import NO_SCORE, natural
from tilus.kernels.paged_decode_split import Part
from tilus.kernels.vectors import power_of_two
from tilus.layout import RegisterLayout, local, replicated, spatial
from tilus.layout.atoms import mma_c

MERGED = 16  # partial results that are loaded together, at most
MERGED_REGISTERS = 64  # of a thread for them
MERGED_ELEMENTS = 16  # of a thread, of the result


def normalized(highest: Any, total: Any, acc: Any, layout: RegisterLayout) -> Any:
    """([head_dim, width] softmax-weighted sum, [1, width] log2 of the sum of weights) of all warps' tokens.

    A column without any key is zero, and its logarithm NO_SCORE. layout: of the weighted sum.
    """
    most = tilus.max(highest, 0, keepdims=True)
    factor = tilus.exp2(highest - most)
    everything = tilus.sum(total * factor, 0, layout=layout.reduce([0]))
    result = tilus.sum(acc * factor, 0, layout=layout) * tilus.rcp(tilus.where(everything > 0.0, everything, 1.0))
    return result, tilus.where(everything > 0.0, tilus.log2(everything) + most.reshape(everything.shape), NO_SCORE)


class Columns:
    """The columns of a block's products: query tokens, and in each the heads of the group, both padded."""

    def __init__(self, q_len: int, group: int, head_dim: int, warps: int, column_groups: int) -> None:
        self.q_len, self.group, self.head_dim = q_len, group, head_dim
        self.warps, self.parts, self.column_groups = warps, warps // column_groups, column_groups
        self.heads = power_of_two(group)
        self.tokens = padded_tokens(q_len, group, column_groups)
        self.width = self.tokens * self.heads

    def layout(self, rows: int) -> RegisterLayout:
        """Of products [parts, rows, width] in which a warp has all rows of its part and its group of columns."""
        repeats = local(1, rows // 16, self.width // (8 * self.column_groups))
        return spatial(self.parts, 1, self.column_groups) * repeats * mma_c().unsqueeze(0)

    def queries(self, q: Any, head: Any) -> Any:
        """Of a sequence and kv head, [width, head_dim]."""
        shape = [self.tokens, self.heads, self.head_dim]
        tile = tilus.load(q, [0, head, 0, 0], shape, dims=[0, 2, 3])
        return tile.reshape([self.width, self.head_dim])

    def result_layout(self) -> RegisterLayout:
        """Of [head_dim, width]: in `rows` neighbouring threads have neighbouring vectors."""
        rows = by_vector((self.tokens, self.heads, self.head_dim), self.warps)
        return rows.reshape((self.width, self.head_dim)).permute([1, 0])

    def rows(self, result: Any) -> Any:
        """[head_dim, width] as [tokens, heads, head_dim]"""
        return tilus.transpose(result).reshape([self.tokens, self.heads, self.head_dim])

    def store(self, out: Any, lse: Any, part: Part, result: Any, result_lse: Any) -> None:
        where = [0, part.head, 0, 0]
        tilus.store(out[part.sequence], where, self.rows(result).to(out.dtype), dims=[0, 2, 3])
        self.store_lse(lse, part.sequence, part.head, 0, result_lse.reshape([self.tokens, self.heads]))

    def store_lse(self, lse: Any, sequence: Any, head: Any, first: Any, log2: Any) -> None:
        """Of the softmax itself: a natural logarithm, minus infinity where there was no key."""
        if lse is not None:
            tilus.store(lse[sequence], [first, head, 0], natural(log2), dims=[0, 2])

    def store_partial(self, partial_out: Any, partial_lse: Any, place: Any, result: Any, result_lse: Any) -> None:
        tilus.store(partial_out[place], [0, 0, 0], self.rows(result))
        tilus.store(partial_lse[place], [0, 0], result_lse.reshape([self.tokens, self.heads]))

    def merge(self, partials: list[tuple[Any, Any, Any, int]], out: Any, lse: Any, sequence: Any, head: Any) -> None:
        """Add up partial results, always in the same order, and store the sums. partials: (outs, logs, how many, registers of a
        thread for those that are loaded together) of each kind."""
        tokens = self.merged_tokens()
        for first in tilus.range(0, self.q_len, tokens):
            self.merge_tokens(partials, out, lse, sequence, head, first, tokens)

    def merged_tokens(self) -> int:
        """Query tokens whose partial results are merged at a time."""
        tokens = 1
        while tokens < self.q_len and 2 * tokens * self.heads * self.head_dim <= MERGED_ELEMENTS * 32 * self.warps:
            tokens *= 2
        return tokens

    def merged_layout(self, tokens: int) -> RegisterLayout:
        return by_vector((tokens, self.heads, self.head_dim), self.warps)

    def merged_parts(self) -> tuple[int, int]:
        """(partial results of a pair that are loaded together, how often until all query tokens have them)"""
        tokens = self.merged_tokens()
        return together(self.merged_layout(tokens), MERGED_REGISTERS), -(-self.q_len // tokens)

    def merge_tokens(
        self, partials: list[tuple[Any, Any, Any, int]], out: Any, lse: Any, sequence: Any, head: Any, first: Any, tokens: int
    ) -> None:  # fmt: skip
        """The same for some query tokens."""
        rows = (tokens, self.heads)
        sums = Sums(self.merged_layout(tokens))
        ahead = [sums.load(*kind, 0, first) for kind in partials[1:]]  # they come while others are added up
        sums.add_all(*partials[0], 0, first)
        for kind, (values, log2) in zip(partials[1:], ahead, strict=True):
            sums.add(values, log2)
            sums.add_all(*kind, values.shape[0], first)
        result, log2 = sums.normalized()
        tilus.store(out[sequence], [first, head, 0, 0], result.to(out.dtype), dims=[0, 2, 3])
        self.store_lse(lse, sequence, head, first, log2.reshape(rows))


class Results:
    """Where results of parts go: those of whole pairs to the output, others to be merged by the last block of a pair to come.

    partial_out: [places, q_len, group, head_dim]. tickets: zeros, one for each pair, and left so.
    """

    def __init__(self, columns: Columns, out: Any, lse: Any, partial_out: Any, partial_lse: Any, tickets: Any) -> None:
        self.columns, self.out, self.lse = columns, out, lse
        self.partial_out, self.partial_lse, self.tickets = partial_out, partial_lse, tickets

    def store(self, part: Part, count: Any, index: Any, place: Any, result: Any, result_lse: Any) -> None:
        """The index-th of `count` parts of a pair, whose places begin at `place`."""
        columns = self.columns
        if count > 1:
            columns.store_partial(self.partial_out, self.partial_lse, place + index, result, result_lse)
            if tilus.atomic_add(self.tickets, [part.pair], 1) == count - 1:
                tilus.store(self.tickets, [part.pair], tilus.zeros([1], int32))
                outs, logs = [tilus.narrow(t, 0, place, count) for t in (self.partial_out, self.partial_lse)]
                columns.merge([(outs, logs, count, MERGED_REGISTERS)], self.out, self.lse, part.sequence, part.head)
        else:
            columns.store(self.out, self.lse, part, result, result_lse)


class Sums:
    """Weighted sums of partial results [tokens, heads, head_dim] in a layout, of weights, and what these are relative to."""

    def __init__(self, layout: RegisterLayout) -> None:
        self.layout = layout
        self.rows, self.head_dim = layout.shape[:2], layout.shape[2]
        self.acc = tilus.zeros(layout.shape, layout=layout)
        self.total, self.highest = tilus.zeros([*self.rows, 1]), tilus.full([*self.rows, 1], NO_SCORE)

    def load(self, outs: Any, logs: Any, count: Any, registers: int, at: Any, first: Any) -> tuple[Any, Any]:
        """Some of `count` partial results and their logarithms, from the at-th on, from token `first` on."""
        parts, rows = together(self.layout, registers), self.rows
        spread = self.layout.unsqueeze(0).expand(0, parts)
        values = tilus.load(outs, [at, first, 0, 0], [parts, *rows, self.head_dim], layout=spread)
        log2 = tilus.load(logs, [at, first, 0], [parts, *rows]).reshape([parts, *rows, 1])
        return values, tilus.where(tilus.arange(parts, shape=[parts, 1, 1, 1], start=at) < count, log2, NO_SCORE)

    def add(self, values: Any, log2: Any) -> None:
        higher = tilus.maximum(self.highest, tilus.max(log2, 0))
        shrink = tilus.exp2(self.highest - higher)
        factors = tilus.where(log2 > NO_SCORE, tilus.exp2(log2 - higher), 0.0)
        self.acc = self.acc * shrink + tilus.sum(values * factors, 0)
        self.total = self.total * shrink + tilus.sum(factors, 0)
        self.highest = higher

    def add_all(self, outs: Any, logs: Any, count: Any, registers: int, begin: Any, first: Any) -> None:
        """All of them from the begin-th on."""
        for at in tilus.range(begin, count, together(self.layout, registers)):
            self.add(*self.load(outs, logs, count, registers, at, first))

    def normalized(self) -> tuple[Any, Any]:
        """(results, log2 of sums of weights)"""
        result = self.acc * tilus.rcp(tilus.where(self.total > 0.0, self.total, 1.0))
        return result, tilus.where(self.total > 0.0, tilus.log2(self.total) + self.highest, NO_SCORE)


def together(layout: RegisterLayout, registers: int) -> int:
    """How many partial results of this layout a thread has so many registers for."""
    return max(1, min(MERGED, registers // layout.num_locals))


def by_vector(shape: tuple[int, int, int], warps: int) -> RegisterLayout:
    """[tokens, heads, head_dim] over so many warps: neighbouring threads have neighbouring vectors of four elements."""
    threads, width, vectors = 32 * warps, shape[0] * shape[1], shape[2] // 4
    across = math.gcd(threads, vectors)
    down = math.gcd(threads // across, width)
    copies = threads // (across * down)
    flat = replicated(copies, 2) * local(width // down, vectors // across) * spatial(down, across) * local(1, 4)
    return flat.reshape(shape)


def padded_tokens(q_len: int, group: int, column_groups: int) -> int:
    """Query tokens of a tile, at least q_len, so that each group of columns has a multiple of 8."""
    least = max(1, 8 * column_groups // power_of_two(group))
    return -(-q_len // least) * least


def padded_columns(q_len: int, group: int, column_groups: int) -> int:
    return padded_tokens(q_len, group, column_groups) * power_of_two(group)
