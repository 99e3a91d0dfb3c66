"""Time of layout inference over the size of a kernel: `python benchmarks/inference.py [--out FILE]`.

The kernels are generated: stages of loads, casts, arithmetic, broadcasts, transposes, reductions, products, loop variables,
pinned layouts and stores, so that all layout rules take part and some tiles have to be converted.

Output, as JSON:
    python, processor   version and host
    samples             runs a case; the shortest counts, because everything that disturbs a run makes it longer
    cases               list of {instructions, inference_s, evaluations, pipeline_s}: instructions of the kernel; processor
                        seconds of `infer_layouts`; how often it asked a rule, in all rounds; processor seconds of all passes,
                        with the verifier after each
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

from tilus.dtypes import f16, f32, int32, int64, uint4
from tilus.instructions.cast import Cast
from tilus.instructions.convert import Convert
from tilus.instructions.elementwise import BinaryTile
from tilus.instructions.fill import Full
from tilus.instructions.memory import LoadGlobal, StoreGlobal
from tilus.instructions.mma import Dot
from tilus.instructions.reduce import Reduce
from tilus.instructions.view import Assign, Permute, Reshape
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import Var, as_expr
from tilus.ir.function import Function, TensorParam
from tilus.ir.stmt import For
from tilus.ir.tensor import GlobalTensor
from tilus.ir.visit import seq
from tilus.layout import auto
from tilus.target import get_target
from tilus.transforms import run_pipeline
from tilus.transforms.infer_layouts import infer_layouts, rounds, uses

SIZES = (100, 300, 1000, 3000)
STAGE = 20  # instructions of `stage`
SIDE, WARPS = 64, 4


def kernel(count: int) -> Function:
    """A kernel of about `count` instructions: half of them straight, half in a loop."""
    b = IRBuilder()
    shape = (as_expr(SIDE), as_expr(SIDE))
    strides = (as_expr(SIDE), as_expr(1))
    x, w, y = (
        GlobalTensor(dtype, shape, strides, Var(name, int64), name=name)
        for name, dtype in (("x", f16), ("w", uint4), ("y", f32))
    )
    stages = max(2, count // STAGE)
    total = b.tile(f32, (SIDE, SIDE), name="total", mutable=True)
    b.emit(Assign(total, b.emit(Full(b.tile(f32, (SIDE, SIDE)), as_expr(0.0))).out))
    with b.block() as body:
        for _ in range(stages // 2):
            stage(b, x, w, y, total)
    for _ in range(stages - stages // 2):
        stage(b, x, w, y, total)
    b.append(For(Var("i", int32), as_expr(0), as_expr(4), 1, seq(*body)))
    store(b, y, total)
    return Function("generated", tuple(TensorParam(t.name, t) for t in (x, w, y)), (as_expr(1),), WARPS, b.body())


def stage(b: IRBuilder, x: GlobalTensor, w: GlobalTensor, y: GlobalTensor, total: Any) -> None:
    """Twenty instructions that join x and w in a product and add what becomes of it to `total`."""
    square, zero = (SIDE, SIDE), (as_expr(0), as_expr(0))
    rows = b.emit(LoadGlobal(b.tile(f16, square), x, zero, (0, 1))).out
    codes = b.emit(LoadGlobal(b.tile(uint4, square), w, zero, (0, 1))).out
    weights = b.emit(Cast(b.tile(f16, square), codes)).out
    shift = b.emit(Full(b.tile(f16, (1, 1)), as_expr(8.0))).out
    centred = b.emit(BinaryTile(b.tile(f16, square), "-", weights, shift)).out
    turned = b.emit(Permute(b.tile(f16, square), centred, (1, 0))).out
    start = b.emit(Full(b.tile(f32, square), as_expr(0.0))).out
    product = b.emit(Dot(b.tile(f32, square), rows, turned, start)).out
    highest = b.emit(Reduce(b.tile(f32, (SIDE,)), product, (1,), "max")).out
    column = b.emit(Reshape(b.tile(f32, (SIDE, 1)), highest)).out
    shifted = b.emit(BinaryTile(b.tile(f32, square), "-", product, column)).out
    pinned = b.emit(Convert(b.tile(f32, square, auto(square, 32 * WARPS, 4)), shifted)).out
    bias = b.emit(LoadGlobal(b.tile(f16, (SIDE,)), x, zero, (1,))).out
    wide = b.emit(Cast(b.tile(f32, (SIDE,)), bias)).out
    biased = b.emit(BinaryTile(b.tile(f32, square), "+", pinned, wide)).out
    doubled = b.emit(BinaryTile(b.tile(f32, square), "+", biased, biased)).out
    added = b.emit(BinaryTile(b.tile(f32, square), "+", total, doubled)).out
    b.emit(Assign(total, added))
    store(b, y, doubled)
    store(b, y, product)


def store(b: IRBuilder, y: GlobalTensor, tile: Any) -> None:
    b.emit(StoreGlobal(y, tile, (as_expr(0), as_expr(0)), (0, 1)))


def shortest(samples: int, run: Any) -> float:
    times: list[float] = []
    for _ in range(samples):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def evaluations(function: Function) -> int:
    """How often `infer_layouts` asks a rule for its ways, in all rounds."""
    return sum(inference.evaluations for inference in rounds(uses(function)))


def measure(sizes: tuple[int, ...], samples: int) -> dict[str, Any]:
    target = get_target("sm_90a")
    cases: list[dict[str, Any]] = []
    for size in sizes:
        function = kernel(size)
        prepared = run_pipeline(function, target, after="accumulate_in_place")
        cases.append(
            {
                "instructions": len(uses(prepared)),
                "inference_s": round(shortest(samples, lambda f=prepared: infer_layouts(f, target)), 4),
                "evaluations": evaluations(prepared),
                "pipeline_s": round(shortest(samples, lambda f=function: run_pipeline(f, target)), 4),
            }
        )
    return {
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "samples": samples,
        "cases": cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to the terminal")
    parser.add_argument("--samples", type=int, default=5, help="runs a case (default 5)")
    options = parser.parse_args()
    text = json.dumps(measure(SIZES, options.samples), indent=2)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
