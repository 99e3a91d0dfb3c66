"""A hostile emulator: executes the PTX text of a kernel on numpy and reports what real hardware would hide.

Memory starts as poison, accesses outside a buffer raise, asynchronous copies land at their wait, races and missing
barriers are detected, warps run in random order. It shares no code with what it checks: fragment maps and instruction
meanings come from the PTX ISA text.
"""

from tilus.runtime.emulator.arguments import Argument
from tilus.runtime.emulator.errors import DeadlockError, EmulatorError, RaceError
from tilus.runtime.emulator.run import Result, run_kernel
from tilus.runtime.emulator.stats import AccessStats, Stats
from tilus.runtime.emulator.tensor_map import TensorMap

__all__ = [
    "AccessStats", "Argument", "DeadlockError", "EmulatorError", "RaceError", "Result", "Stats", "TensorMap", "run_kernel",
]  # fmt: skip
