"""The blocks of a cluster, one at a time: each runs until it waits for another one (see `roles`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tilus.errors import TilusError
from tilus.runtime.reference.roles import Turn, run_side_by_side
from tilus.runtime.reference.state import BlockState


class Cluster:
    """Blocks that see each other's memory, by rank, and the barrier of all of them.

    running: how many have not ended. arrived: how many of them have come to the barrier. phase: how often it was complete.
    """

    def __init__(self, blocks: Sequence[BlockState]) -> None:
        self._blocks = blocks
        self._running = len(blocks)
        self._arrived = 0
        self._phase = 0

    def block(self, rank: int) -> BlockState:
        """Raises: TilusError when the cluster has no such block."""
        if not 0 <= rank < len(self._blocks):
            raise TilusError(
                f"block {rank} of a cluster of {len(self._blocks)} blocks, expected 0 to {len(self._blocks) - 1}"
            )
        return self._blocks[rank]

    def sync(self, turn: Turn) -> None:
        """Wait for all blocks that have not ended."""
        phase = self._phase
        self._arrived += 1
        self._advance()
        turn.wait(
            lambda: self._phase > phase,
            lambda: f"waits for the blocks of its cluster, of which {self._arrived} of {self._running} have come",
        )

    def run(self, body: Callable[[BlockState], None]) -> None:
        """Run all blocks to their ends."""
        turns = [(f"block {rank}", partial(self._run, block, body)) for rank, block in enumerate(self._blocks)]
        run_side_by_side(turns, who="blocks of a cluster")

    def _run(self, block: BlockState, body: Callable[[BlockState], None], turn: Turn) -> None:
        block.cluster, block.turn = self, turn
        body(block)
        self._running -= 1
        self._advance()

    def _advance(self) -> None:
        if self._arrived == self._running:
            self._arrived = 0
            self._phase += 1
