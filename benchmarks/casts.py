"""What casts cost: instructions a value for every code type and result type: `python benchmarks/casts.py [--out FILE]`.

Output, as JSON:
    assembler     version of ptxas
    casts         list of {target, src, dst, natural, packed, scaled, scale_exponent, machine}, instructions a value:
                  natural: PTX instructions without `mov`, from little-endian codes to results in their order. packed: from packed
                  codes (packed for bf16 where that is the result, otherwise for f16). scaled: the same with a power of two,
                  2^scale_exponent, left to the caller; null where `dst` is no 16-bit float. machine: instructions of the machine
                  code for the last of these that is there, in a loop that loads, casts and stores 32 codes a thread: all but
                  memory accesses, addresses, the loop and register moves; only for f16 and bf16 on the last target.
    original      list of {src, instructions}: to f16 by the generic path of the original Tilus, see `original_cost`
    search        list of {src, order_ms, plan_ms}: processor time to find a packed order, and the plan from it to f16
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tilus
from tilus import Const, Tensor, uint8
from tilus.codegen.cast_plan import plan_cast
from tilus.codegen.images import images
from tilus.codegen.packed_order import lane_choice, packed_order
from tilus.compiler import compile_function
from tilus.dtypes import DTYPES, DataType, bf16, f16, f32, float8_e4m3
from tilus.layout import spatial
from tilus.ptx.assembler import assemble, find_assembler
from tilus.ptx.sass import disassemble
from tilus.target import TARGETS, Target

CODES = [dtype for dtype in DTYPES.values() if dtype.is_small]
RESULTS = (f16, bf16, f32, float8_e4m3)
SLOTS = 32
TARGET_NAMES = ("sm_80", "sm_90a")
# Loops, addresses and moves. The disassembler writes some moves of constants as CS2R or as an HFMA2.MMA of zeros.
OTHERS = (
    "LDG", "STG", "BRA", "ISETP", "UISETP", "PLOP3", "LEA", "ULEA", "IADD3", "UIADD3", "VIADD", "NOP", "S2R", "CS2R", "MOV",
    "UMOV", "IMAD.MOV", "IMAD.WIDE", "IMAD.X", "IMAD.IADD", "HFMA2.MMA",
)  # fmt: skip


def row_layout(nbytes: int):
    return spatial(32, 1).local(1, nbytes)


@tilus.kernel
def cast_loop(
    packed: Tensor[uint8, "n", "nbytes"],
    out: Tensor["dst", "n", SLOTS],
    *,
    code: Const,
):
    tilus.grid(1, warps=1)
    nbytes = SLOTS * code.nbits // 8
    for i in tilus.range(0, out.shape[0], 32):
        raw = tilus.load(packed, [i, 0], [32, nbytes], layout=row_layout(nbytes))
        shape = [32, SLOTS]
        values = tilus.unpack_codes(raw, code, out.dtype, shape, row_layout(SLOTS), packed_for=out.dtype, scaled=True)
        tilus.store(out, [i, 0], values)


def machine_cost(code: DataType, dst: DataType, target: Target) -> float:
    """Machine instructions a value of the scaled cast, from the disassembly of the loop."""
    cubin = assemble(compile_function(cast_loop.ir(dst=dst, code=code), target).ptx, target).cubin
    (kernel,) = disassemble(cubin)
    return sum(not is_other(i.opcode) for i in kernel.innermost_loop()) / SLOTS


def is_other(opcode: str) -> bool:
    """Whether an instruction belongs to the loop and not to the cast. A plain IMAD multiplies strides."""
    return opcode == "IMAD" or opcode.startswith(OTHERS)


def original_cost(src: DataType) -> float:
    """Instructions a value to f16 in the original's open version, from the description of its generic path.

    4-bit integers and 8-bit integers and float8_e4m3 have methods of their own. Other unsigned integers: shift and mask for each
    value (again with an `or` where a field crosses a byte), then per pair a merge, an `or` and a subtraction. All else goes value
    by value through f32: shift and mask; for integers a conversion, for floats shift, mask and merge of sign and magnitude; a
    multiplication; and half a conversion to f16.
    """
    fixed = {"uint8": 1.0, "int8": 1.25, "uint4": 13 / 8, "int4": 14 / 8, "float8_e4m3": 5 / 2}
    if src.name in fixed:
        return fixed[src.name]
    if src.is_integer and not src.is_signed:
        starts = [i * src.nbits % 8 for i in range(8)]
        crossing = sum(start + src.nbits > 8 for start in starts) / 8
        return 2 + 2 * crossing + 3 / 2
    return 2 + (1 if src.is_integer else 3) + 1 + 0.5


def cast_row(src: DataType, dst: DataType, target: Target, machine: bool) -> dict[str, Any]:
    order = packed_order(src, dst if dst == bf16 else f16)
    scaled = plan_cast(src, dst, target, order=order, scaled=True) if dst in (f16, bf16) else None
    return {
        "target": target.name,
        "src": src.name,
        "dst": dst.name,
        "natural": plan_cast(src, dst, target).cost,
        "packed": plan_cast(src, dst, target, order=order).cost,
        "scaled": scaled.cost if scaled else None,
        "scale_exponent": scaled.scale_exponent if scaled else 0,
        "machine": machine_cost(src, dst, target) if machine and scaled else None,
    }


def search_row(src: DataType) -> dict[str, Any]:
    """Both with empty caches, which hold what types have in common, too."""
    for cached in (packed_order, images, lane_choice):
        cached.cache_clear()
    start = time.process_time()
    order = packed_order(src)
    found = time.process_time()
    plan_cast.__wrapped__(src, f16, TARGETS["sm_90a"], order=order)
    return {
        "src": src.name,
        "order_ms": round((found - start) * 1e3, 1),
        "plan_ms": round((time.process_time() - found) * 1e3, 1),
    }


def measure(codes: Sequence[DataType], machine: bool) -> dict[str, Any]:
    search = [search_row(src) for src in codes]
    rows = [
        cast_row(src, dst, TARGETS[name], machine and name == TARGET_NAMES[-1])
        for name, src, dst in itertools.product(TARGET_NAMES, codes, RESULTS)
        if src != dst
    ]
    return {
        "assembler": find_assembler().version if machine else None,
        "casts": rows,
        "original": [{"src": src.name, "instructions": original_cost(src)} for src in codes],
        "search": search,
    }


def table(results: dict[str, Any]) -> str:
    """The casts on the newest target as Markdown."""
    rows = {(row["src"], row["dst"]): row for row in results["casts"] if row["target"] == TARGET_NAMES[-1]}
    original = {row["src"]: row["instructions"] for row in results["original"]}
    lines = ["| codes | f16 | machine | plain | natural | original | bf16 | plain | f32 | e4m3 |", "|---|" + "---|" * 9]
    for src in original:
        half, brain, single, small = (rows.get((src, dst.name)) for dst in RESULTS)
        cells = [
            half["scaled"],
            half["machine"],
            half["packed"],
            half["natural"],
            original[src],
            brain["scaled"],
            brain["packed"],
        ]
        cells += [single["packed"], small["packed"] if small else None]
        lines.append(f"| {src} | " + " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to the terminal")
    parser.add_argument("--table", action="store_true", help="print the table of docs/casts.md, too")
    options = parser.parse_args()
    results = measure(CODES, machine=True)
    text = json.dumps(results, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    else:
        print(text)
    if options.table:
        print(table(results))


if __name__ == "__main__":
    main()
