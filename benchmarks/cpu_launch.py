"""Host time of one launch of a kernel on the CPU: `python benchmarks/cpu_launch.py [--out FILE]`.

The kernel has eight arguments and blocks of next to no work. A pause is time in which Python does something else between two
launches: short ones find the workers spinning, long ones have to wake them.

Output, as JSON:
    processor, compiler, threads    of this machine, and how many of its CPUs may be used
    launches     launches a case
    cases        list of {threads, blocks, pause_us, min_us, median_us}: microseconds a launch
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from pathlib import Path

from tilus.dtypes import int64
from tilus.ir.expr import Var
from tilus.runtime.cpu import build, pool, threads, toolchain

LAUNCHES = 3000
ARGUMENTS = 8
MAX_BLOCKS = 64
PAUSES_US = (0, 20, 60, 1000)
SOURCE = """
#include <stdint.h>
void tilus_blocks(const uint64_t *args, const int32_t *grid, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) ((volatile int64_t *)args[0])[block] = args[7];
}
"""


def measure(num_threads: int, blocks: int, pause_us: int) -> dict[str, float]:
    parameters = [Var(f"x{index}", int64) for index in range(ARGUMENTS)]
    launch = pool.Launcher("store", build.load(SOURCE), parameters, num_threads).launch
    memory = (ctypes.c_int64 * MAX_BLOCKS)()
    values = [ctypes.addressof(memory)] * ARGUMENTS
    times_us: list[float] = []
    for _ in range(LAUNCHES):
        end = time.perf_counter() + pause_us * 1e-6
        while time.perf_counter() < end:
            pass
        start = time.perf_counter_ns()
        launch(blocks, 1, 1, *values)
        times_us.append((time.perf_counter_ns() - start) / 1e3)
    rounded = {"min_us": round(min(times_us), 2), "median_us": round(statistics.median(times_us), 2)}
    return {"threads": num_threads, "blocks": blocks, "pause_us": pause_us, **rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of a launch on the CPU.")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of printing it")
    out: Path | None = parser.parse_args().out
    count = threads.num_threads()
    cases = [measure(1, MAX_BLOCKS, 0), *(measure(count, MAX_BLOCKS, pause_us) for pause_us in PAUSES_US)]
    compiler = toolchain.find_compiler().version
    result = {"processor": platform.processor() or platform.machine(), "compiler": compiler, "threads": count}
    text = json.dumps({**result, "launches": LAUNCHES, "cases": cases}, indent=2)
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
