"""Time of the operations of the layout algebra on the layouts of the kernel library: `python benchmarks/layout.py [--out FILE]`.

The layouts are those of all tiles and shared buffers of the library's kernels after all passes (typical specialisations,
target sm_90a), the fragments that instructions prescribe, and the usual arrangements of shared tiles. Each operation is timed
call by call, on new objects (no cached property) and without cached normal forms, so that nothing is left out that a
compiler would pay. The machine should be otherwise idle.

Output, as JSON:
    python, processor     versions and host
    method                how a time was taken, in words
    repeats               timed calls of each operation on each layout (or pair), of which the median counts
    register_layouts, memory_layouts     how many different ones
    cases                 list of {kind, operation, samples, median_us, p90_us}: over the layouts (or pairs), in
                          microseconds a call. kind: "register" or "memory".
    operations:
    construct     from shape and digits, checked and canonical
    product       a tile of two elements in each dimension, times the layout
    divide        by each fragment of its rank (register), by that tile and by itself (memory); found or refused
    left_divide   of a product by its outer factor
    equal         with a layout built anew, and with a neighbour in the list
    hash          of the layout, for a dictionary
    reshape       to one dimension
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from tilus import f16, int8, uint4
from tilus.ir.tensor import RegisterTensor, SharedTensor
from tilus.ir.visit import instructions
from tilus.kernels.activation import gated_kernel
from tilus.kernels.attention import paged_attention_kernel
from tilus.kernels.embedding import dense_embedding_kernel, quantized_embedding_kernel
from tilus.kernels.linear import quantized_linear
from tilus.kernels.norm import rms_norm_kernel
from tilus.kernels.rope import rope_append_kernel
from tilus.lang.kernel import Kernel
from tilus.layout import (
    LayoutError,
    RegisterLayout,
    SharedLayout,
    atoms,
    column_major,
    local,
    padded,
    row_major,
    swizzled,
)
from tilus.layout.normal_form import normal_form
from tilus.target import get_target
from tilus.transforms import run_pipeline

ATTENTION = {"dtype": f16, "unit": f16, "out_dtype": f16, "page_size": 16, "stages": 2}
PLAN = {"rows": 1, "warps": 4, "stages": 1, "blocks_per_sm": 1}
LINEAR = {"act": f16, "out": f16, "bias_type": f16, "scale_dtype": f16, "span": 128, **PLAN}
LIBRARY: list[tuple[Kernel, dict[str, Any]]] = [
    (gated_kernel, {"dtype": f16}),
    (dense_embedding_kernel, {"dtype": f16}),
    (quantized_embedding_kernel, {"dtype": f16, "code": int8, "group": 32}),
    (rms_norm_kernel, {"dtype": f16, "out_dtype": f16, "hidden": 768}),
    (
        rope_append_kernel,
        {"act": f16, "dtype": f16, "head_dim": 64, "q_heads": 3, "kv_heads": 3, "page_size": 16},
    ),
    (paged_attention_kernel, {**ATTENTION, "group": 3, "head_dim": 64, "rows": 16, "kv_tile": 64}),
    (paged_attention_kernel, {**ATTENTION, "group": 4, "head_dim": 128, "rows": 64, "kv_tile": 64}),
    (quantized_linear, {**LINEAR, "wdtype": uint4, "tokens": 16}),
    (quantized_linear, {**LINEAR, "wdtype": uint4, "tokens": 32}),
]


def library_layouts() -> tuple[list[RegisterLayout], list[SharedLayout]]:
    """All different layouts of the library's kernels and of the fragments, in a fixed order."""
    registers: dict[RegisterLayout, None] = dict.fromkeys(fragments())
    memory: dict[SharedLayout, None] = dict.fromkeys(arrangements())
    for kernel, values in LIBRARY:
        function = run_pipeline(kernel.ir(**values), get_target("sm_90a"))
        for stmt in instructions(function.body):
            for tensor in (*stmt.inst.operands, *stmt.inst.results):
                if isinstance(tensor, RegisterTensor) and tensor.layout is not None:
                    registers[tensor.layout] = None
                if isinstance(tensor, SharedTensor) and tensor.layout is not None:
                    memory[tensor.layout] = None
    return list(registers), list(memory)


def fragments() -> list[RegisterLayout]:
    by_width = [make(nbits) for nbits in (8, 16) for make in (atoms.mma_a, atoms.mma_b, atoms.ldmatrix)]
    return [*by_width, atoms.mma_c(), atoms.ldmatrix_trans(), atoms.wgmma_d(128)]


def arrangements() -> list[SharedLayout]:
    """What shared tiles of 16-bit elements usually have, also with rows that are no power of two."""
    found: list[SharedLayout] = []
    for shape in ((64, 32), (64, 64), (128, 128), (64, 96), (48, 80)):
        tile = swizzled(shape, 2)
        found += [row_major(shape), column_major(shape), padded(shape, 8), tile, tile.stages(3)]
    return found


def attempt(call: Callable[[], object]) -> Callable[[], object]:
    """The call; a refusal is a result like any other."""

    def run() -> object:
        try:
            return call()
        except LayoutError as error:
            return error

    return run


Case = tuple[str, Callable[[], Callable[[], object]]]


def cases(layout: Any, neighbour: Any, twos: Any, parts: list[Any]) -> Iterator[Case]:
    """Operations on one layout; each prepares new objects and gives back the call to time."""

    def new(model: Any) -> Any:
        return replace(model)

    yield "construct", lambda: lambda: replace(layout)
    yield "product", lambda: (lambda outer, inner: lambda: outer * inner)(new(twos), new(layout))
    for part in parts:
        yield "divide", lambda part=part: (lambda whole, by: lambda: whole.try_divide(by))(new(layout), new(part))
    yield "left_divide", lambda: (lambda whole, by: lambda: whole.left_divide(by))(new(twos * layout), new(twos))
    yield "equal", lambda: (lambda a, b: lambda: a == b)(new(layout), new(layout))
    yield "equal", lambda: (lambda a, b: lambda: a == b)(new(layout), new(neighbour))
    yield "hash", lambda: (lambda a: lambda: hash(a))(new(layout))
    yield "reshape", lambda: (lambda a: attempt(lambda: a.reshape((prod(a.shape),))))(new(layout))


def median_us(prepare: Callable[[], Callable[[], object]], repeats: int) -> float:
    found: list[int] = []
    for _ in range(repeats):
        call = prepare()
        normal_form.cache_clear()
        start = time.perf_counter_ns()
        call()
        found.append(time.perf_counter_ns() - start)
    return statistics.median(found) / 1000


def measure(repeats: int) -> dict[str, Any]:
    registers, memory = library_layouts()
    times: dict[tuple[str, str], list[float]] = {}
    for layout, neighbour in zip(registers, [*registers[1:], registers[0]]):
        parts = [part for part in fragments() if part.rank == layout.rank]
        for name, prepare in cases(layout, neighbour, local(*(2,) * layout.rank), parts):
            times.setdefault(("register", name), []).append(median_us(prepare, repeats))
    for tile, neighbour in zip(memory, [*memory[1:], memory[0]]):
        twos = row_major((2,) * tile.rank)
        for name, prepare in cases(tile, neighbour, twos, [twos, tile]):
            times.setdefault(("memory", name), []).append(median_us(prepare, repeats))
    return {
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "method": "median of single calls on new objects, without cached properties and normal forms",
        "repeats": repeats,
        "register_layouts": len(registers),
        "memory_layouts": len(memory),
        "cases": [
            {
                "kind": kind,
                "operation": name,
                "samples": len(found),
                "median_us": round(statistics.median(found), 2),
                "p90_us": round(sorted(found)[int(0.9 * len(found))], 2),
            }
            for (kind, name), found in times.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to the terminal")
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed calls of each operation on a layout (default 20)"
    )
    options = parser.parse_args()
    text = json.dumps(measure(options.repeats), indent=2)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
