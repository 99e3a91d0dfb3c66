"""A model on several devices (`--tp`): one process each, which compute every step together.

The first process is the server; it sends each batch to the others before it runs it itself. All sample the same tokens from the
same logits, so that nothing has to be sent back. Sums of the devices' parts are torch.distributed's: NCCL on GPUs, where they are
captured with the steps, gloo on CPUs. When one of the processes ends, all do.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from serving.config import ServerConfig
from serving.core import Batch, Runner, StepOutput
from serving.shards import Share
from tilus.errors import TilusError

_START_TIMEOUT = timedelta(minutes=10)  # of a device that waits for the others, whose weights may take longer
_STOP_TIMEOUT = 10.0  # seconds


class Group:
    """This process among those that hold a model together."""

    def __init__(self, share: Share, device: torch.device, meeting: Path) -> None:
        self.share = share
        self._device = device
        self._releases: list[Callable[[], None]] = []
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{meeting}", rank=share.index,
            world_size=share.count, timeout=_START_TIMEOUT, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip

    def sum(self, part: Tensor) -> Tensor:
        """In place, the sum of all processes' parts; the same bits in each."""
        dist.all_reduce(part)
        return part

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        numbers = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
        return int(numbers)

    def before_leaving(self, release: Callable[[], None]) -> None:
        """Have `release` called when this process leaves. NCCL does not part while there are graphs that captured its sums."""
        self._releases.append(release)

    def leave(self) -> bool:
        """Part from the others, all of which have to leave; whether that came to an end in time."""

        def part() -> None:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            for release in self._releases:
                release()
            dist.destroy_process_group()

        parting = threading.Thread(target=part, daemon=True, name="leave ranks")
        parting.start()
        parting.join(_STOP_TIMEOUT)
        return not parting.is_alive()


class Sender(Protocol):
    """The end of a connection to another process."""

    def send(self, obj: Batch, /) -> None: ...


class ParallelRunner:
    """The server's runner: every batch runs in all processes."""

    def __init__(self, local: Runner, others: Sequence[Sender]) -> None:
        self._local = local
        self._others = others

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        for other in self._others:
            other.send(batch)
        return self._local.launch(batch)


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process, the first, and the connections to the others."""

    group: Group
    others: Sequence[Sender]


Work = Callable[[ServerConfig, Group], Runner]


@contextmanager
def ranks(config: ServerConfig, device: torch.device, work: Work) -> Generator[Ranks]:
    """Start the other processes, and end them with the block. work: makes the runner of a process; importable by name.

    Raises: TilusError for fewer GPUs than `config.tp`.
    """
    if device.type == "cuda" and torch.cuda.device_count() < config.tp:
        raise TilusError(
            f"--tp {config.tp} needs {config.tp} GPUs, but torch finds {torch.cuda.device_count()}",
            hint="CUDA_VISIBLE_DEVICES may hide some",
        )
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with tempfile.TemporaryDirectory() as directory:
        meeting = Path(directory) / "meeting"
        ends = [context.Pipe(duplex=False) for _ in range(1, config.tp)]
        processes = [
            context.Process(
                target=_work, args=(config, index, meeting, receiver, work), daemon=True, name=f"rank {index}"
            )
            for index, (receiver, _) in enumerate(ends, start=1)
        ]
        for process in processes:
            process.start()
        for receiver, _ in ends:
            receiver.close()
        stopping, left = threading.Event(), True
        threading.Thread(target=_watch, args=(processes, stopping), daemon=True, name="watch ranks").start()
        group = Group(Share(0, config.tp), _device_of(device, 0), meeting)
        try:
            yield Ranks(group, [sender for _, sender in ends])
        finally:
            stopping.set()
            for _, sender in ends:
                sender.close()  # their loops end, and they leave
            left = group.leave()
            for process in processes:
                process.join(_STOP_TIMEOUT if left else 0)
                process.kill()
        if not left:  # what is stuck in NCCL would keep this process, too
            _end("the processes of --tp did not part in time; the server ends all the same")


def _device_of(device: torch.device, index: int) -> torch.device:
    if device.type != "cuda":
        return device
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _work(config: ServerConfig, index: int, meeting: Path, batches: Connection, work: Work) -> None:
    """Another process: runs each batch that comes, until the server closes the connection or is no more."""
    from serving.execution import choose_execution

    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach all processes, but the server ends this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    execution = choose_execution(config.device)
    if execution.device.type == "cpu":
        torch.set_num_threads(1)
    group = Group(Share(index, config.tp), _device_of(execution.device, index), meeting)
    with redirect_stderr(io.StringIO()):  # the server says the same
        runner = work(config, group)
    while True:
        try:
            batch: Batch = batches.recv()
        except EOFError:
            break
        runner.launch(batch)  # nothing waits for its tokens here: the next step finds them on the device
    group.leave()
    os._exit(0)


def _end_with_parent() -> None:
    """A process that waits for another one's part of a sum would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)


def _watch(processes: list[multiprocessing.Process], stopping: threading.Event) -> None:
    wait([process.sentinel for process in processes])
    if not stopping.is_set():
        _end("a process of --tp ended; the server ends too")


def _end(why: str) -> None:
    """Of this process, without waiting for anything."""
    print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(1)
