"""Cold compile time of the quantised linear kernel, and of `import tilus`: `python benchmarks/compile_time.py [--out FILE]`.

Each sample is a new process, so nothing is imported, specialised or cached before; the disk cache is not used.

Output, as JSON:
    python, processor, assembler    versions and host
    samples       processes a case
    import_s      median seconds of `import tilus`
    cases         list of {dtype, target, library_s, frontend_s, passes_s, codegen_s, ptxas_s, total_s}: median seconds.
                  library_s: importing the kernel library (numpy included). frontend_s: Python source to IR. passes_s: all passes,
                  the verifier after each. codegen_s: IR to PTX text. ptxas_s: PTX text to machine code.
                  total_s: front end to cubin, which is the sum of the four stages after library_s.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DTYPES = ("uint4", "int3", "float6_e3m2")
TARGETS = ("sm_90a", "sm_80")
STAGES = ("frontend_s", "passes_s", "codegen_s", "ptxas_s")


def one_compile(dtype: str, target_name: str) -> dict[str, float]:
    """Seconds of each stage in this process, which must be a new one."""
    marks = [time.perf_counter()]

    def mark() -> None:
        marks.append(time.perf_counter())

    import tilus

    mark()
    from tilus.kernels.linear import quantized_linear

    mark()
    types = {"act": tilus.f16, "out": tilus.f16, "bias_type": tilus.f16, "wdtype": getattr(tilus, dtype)}
    plan = {"tokens": 16, "rows": 1, "warps": 4, "stages": 1, "blocks_per_sm": 1}
    function = quantized_linear.ir(**types, scale_dtype=tilus.f16, span=128, **plan)
    mark()
    from tilus.target import get_target
    from tilus.transforms import run_pipeline

    target = get_target(target_name)
    placed = run_pipeline(function, target)
    mark()
    from tilus.codegen.lower import lower
    from tilus.ptx.printer import print_module

    ptx = print_module(lower(placed, target).module)
    mark()
    from tilus.ptx.assembler import assemble

    assemble(ptx, target, allow_spills=True)
    mark()
    names = ("import_s", "library_s", *STAGES)
    return {name: after - before for name, before, after in zip(names, marks[:-1], marks[1:], strict=True)}


def in_new_process(dtype: str, target: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", dtype, target]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(samples: int) -> dict[str, Any]:
    from tilus.ptx.assembler import find_assembler

    imports: list[float] = []
    cases: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for target in TARGETS:
            times = [in_new_process(dtype, target) for _ in range(samples)]
            imports += [sample["import_s"] for sample in times]
            for sample in times:
                sample["total_s"] = sum(sample[stage] for stage in STAGES)
            medians = {
                name: round(statistics.median(sample[name] for sample in times), 4)
                for name in ("library_s", *STAGES, "total_s")
            }
            cases.append({"dtype": dtype, "target": target, **medians})
    return {
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "assembler": find_assembler().version,
        "samples": samples,
        "import_s": round(statistics.median(imports), 4),
        "cases": cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to the terminal")
    parser.add_argument("--samples", type=int, default=7, help="processes a case (default 7)")
    parser.add_argument("--child", nargs=2, metavar=("DTYPE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(one_compile(*options.child)))
        return
    text = json.dumps(measure(options.samples), indent=2)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
