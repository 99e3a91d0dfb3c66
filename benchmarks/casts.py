"""What casts cost: instructions a value for every code type and result type: `python benchmarks/casts.py [--out FILE]`.

Output, as JSON:
    assembler     version of ptxas
    targets       list of {target, casts}
    casts         list of {src, dst, natural, packed, scaled, scale_exponent, sass}:
                  natural, packed: PTX instructions a value without `mov`, from little-endian codes in the order of the results, and
                  from packed codes. scaled: the same with a power of two, 2^scale_exponent, left to the caller; only f16, bf16.
                  sass: machine instructions a value of the scaled cast (of the packed one where there is none): what of a loop
                  that loads, casts and stores 32 codes a thread is neither memory access nor address nor loop.
    search_ms     seconds spent to find the packed order of a type, and the plan to f16: list of {src, order_ms, plan_ms}
    original      list of {src, instructions}: the generic path of the original Tilus to f16, see `original_cost`
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import tilus
from tilus import Const, Tensor, uint8
from tilus.codegen.cast_plan import plan_cast, plan_unpack
from tilus.codegen.packed_order import packed_order
from tilus.compiler import compile_function
from tilus.dtypes import DTYPES, DataType, bf16, f16, f32, float8_e4m3
from tilus.layout import local, spatial
from tilus.ptx.assembler import assemble, find_assembler
from tilus.ptx.sass import disassemble
from tilus.target import TARGETS, Target

CODES = [dtype for dtype in DTYPES.values() if dtype.is_small]
RESULTS = (f16, bf16, f32, float8_e4m3)
SLOTS = 32
ADDRESSES = ("LDG", "STG", "IADD3", "ISETP", "BRA", "LEA", "IMAD.WIDE", "IMAD.X", "UIADD3", "UISETP", "ULEA", "NOP", "PLOP3", "VIADD")


def row_layout(nbytes: int):
    return spatial(32, 1).local(1, nbytes)


@tilus.kernel
def cast_loop(
    packed: Tensor[uint8, "n", "nbytes"],
    out: Tensor["dst", "n", SLOTS],
    *,
    code: Const,
    scaled: Const,
):
    tilus.grid(1, warps=1)
    nbytes = SLOTS * code.nbits // 8
    for i in tilus.range(0, out.shape[0], 32):
        raw = tilus.load(packed, [i, 0], [32, nbytes], layout=row_layout(nbytes))
        shape = [32, SLOTS]
        values = tilus.unpack_codes(raw, code, out.dtype, shape, row_layout(SLOTS), scaled=scaled)
        tilus.store(out, [i, 0], values)


def machine_cost(code: DataType, dst: DataType, target: Target, scaled: bool) -> float:
    """Machine instructions a value, from the disassembly of the loop."""
    function = cast_loop.ir(dst=dst, code=code, scaled=scaled)
    cubin = assemble(compile_function(function, target).ptx, target).cubin
    (kernel,) = disassemble(cubin)
    own = [i.opcode for i in kernel.innermost_loop() if not i.opcode.startswith(ADDRESSES)]
    return len(own) / SLOTS


def main():
    for code in (tilus.uint4, tilus.int3, tilus.float6_e3m2, tilus.float8_e4m3):
        for dst in (f16, bf16):
            function = cast_loop.ir(dst=dst, code=code, scaled=True)
            target = TARGETS["sm_90a"]
            cubin = assemble(compile_function(function, target).ptx, target).cubin
            (kernel,) = disassemble(cubin)
            loop = kernel.innermost_loop()
            from collections import Counter
            print(code, dst, plan_cast(code,dst,target,order=packed_order(code),scaled=True).cost, Counter(".".join(i.opcode.split(".")[:2]) for i in loop))

main()
