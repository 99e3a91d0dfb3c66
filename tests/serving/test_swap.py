"""Pages that go to the host and come back are what they were, in whatever order steps and copies follow each other.

The steps here write a number of their own to all pages of their items, on a GPU late: whoever does not wait for a copy, or copies
before the steps in front of it have ended, is found out.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core import Batch, BatchItem, PageCopy, SamplingParams
from serving.swap import PageSwapper

PAGES, HOST_PAGES, NBYTES = 6, 5, 64
copies = st.builds(PageCopy, st.integers(0, PAGES - 1), st.integers(0, HOST_PAGES - 1), st.booleans())
steps = st.lists(st.tuples(st.lists(copies, max_size=4), st.sets(st.integers(0, PAGES - 1), max_size=3)), max_size=12)


def run(device: torch.device, steps: list[tuple[list[PageCopy], set[int]]], nbytes: int, delay: int = 0) -> None:
    memory = torch.zeros((PAGES, nbytes), dtype=torch.uint8, device=device)
    swapper = PageSwapper(SimpleNamespace(memory=memory, shape=SimpleNamespace(nbytes=nbytes)), HOST_PAGES)
    swapper.memory.zero_()
    cache, host = [0] * PAGES, [0] * HOST_PAGES
    for number, (wanted, written) in enumerate(steps, 1):
        items = tuple(BatchItem(str(page), (1,), 0, (page,), SamplingParams(), 0) for page in written)
        swapper.begin(Batch(items, tuple(wanted)))
        if delay:
            torch.cuda._sleep(delay)
        for page in written:
            memory[page] = number
        for copy in wanted:
            if copy.to_host:
                host[copy.host_page] = cache[copy.page]
            else:
                cache[copy.page] = host[copy.host_page]
        for page in written:
            cache[page] = number
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert memory.cpu().tolist() == [[number] * nbytes for number in cache]
    assert swapper.memory.tolist() == [[number] * nbytes for number in host]


@given(steps)
def test_on_the_cpu(steps: list[tuple[list[PageCopy], set[int]]]) -> None:
    run(torch.device("cpu"), steps, NBYTES)


@pytest.mark.gpu
@given(steps)
@settings(max_examples=200)
def test_on_a_gpu_beside_steps(steps: list[tuple[list[PageCopy], set[int]]]) -> None:
    """Steps that take 10 us before they write, so that copies have time to be too early or too late."""
    run(torch.device("cuda"), steps, 2**16, delay=20_000)


def test_measuring_leaves_the_pages_as_they_are() -> None:
    memory = torch.arange(PAGES * NBYTES, dtype=torch.int64).to(torch.uint8).view(PAGES, NBYTES)
    swapper = PageSwapper(SimpleNamespace(memory=memory.clone(), shape=SimpleNamespace(nbytes=NBYTES)), HOST_PAGES)
    assert swapper.seconds_a_page() > 0
    assert torch.equal(swapper._pages, memory)
