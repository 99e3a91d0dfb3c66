"""The pool runs each block exactly once, whoever launches, forks or is late; and what a launch passes."""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from cpu_programs import COUNTING, kernel, python
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tilus.dtypes import bf16, boolean, f16, f32, int8, int64, uint8, uint64
from tilus.errors import TilusError
from tilus.ir.expr import Var
from tilus.runtime.cpu import build, pool
from tilus.runtime.cpu.pool import Launcher

POINTER = Var("x", int64)
SEEING = kernel(
    "int32_t *seen = (int32_t *)args[0] + 4 * block;"
    "seen[0] += 1; seen[1] = grid[0]; seen[2] = grid[1]; seen[3] = grid[2];"
)
# Waits until blocks run on two threads at a time, for 20 s at most.
MEETING = kernel(
    "atomic_int *present = (atomic_int *)args[0]; atomic_fetch_add(present, 1);"
    "for (time_t end = time(0) + 20; atomic_load(present) < 2 && time(0) < end;) sched_yield();",
    "#include <sched.h>\n#include <stdatomic.h>\n#include <time.h>",
)
# On threads other than the caller's, uses 48 MB of stack.
DEEP = kernel(
    "atomic_int *deep = (atomic_int *)args[0];"
    "if (pthread_self() == args[1]) { for (time_t end = time(0) + 20; !atomic_load(deep) && time(0) < end;) sched_yield(); }"
    "else { volatile char *stack = alloca(48 << 20); for (int i = 0; i < 48 << 20; i += 4096) stack[i] = 1;"
    "  atomic_fetch_add(deep, 1); }",
    "#include <alloca.h>\n#include <pthread.h>\n#include <sched.h>\n#include <stdatomic.h>\n#include <time.h>",
)
# Sleeps for args[1] microseconds in each block.
SLOW = kernel("usleep(args[1]); ((int64_t *)args[0])[block] += 1;", "#include <unistd.h>")


def launcher(source: str, num_threads: int, parameters: Sequence[Var] = (POINTER,)) -> Launcher:
    return Launcher("k", build.load(source), parameters, num_threads)


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.integers(0, 40)] * 3), st.integers(1, 9))
@example((1, 1, 1), 9)
@example((40, 40, 40), 2)
def test_each_block_runs_once_and_knows_the_grid(grid: tuple[int, int, int], num_threads: int) -> None:
    count = math.prod(grid)
    seen = np.zeros((count + 1, 4), np.int32)
    launcher(SEEING, num_threads).launch(*grid, seen.ctypes.data)
    assert (seen[:count] == (1, *grid)).all()
    assert (seen[count] == 0).all()


def test_blocks_run_at_once() -> None:
    present = np.zeros(1, np.int32)
    launcher(MEETING, 2).launch(2, 1, 1, present.ctypes.data)
    assert present[0] == 2


def test_one_thread_runs_all_in_order_on_the_calling_thread() -> None:
    order = kernel(
        "int64_t *o = (int64_t *)args[0]; o[0] += block == o[0] && pthread_self() == args[1];", "#include <pthread.h>"
    )
    for num_threads, count in ((1, 1000), (8, 1)):
        seen = np.zeros(1, np.int64)
        launcher(order, num_threads, [POINTER] * 2).launch(count, 1, 1, seen.ctypes.data, threading.get_ident())
        assert seen[0] == count


def test_workers_have_deep_stacks() -> None:
    deep = np.zeros(1, np.int32)
    launcher(DEEP, 2, [POINTER] * 2).launch(2, 1, 1, deep.ctypes.data, threading.get_ident())
    assert deep[0] >= 1


def test_python_goes_on_meanwhile() -> None:
    """A launch holds no lock of Python: this thread counts while another one waits for its kernel."""
    counts = np.zeros(2, np.int64)
    slow = launcher(SLOW, 2, [POINTER] * 2)
    thread = threading.Thread(target=slow.launch, args=(2, 1, 1, counts.ctypes.data, 300_000))
    thread.start()
    steps = 0
    while thread.is_alive():
        steps += 1
    assert steps > 1000 and (counts == 1).all()


def test_prepared_launches_run_in_order_and_python_goes_on_meanwhile() -> None:
    """Each launch finds what the one before it has left, though its first block is quick and its last one slow."""
    next_step = kernel(
        "atomic_long *steps = (atomic_long *)args[0]; if (block) usleep(2000);"
        "if (atomic_load(steps) / 4 == args[1]) atomic_fetch_add(steps, 1);",
        "#include <stdatomic.h>\n#include <unistd.h>",
    )
    steps, step = np.zeros(1, np.int64), launcher(next_step, 3, [POINTER] * 2)
    launches = []
    for index in range(50):
        steps[0] = 4 * index
        step.launch(4, 1, 1, steps.ctypes.data, index)
        launches.append(step.last_launch())
    steps[0] = 0
    thread = threading.Thread(target=pool.run_all(launches))
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
    assert steps[0] == 4 * 50 and turns > 1000


# Blocks that run on other threads than the caller's end after args[2] microseconds, those of the caller at once.
LATE = kernel(
    "if (pthread_self() != args[1]) usleep(args[2]); ((int64_t *)args[0])[block] += 1;",
    "#include <pthread.h>\n#include <unistd.h>",
)
# Leaves the id of the thread that runs it.
NAMED = kernel(
    "((uint64_t *)args[0])[block] = pthread_self(); usleep(100);", "#include <pthread.h>\n#include <unistd.h>"
)


@pytest.mark.parametrize("late_us", [5, 50_000])  # the caller spins, the caller sleeps
def test_the_caller_waits_for_the_last_block(late_us: int) -> None:
    late = launcher(LATE, 3, [POINTER] * 3)
    for _ in range(5):
        counts = np.zeros(64, np.int64)
        late.launch(64, 1, 1, counts.ctypes.data, threading.get_ident(), late_us)
        assert (counts == 1).all()


@pytest.mark.parametrize("num_threads", [4, 2, 3])
def test_no_more_threads_than_asked_for(num_threads: int) -> None:
    """Also when an earlier launch, a moment ago, had more."""
    few, many = launcher(NAMED, num_threads), launcher(NAMED, 6)
    for _ in range(20):
        threads = np.zeros(100, np.uint64)
        many.launch(100, 1, 1, threads.ctypes.data)
        few.launch(100, 1, 1, threads.ctypes.data)
        assert 1 <= len(np.unique(threads)) <= num_threads


def test_launches_from_many_threads_do_not_mix() -> None:
    """Of one launcher, whose buffers are by thread, and with different numbers of threads and blocks."""
    shared = launcher(COUNTING, 3)
    failures: list[int] = []

    def launches(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            mine = shared if rng.integers(2) else launcher(COUNTING, int(rng.integers(1, 6)))
            counts, blocks = np.zeros(300, np.int64), int(rng.integers(0, 300))
            mine.launch(blocks, 1, 1, counts.ctypes.data)
            if not ((counts[:blocks] == 1).all() and (counts[blocks:] == 0).all()):
                failures.append(seed)

    running = [threading.Thread(target=launches, args=(seed,)) for seed in range(5)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert failures == [] and not any(thread.is_alive() for thread in running)


FORKS = """
import os, threading, time, warnings
import numpy as np
from cpu_programs import COUNTING
from test_cpu_pool import SLOW, POINTER, launcher
warnings.simplefilter("ignore")  # Python's own, about forks and threads

def check(num_threads=4):
    counts = np.zeros(500, np.int64)
    launcher(COUNTING, num_threads).launch(500, 1, 1, counts.ctypes.data)
    assert (counts == 1).all()

def forked(depth):
    child = os.fork()
    if child == 0:
        try:
            check(); check(6)
            if depth: forked(depth - 1)
            os._exit(0)
        finally:
            os._exit(1)
    for _ in range(3000):
        found, status = os.waitpid(child, os.WNOHANG)
        if found: break
        time.sleep(0.01)
    else:
        os.kill(child, 9); raise SystemExit("the child hangs")
    assert status == 0

forked(0)      # before there are threads
check()
forked(2)      # with idle ones
time.sleep(0.01)
forked(0)      # with sleeping ones
counts = np.zeros(8, np.int64)
slow = threading.Thread(target=launcher(SLOW, 2, [POINTER] * 2).launch, args=(8, 1, 1, counts.ctypes.data, 200_000))
slow.start()
time.sleep(0.1)
forked(1)      # during a launch
assert slow.is_alive()
check()
slow.join()
assert (counts == 1).all()
print("done")
"""


def test_forked_children_launch_too() -> None:
    assert python(FORKS) == "done\n"


def test_where_no_thread_can_be_started_the_caller_does_it_all() -> None:
    program = (
        "import resource\nimport numpy as np\nfrom cpu_programs import COUNTING\nfrom test_cpu_pool import launcher\n"
        "k = launcher(COUNTING, 8)\n"
        "used = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)  # one stack fits\n"
        "for _ in range(3):\n"
        "    counts = np.zeros(500, np.int64); k.launch(500, 1, 1, counts.ctypes.data); assert (counts == 1).all()\n"
        "print(len(list(__import__('os').scandir('/proc/self/task'))))"
    )
    assert int(python(program)) <= 3  # the caller, one worker, and none of numpy's


def test_more_threads_than_the_machine_has() -> None:
    counts = np.zeros(3000, np.int64)
    launcher(COUNTING, 64).launch(3000, 1, 1, counts.ctypes.data)
    assert (counts == 1).all()


COPYING = kernel("for (int i = 0; i < 8; i++) ((uint64_t *)args[0])[i] = args[i];")
VALUES = st.tuples(
    st.floats(allow_nan=False, width=32),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    st.integers(-128, 127),
    st.integers(0, 255),
    st.floats(-100, 100),
)


@given(VALUES)
def test_every_type_arrives_in_its_slot(values: tuple[float, int, int, bool, int, int, float]) -> None:
    dtypes = [f32, int64, uint64, boolean, int8, uint8, bf16]
    parameters = [POINTER, *(Var(str(dtype), dtype) for dtype in dtypes)]
    slots = np.zeros(8, np.uint64)
    launcher(COPYING, 1, parameters).launch(1, 1, 1, slots.ctypes.data, *values)
    assert struct.unpack("=Qdq", slots[:3].tobytes()) == (slots.ctypes.data, *values[:2])
    assert struct.unpack("=Qqqqd", slots[3:].tobytes()) == values[2:]


@pytest.mark.parametrize(
    ("grid", "values", "message"),
    [
        ((1, 1, 1), (0,), "kernel 'k' got 1 arguments, expected 2"),
        ((1, 1, 1), (2**63, 1.0), "argument x of kernel 'k' is 9.*, expected a value of int64"),
        ((1, 1, 1), (0, "a"), "argument a of kernel 'k' is 'a', expected a value of f16"),
        ((1, 1, 1), (0, 10**400), "argument a of kernel 'k' is 1000.*, expected a value of f16"),
        ((2**31, 1, 1), (0, 1), r"grid of kernel 'k' is \(2147483648, 1, 1\), expected 0 to 2147483647"),
    ],
)
def test_what_does_not_fit_is_named(grid: tuple[int, int, int], values: tuple[object, ...], message: str) -> None:
    with pytest.raises(TilusError, match=message):
        launcher(COUNTING, 1, [POINTER, Var("a", f16)]).launch(*grid, *values)


def test_the_pool_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool.library() is pool.library()
    assert isinstance(pool.library(), ctypes.CDLL)
