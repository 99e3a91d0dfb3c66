"""Where the bits of packed codes stand: an offline permutation of the bits of each chunk of words.

A natural string of codes is little-endian: bit j of code i is bit i * nbits + j. A packed string permutes those bits within
chunks of whole words, such that a cast finds the fields of two codes at equal places of the two 16-bit lanes of a word
(see cast_search). It has exactly as many bits. Packer, unpacker and cast share one `CodeOrder`, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType
from tilus.errors import TilusError


@dataclass(frozen=True)
class CodeOrder:
    """A permutation of the bits of a chunk of codes; position p of the packed string holds natural bit `bits[p]`.

    dtype: of the codes, 1 to 8 bits. bits: a permutation of range(chunk * nbits), a whole number of 32-bit words.
    """

    dtype: DataType
    bits: tuple[int, ...]

    @property
    def chunk(self) -> int:
        """Codes that are permuted together."""
        return len(self.bits) // self.dtype.nbits

    @property
    def num_words(self) -> int:
        """32-bit words of a chunk."""
        return len(self.bits) // 32

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The inverse: natural bit b of a chunk stands at position `places[b]`."""
        found = [0] * len(self.bits)
        for position, bit in enumerate(self.bits):
            found[bit] = position
        return tuple(found)

    def place(self, code: int, bit: int) -> int:
        """The position in the packed string of one bit of one code, in any chunk."""
        chunk, inside = divmod(code, self.chunk)
        return chunk * len(self.bits) + self.places[inside * self.dtype.nbits + bit]

    @cached_property
    def _partners(self) -> tuple[tuple[int, int], ...]:
        alike: dict[tuple[int, ...], list[int]] = {}
        for code in range(self.chunk):
            alike.setdefault(tuple(self.place(code, bit) % 16 for bit in range(self.dtype.nbits)), []).append(code)
        found = [(code, code) for code in range(self.chunk)]
        for codes in alike.values():
            for low, high in zip(codes[::2], codes[1::2], strict=False):
                found[low] = found[high] = low, high
        return tuple(found)

    def partner(self, code: int) -> tuple[int, int]:
        """This code and another whose bits have the same places in their half-words, in ascending order; or twice this one."""
        base = code - code % self.chunk
        low, high = self._partners[code % self.chunk]
        return base + low, base + high

    def __str__(self) -> str:
        """Each word from its top bit down, as runs `code.bits`: `c3[2:0]` are bits 2 to 0 of code 3."""
        words = []
        for word in range(self.num_words):
            runs = [run for run in self._runs if run[2] == word]
            runs.sort(key=lambda run: -run[3])
            words.append(" ".join(f"c{code}[{low + n - 1}:{low}]" if n > 1 else f"c{code}[{low}]"
                                  for code, low, _, _, n in runs))  # fmt: skip
        return "\n".join(f"w{word}: {text}" for word, text in enumerate(words))

    @cached_property
    def _runs(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """(code, its low bit, word, position in it, length): neighbours that stay neighbours, in the order of codes."""
        return tuple(_runs(self.places, self.dtype.nbits))

    def pack(self, codes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Codes as packed bytes.

        codes: [..., count] uint8, count a multiple of `chunk`. Returns: [..., count * nbits / 8] bytes.
        Raises: TilusError when the chunk does not divide the count, or a code does not fit.
        """
        *lead, count = codes.shape
        self._check_count(count)
        if codes.size and int(codes.max()) >= self.dtype.num_codes:
            raise TilusError(
                f"code {int(codes.max())} does not fit {self.dtype}, expected less than {self.dtype.num_codes}",
                hint="unpack packed bytes first",
            )
        columns = np.moveaxis(codes.reshape(*lead, count // self.chunk, self.chunk), -1, 0).astype(np.uint32)
        words = np.zeros((self.num_words, *columns.shape[1:]), np.dtype("<u4"))
        for code, low, word, position, length in self._runs:
            words[word] |= (columns[code] >> np.uint32(low) & np.uint32((1 << length) - 1)) << np.uint32(position)
        packed = np.ascontiguousarray(np.moveaxis(words, 0, -1))
        return packed.view(np.uint8).reshape(*lead, count * self.dtype.nbits // 8)

    def unpack(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The inverse of `pack`: [..., nbytes] bytes, whole chunks, as codes [..., nbytes * 8 / nbits]."""
        *lead, nbytes = data.shape
        count = nbytes * 8 // self.dtype.nbits
        self._check_count(count)
        words = np.ascontiguousarray(data).view(np.dtype("<u4")).reshape(*lead, count // self.chunk, self.num_words)
        columns = np.ascontiguousarray(np.moveaxis(words, -1, 0))
        codes = np.zeros((self.chunk, *columns.shape[1:]), np.uint8)
        for code, low, word, position, length in self._runs:
            field = columns[word] >> np.uint32(position) & np.uint32((1 << length) - 1)
            codes[code] |= (field << np.uint32(low)).astype(np.uint8)
        return np.ascontiguousarray(np.moveaxis(codes, 0, -1)).reshape(*lead, count)

    def _check_count(self, count: int) -> None:
        if count % self.chunk:
            raise TilusError(
                f"{count} codes of {self.dtype} cannot be packed, expected a multiple of {self.chunk}",
                hint=f"pad each thread's codes to whole chunks of {self.num_words} words",
            )


def _runs(places: tuple[int, ...], nbits: int) -> Iterator[tuple[int, int, int, int, int]]:
    for code in range(len(places) // nbits):
        start = 0
        for bit in range(1, nbits + 1):
            here = places[code * nbits + start]
            joined = bit < nbits and places[code * nbits + bit] == here + bit - start and (here + bit - start) % 32
            if not joined:
                yield code, start, here // 32, here % 32, bit - start
                start = bit


@lru_cache
def natural_order(dtype: DataType) -> CodeOrder:
    """The little-endian bit string, as whole words."""
    chunk = 1
    while chunk * dtype.nbits % 32:
        chunk += 1
    return CodeOrder(dtype, tuple(range(chunk * dtype.nbits)))
