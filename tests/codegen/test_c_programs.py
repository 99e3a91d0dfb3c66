"""What C makes of random kernels is what the reference makes of them, although C computes tiles as late as it can."""

from __future__ import annotations

import linecache

import numpy as np
import pytest
from c_programs import BLOCKS, SIDE, VARIABLES, Program

import tilus


def check(seed: int) -> None:
    text = Program(seed).text()
    filename = f"<program {seed}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    names = {"tilus": tilus}
    exec(compile(text, filename, "exec", dont_inherit=True), names)
    results: list[list[np.ndarray]] = []
    for device in ("reference", "cpu"):
        data = np.random.default_rng(seed)
        x, y = (data.integers(0, 97, shape).astype(np.int32) for shape in ((3, 24, 24), (BLOCKS, SIDE, SIDE)))
        counts, out = np.zeros((20, 20), np.int32), np.full((BLOCKS, len(VARIABLES), SIDE, SIDE), -1, np.int32)
        names["program"].on(device)(x, y, counts, out)
        results.append([y, counts, out])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=text)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 10 else pytest.mark.exhaustive) for n in range(25)])
def test_programs(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_c")
@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n < 26 else pytest.mark.exhaustive) for n in range(25, 50)]
)
def test_more_programs(seed: int) -> None:
    check(seed)
