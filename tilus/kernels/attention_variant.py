"""Variants of attention as functions in the language, which a kernel inlines: of scores, of which keys are seen, a sink.

The last 1024 tokens, and scores between -30 and 30, are

    def window(at):
        return at.key > at.query - 1024

    def soft_cap(score, at):
        return tilus.tanh(score * (1 / 30)) * 30.0

    paged_prefill(..., variant=Variant(logits=soft_cap, mask=window))

With Variant(window=1024) the same tokens are seen, and tiles without any of them are not even read. A tree of speculated tokens,
which are the last tokens of a sequence and its queries, each of which sees its ancestors and itself, is

    def ancestors(at):
        return (at.key < at.past) | at.bit(at.key - at.past)

    bits = pack_bits(sees)  # boolean [queries of all sequences, queries of a sequence at most]
    paged_prefill(..., variant=Variant(mask=ancestors), bits=bits)  # or paged_decode

Variants are equal when their functions are: define them once, at the top of a module, so that a kernel is compiled once.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tilus
from tilus.dtypes import DataType, boolean, f32
from tilus.errors import Loc, TilusError

WORD_NBITS = 32
MOST_WORDS = 8


@dataclass(frozen=True)
class Variant:
    """Functions of tiles [rows, keys], or what broadcasts to it, in the language of kernels; at is a `Position`.

    logits(score, at): in place of the scaled score, f32. mask(at): which keys a query sees, boolean, beside what causality and
    lengths say. sink(at): the logit of one more key, whose value is zero, f32 [rows, 1] or a number; it counts in the logarithms.
    window: where queries do not see what comes behind them, how many keys one sees at most: the last ones, its own included.
    """

    logits: Callable[[Any, Any], Any] | None = None
    mask: Callable[[Any], Any] | None = None
    sink: Callable[[Any], Any] | None = None
    window: int | None = None

    @property
    def hides(self) -> bool:
        """Whether keys are hidden beside what causality and lengths say."""
        return self.mask is not None or self.window is not None

    def __post_init__(self) -> None:
        for what, function, expected in (
            ("logits", self.logits, ("score", "at")),
            ("mask", self.mask, ("at",)),
            ("sink", self.sink, ("at",)),
        ):
            if function is not None:
                _check_signature(what, function, expected)
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise TilusError(
                f"the window of an attention variant is {self.window!r}, expected an integer from 1 on, the query's own key"
            )


NO_VARIANT = Variant()


@functools.cache
def windowed(window: int | None, soft_cap: float | None) -> Variant:
    """The last `window` keys, and scores s as soft_cap * tanh(s / soft_cap); None for no such thing.

    Raises: TilusError for a window or cap that is not positive."""
    if soft_cap is None:
        return Variant(window=window)
    if not soft_cap > 0:
        raise TilusError(f"soft_cap is {soft_cap}, expected a positive number")
    inverse = 1.0 / soft_cap

    def capped(score: Any, at: Position) -> Any:
        return tilus.tanh(score * inverse) * soft_cap

    return Variant(logits=capped, window=window)


@dataclass(frozen=True, eq=False)
class GivenVariant:
    """A variant with the tensors of a call, each of which may be None."""

    variant: Variant = NO_VARIANT
    parameters: Any = None
    bits: Any = None

    @property
    def words(self) -> int:
        return 0 if self.bits is None else self.bits.shape[1]


AS_IT_IS = GivenVariant()


@dataclass(frozen=True, eq=False)
class Words:
    """Bits of the queries of some rows, int32: `count` words bits[row + token] for rows in runs of (heads, tokens).

    token_first: rows follow each other token by token instead. shape: of a word's tile. variant: that asks for them.
    """

    variant: Variant
    bits: Any
    count: int
    row: Any
    runs: tuple[int, int]
    shape: tuple[int, ...]
    token_first: bool = False

    def word(self, index: int) -> Any:
        heads, tokens = self.runs
        values = tilus.load(self.bits, [self.row, index], [tokens, 1])
        if self.token_first:
            return tilus.broadcast(values, [tokens, heads]).reshape(self.shape)
        return tilus.broadcast(values.reshape([1, tokens]), [heads, tokens]).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Position:
    """Where scores are. query [rows, 1], key [1, keys]: positions in the sequence, int32. head [rows, 1]: of all query heads.

    In decoding rows are columns of the products: query and head are [1, 1, rows], key is [warps, keys, 1].
    past: cached tokens in front of the sequence's queries. parameters: the caller's f32 tensor, None where there is none.
    first_head: of the rows. words: of the caller's bits; they also say how rows follow each other.
    """

    query: Any
    key: Any
    head: Any
    past: Any
    parameters: Any
    first_head: Any
    words: Words

    def bit(self, index: Any) -> Any:
        """The index-th bit of each row's query, boolean; index: int32, [1, keys] or [rows, keys]. False where there is none."""
        _check_given(self.words.count > 0, "at.bit", "bits", "pack_bits(...)", self.words.variant)
        found = 0
        for number in range(self.words.count):
            word = self.words.word(number) >> (index % WORD_NBITS)
            found = tilus.where(index // WORD_NBITS == number, word & 1, found)
        return found == 1

    def of_heads(self, offset: int = 0) -> Any:
        """parameters[offset + head] of each row, [rows, 1]."""
        example = "a tensor of f32, one for each query head"
        _check_given(self.parameters is not None, "at.of_heads", "parameters", example, self.words.variant)
        heads, tokens = self.words.runs
        values = tilus.load(self.parameters, [self.first_head + offset], [heads])
        if self.words.token_first:
            return tilus.broadcast(values.reshape([1, heads]), [tokens, heads]).reshape(self.words.shape)
        return tilus.broadcast(values.reshape([heads, 1]), [heads, tokens]).reshape(self.words.shape)


def scaled_logits(logits: Callable[..., Any], scores: Any, scale_log2: Any, at: Position) -> Any:
    """What the exponential of base 2 is taken of."""
    found = logits(scores * (scale_log2 * math.log(2.0)), at)
    check_tile("logits", logits, shape_of(found), dtype_of(found), tuple(scores.shape), f32)
    return found * math.log2(math.e)


def seen(mask: Callable[..., Any], allowed: Any, at: Position, shape: tuple[int, ...]) -> Any:
    """Which keys are seen, of those that are allowed."""
    found = mask(at)
    check_tile("mask", mask, shape_of(found), dtype_of(found), shape, boolean)
    return allowed & found


def sink_log2(sink: Callable[..., Any], at: Position, shape: tuple[int, ...]) -> Any:
    """The logits of sinks times log2(e), a tile of that shape."""
    found = sink(at)
    if not isinstance(found, (int, float)):
        check_tile("sink", sink, shape_of(found), dtype_of(found), shape, f32)
    return tilus.zeros(shape) + found * math.log2(math.e)


def shape_of(value: Any) -> Any:
    return tuple(value.shape) if hasattr(value, "shape") else None


def dtype_of(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else None


def check_tile(
    what: str, function: Callable[..., Any], shape: tuple[int, ...] | None, dtype: DataType | None,
    wanted: tuple[int, ...], wanted_dtype: DataType,
) -> None:  # fmt: skip
    """Raise at the user's function unless its result is a tile that broadcasts to the wanted one."""
    fits = (
        shape is not None
        and len(shape) <= len(wanted)
        and all(have in (1, want) for have, want in zip(reversed(shape), reversed(wanted)))
    )
    if fits and dtype == wanted_dtype:
        return
    found = (
        "no tile" if dtype is None else f"a scalar of {dtype.name}" if shape is None else f"{dtype.name}{list(shape)}"
    )
    raise TilusError(
        f"the {what} of an attention variant, {_name(function)}, gives {found}, expected {wanted_dtype.name} that broadcasts "
        f"to {list(wanted)}",
        loc=_defined_at(function),
        hint="at.query and at.head are [rows, 1], at.key is [1, keys]"
        + (
            ": compare them"
            if wanted_dtype == boolean
            else ", a score is f32 [rows, keys]: cast integers by .to(tilus.f32)"
        ),
    )


def pack_bits(conditions: Any) -> Any:
    """What `bits` of attention takes: boolean torch [queries, n], n up to 256, as int32 [queries, n / 32 rounded up].

    Bit i of word w is condition 32 w + i."""
    import torch

    queries, count = conditions.shape
    words = -(-count // WORD_NBITS)
    padded = torch.zeros(queries, words * WORD_NBITS, dtype=torch.int64, device=conditions.device)
    padded[:, :count] = conditions
    values = (padded.unflatten(1, (words, WORD_NBITS)) << torch.arange(WORD_NBITS, device=conditions.device)).sum(2)
    return torch.where(values < 2**31, values, values - 2**32).to(torch.int32)


def check_variant(what: str, variant: Variant, bits: Any, queries: int, causal: bool) -> None:
    """Raise a TilusError where a variant does not fit the call of the function `what`."""
    if variant.window is not None and not causal:
        raise TilusError(
            f"{what}: window={variant.window} and causal=False, expected causal=True", hint="write a mask for it"
        )
    if bits is not None and (bits.ndim != 2 or bits.shape[0] != queries or not 1 <= bits.shape[1] <= MOST_WORDS):
        raise TilusError(
            f"{what}: bits of shape {list(bits.shape)}, expected [{queries}, 1 to {MOST_WORDS} words]",
            hint="tilus.kernels.attention_variant.pack_bits makes them of booleans",
        )


def _check_given(is_given: bool, use: str, argument: str, example: str, variant: Variant) -> None:
    """Raise at the user's function where the call lacks the tensor that it uses."""
    if not is_given:
        function = variant.mask or variant.logits or variant.sink
        raise TilusError(
            f"{use} of an attention variant, but the call has no {argument}",
            loc=None if function is None else _defined_at(function),
            hint=f"pass {argument}={example}",
        )


def _check_signature(what: str, function: Callable[..., Any], expected: tuple[str, ...]) -> None:
    if not callable(function):
        raise TilusError(
            f"the {what} of an attention variant is {function!r}, expected a function {what}({', '.join(expected)})"
        )
    try:
        inspect.signature(function).bind(*expected)
    except TypeError as error:
        wanted = ", ".join(expected)
        raise TilusError(
            f"the {what} of an attention variant is {_name(function)}{inspect.signature(function)}, expected {what}({wanted})",
            loc=_defined_at(function),
            hint=f"{error}; parameters with defaults may follow",
        ) from None


def _defined_at(function: Callable[..., Any]) -> Loc | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else Loc(code.co_filename, code.co_firstlineno)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
