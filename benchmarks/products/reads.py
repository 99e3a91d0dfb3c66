"""A read of as many bytes as a weight has, the floor for small batches: nothing is faster than reading its operands once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import tilus
from products.timing import Timer
from tilus import Const, Tensor, int32

BLOCKS = (4096, 8192, 16384)  # words that a block reads; the fastest counts

MOST_NBYTES = 1 << 32  # the elements of a tensor are counted by 32-bit numbers


@tilus.kernel
def read(x: Tensor[int32, "n"], sums: Tensor[int32, "blocks"], *, block: Const, dependent: Const = False):
    """One sum per block, so that every byte must arrive. dependent: starts, and reads, while the one before it still runs."""
    tilus.grid(sums.shape[0], warps=8)
    if dependent:
        tilus.launch_dependents()
    tile = tilus.load(x, [tilus.block_id(0) * block], shape=[block])
    total = tilus.reshape(tilus.sum(tile, axis=0), [1])
    if dependent:
        tilus.wait_dependencies(constant=[x])
    tilus.store(sums, [tilus.block_id(0)], total)


class Reads:
    """Times of reading, measured once for each size."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._found: dict[int, tuple[float, float]] = {}

    def us(self, nbytes: int) -> tuple[float, float]:
        """Microseconds of a read of `nbytes`: of a kernel that takes part in dependent launch, and of one that does not.

        More than MOST_NBYTES are taken to be read at the speed of so many.
        """
        size = min(nbytes, MOST_NBYTES)
        if size not in self._found:
            self._found[size] = self._measured(size)
        dependent, plain = (round(us * (nbytes / size), 3) for us in self._found[size])
        return dependent, plain

    def _measured(self, nbytes: int) -> tuple[float, float]:
        count = -(-nbytes // 16) * 4  # whole vectors, so that every copy is aligned
        shape = (self._timer.copies(nbytes), count)
        buffers = list(torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda"))
        dependent, plain = (
            min(self._of_blocks(buffers, block, dependent) for block in BLOCKS) for dependent in (True, False)
        )
        return dependent, plain

    def _of_blocks(self, buffers: Sequence[torch.Tensor], block: int, dependent: bool) -> float:
        sums = torch.zeros(-(-buffers[0].numel() // block), dtype=torch.int32, device=buffers[0].device)
        read(buffers[0], sums, block=block, dependent=dependent)
        if int(sums.sum(dtype=torch.int32)) != int(buffers[0].sum(dtype=torch.int32)):
            raise SystemExit(
                f"the read of {buffers[0].nbytes} bytes missed some (blocks of {block} words, {dependent=})"
            )
        return self._timer.us([lambda x=x: read(x, sums, block=block, dependent=dependent) for x in buffers])
