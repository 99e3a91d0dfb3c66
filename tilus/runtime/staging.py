"""Numpy arguments for a GPU: copy to the device, run, copy back."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from tilus.runtime import cuda


@dataclass(frozen=True)
class _Span:
    """Host bytes [start, end)."""

    start: int
    end: int


def _first_element(array: npt.NDArray[Any]) -> int:
    return array.__array_interface__["data"][0]


def span_of(array: npt.NDArray[Any]) -> tuple[int, int]:
    """The host addresses [start, end) that the elements of `array` lie between, whatever its strides."""
    start = _first_element(array)
    if array.size == 0:
        return (start, start)
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides)]
    low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach)
    return (start + low, start + high + array.itemsize)


@contextmanager
def staged(arrays: Sequence[npt.NDArray[Any]], stream: int = 0) -> Generator[list[int]]:
    """Device addresses that stand for `arrays` inside the `with` block, in the same order.

    Strides stay valid (the bytes between the elements travel too) and arrays that share memory share it on the device.
    Copies go through `stream`, where the kernels must run too. At the end the writeable arrays are copied back and the
    stream is synchronised; after an exception nothing is copied back.
    """
    spans = [span_of(array) for array in arrays]
    merged = _merge([span for span in spans if span[0] < span[1]])
    allocations = dict.fromkeys(merged, 0)
    try:
        for span in merged:
            allocations[span] = int(cuda.call("cuMemAlloc", span.end - span.start))
            cuda.call("cuMemcpyHtoDAsync", allocations[span], span.start, span.end - span.start, stream)
        yield [_device_address(_first_element(array), allocations) for array in arrays]
        for array, (start, end) in zip(arrays, spans):
            if array.flags.writeable and start < end:
                cuda.call("cuMemcpyDtoHAsync", start, _device_address(start, allocations), end - start, stream)
        cuda.synchronize(stream)
    finally:
        for address in allocations.values():
            if address:
                cuda.call("cuMemFree", address)


def _merge(spans: Sequence[tuple[int, int]]) -> list[_Span]:
    """The union of the spans as disjoint ones, ascending."""
    merged: list[_Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1].end:
            merged[-1] = _Span(merged[-1].start, max(end, merged[-1].end))
        else:
            merged.append(_Span(start, end))
    return merged


def _device_address(host: int, allocations: dict[_Span, int]) -> int:
    """Where the byte at host address `host` is on the device; 0 for the address of an empty array."""
    for span, address in allocations.items():
        if span.start <= host < span.end:
            return address + host - span.start
    return 0
