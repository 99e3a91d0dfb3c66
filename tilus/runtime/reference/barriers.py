"""Barriers in shared memory, as numbers: which phase each one is in, and what it still waits for."""

from __future__ import annotations

from dataclasses import dataclass

from tilus.errors import TilusError
from tilus.ir.tensor import SharedTensor


@dataclass
class Barrier:
    """One barrier of a block. phase: how many phases are complete. pending: groups that must still arrive in the open one.
    nbytes: that are announced and have not landed; copies that land before they are announced make it negative."""

    arrivals: int
    phase: int = 0
    pending: int = 0
    nbytes: int = 0

    def __post_init__(self) -> None:
        self.pending = self.arrivals

    def arrive(self, count: int, nbytes: int) -> None:
        if count > self.pending:
            raise TilusError(
                f"arrives at a barrier that waits for {self.pending} of {self.arrivals} arrivals in its phase {self.phase}, "
                f"expected no more than those",
                hint="wait for the phase before arriving again, or make the barrier with more arrivals",
            )
        self.pending -= count
        self.nbytes += nbytes
        self._advance()

    def land(self, nbytes: int) -> None:
        """Bytes of an asynchronous copy are there."""
        self.nbytes -= nbytes
        self._advance()

    def is_complete(self, parity: int) -> bool:
        """Whether the phase of this parity is over: the open one has the other parity."""
        return self.phase % 2 != parity

    def __str__(self) -> str:
        copies = f" and {self.nbytes} bytes" if self.nbytes else ""
        return f"phase {self.phase} lacks {self.pending} of {self.arrivals} arrivals{copies}"

    def _advance(self) -> None:
        if self.pending == 0 and self.nbytes == 0:
            self.phase += 1
            self.pending = self.arrivals


class Barriers:
    """The barriers of a block."""

    def __init__(self) -> None:
        self._made: dict[SharedTensor, list[Barrier]] = {}

    def make(self, tensor: SharedTensor, arrivals: int) -> None:
        self._made[tensor] = [Barrier(arrivals) for _ in range(tensor.shape[0])]

    def at(self, tensor: SharedTensor, index: int) -> Barrier:
        """The barrier at an index.

        Raises: TilusError when there is none.
        """
        made = self._made.get(tensor)
        if made is None:
            raise TilusError(
                f"{tensor.name} is no barrier", hint="make it with tilus.mbarrier(stages) before the roles"
            )
        if not 0 <= index < len(made):
            raise TilusError(f"barrier {tensor.name}[{index}], expected an index from 0 to {len(made) - 1}")
        return made[index]
