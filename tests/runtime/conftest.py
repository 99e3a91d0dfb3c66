"""A process that runs the CUDA path against the stub driver."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from libcuda_stub import build


@pytest.fixture(scope="session")
def in_stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Runs a function of a test module, with picklable arguments, in a process whose libcuda.so.1 is the stub."""
    directory = build(tmp_path_factory.mktemp("stub"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(directory))  # the loader reads it when a process starts
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()
