"""Recording the kernel launches of a block of Python, to run them again without Python in between."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tilus.errors import TilusError

if TYPE_CHECKING:
    from tilus.runtime.launch_times import Run


class LaunchGraph:
    """Launches on CPU arrays, in the order in which `tilus.capture` recorded them. `len` counts them.

    It keeps all arrays that were arguments, so that their memory is used by nobody else. A launch reads and writes the memory
    that its arrays had when it was recorded, with the scalars and the grid that it had then.
    """

    def __init__(self) -> None:
        self._launches: list[ctypes.Array[ctypes.c_char]] = []
        self._arguments: list[Sequence[Any]] = []
        self._run_all: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._launches)

    def replay(self) -> None:
        """Run all launches again, each when the one before it is done; returns when all are. Other Python threads run meanwhile.

        Any thread may do it; two at once write to the same arrays. Raises: TilusError for a record that is not complete, since
        its block has not ended or has failed, and inside of a capture.
        """
        if _thread.graph is not None:
            raise TilusError(
                "a replay inside of tilus.capture() cannot be recorded",
                hint="launch the kernels, or replay after the block",
            )
        if self._run_all is None:
            raise TilusError(
                "nothing to replay: the block of tilus.capture() has not ended, or it has failed",
                hint="call replay() after the with statement",
            )
        self._run_all()

    def record(self, launch: ctypes.Array[ctypes.c_char], arguments: Sequence[Any]) -> None:
        """Append a launch, as prepared for the pool of threads. arguments: its tensors."""
        self._launches.append(launch)
        self._arguments.append(arguments)

    def complete(self) -> None:
        """Nothing more is recorded: `replay` may be called."""
        from tilus.runtime.cpu.pool import run_all

        self._run_all = run_all(self._launches)

    def discard(self) -> None:
        """Forget all launches and their arguments."""
        self._launches.clear()
        self._arguments.clear()


class _Thread(threading.local):
    """The graph that this thread records into."""

    graph: LaunchGraph | None = None


_thread = _Thread()


def graph_in_capture() -> LaunchGraph | None:
    """What launches of this thread are recorded in, None outside of a capture."""
    return _thread.graph


@contextmanager
def capture() -> Generator[LaunchGraph]:
    """Run the kernel launches of a `with` block and record them, to `replay` them with one call::

        with tilus.capture() as graph:
            scale(x, y)
            add(y, z, out)
        x[:] = 1
        graph.replay()

    Only launches of the calling thread on the device `cpu` are recorded. Whatever else the block does, such as operations of
    torch or numpy on the arrays, is not repeated. An exception that leaves the block discards the record.

    Raises: TilusError inside of another capture; and at a launch on another device than `cpu`.
    """
    if _thread.graph is not None:
        raise TilusError("tilus.capture() inside of tilus.capture()", hint="end one capture before the next one begins")
    graph = _thread.graph = LaunchGraph()
    try:
        yield graph
    except BaseException:
        graph.discard()
        raise
    finally:
        _thread.graph = None
    graph.complete()


def refused_in_capture(kernel: str, device: str, run: Run) -> Run:
    """The same launch, which is an error inside of a capture."""
    hint = (
        "torch.cuda.graph captures launches on a GPU"
        if device == "cuda"
        else "launch outside of the capture, or on the device cpu: it needs a C compiler, which tilus doctor looks for"
    )

    def run_or_refuse(pointers: Sequence[int], scalars: Sequence[Any], tensors: Sequence[Any]) -> None:
        if _thread.graph is not None:
            raise TilusError(f"{kernel}: a launch on the device {device} cannot be captured, expected cpu", hint=hint)
        run(pointers, scalars, tensors)

    return run_or_refuse
