"""The bits of floats do not depend on what a C compiler makes of a kernel: what is rounded, and when, is written in its C."""

from __future__ import annotations

import linecache
from typing import Any

import numpy as np
import pytest

import tilus

ELEMENTWISE = """from __future__ import annotations
from tilus import Const, Tensor
from tilus.dtypes import f16, f32
@tilus.kernel
def elementwise(x: Tensor[f32, 3, "n"], y: Tensor[f32, 7, "n"], *, block: Const):
    tilus.grid(tilus.cdiv(x.shape[1], block), warps=4)
    i = tilus.block_id(0) * block
    a, b, c = (tilus.load(x, [row, i], [block]) for row in range(3))
    sums = (a * b + c, c - a * b, a * b - b * c, a + b * b * c)
    for index, tile in enumerate((*sums, tilus.exp(a) * b + c, tilus.log2(tilus.maximum(a, -a)) - b * c, tilus.fma(a, b, c))):
        tilus.store(y, [index, i], tile)
"""
PRODUCTS = """from __future__ import annotations
from tilus import Const, Tensor
from tilus.dtypes import f16, f32
@tilus.kernel
def products(x: Tensor[f32, "m", "k"], w: Tensor[f16, "a", "b"], y: Tensor[f32, "m", "n"], s: Tensor[f32, "m"], *, tile: Const):
    tilus.grid(1, warps=4)
    m, n, k, rows = tile
    a = tilus.load(x, [0, 0], [m, k])
    b = tilus.load(w, [0, 0], [n, k]).transpose() if rows else tilus.load(w, [0, 0], [k, n])
    tilus.store(y, [0, 0], tilus.dot(a.to(f16), b) * 3.0 + tilus.sum(a * a, axis=1, keepdims=True))
    tilus.store(s, [0], tilus.sum(tilus.exp(a * 0.5 - tilus.max(a, axis=1, keepdims=True)), axis=1))
"""
FLAGS = ("-O0", "-O3")


def compiled(name: str, text: str, flags: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kernel of its own, so that none is found that other flags made."""
    filename = f"<{name} {flags}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    names: dict[str, Any] = {"tilus": tilus}
    exec(compile(text, filename, "exec", dont_inherit=True), names)
    monkeypatch.setenv("TILUS_CFLAGS", flags)
    return names[name].on("cpu")


def test_elementwise(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(1).standard_normal((3, 4099)).astype(np.float32)
    found = list[np.ndarray]()
    for flags in FLAGS:
        y = np.zeros((7, x.shape[1]), np.float32)
        compiled("elementwise", ELEMENTWISE, flags, monkeypatch)(x, y, block=256)
        found.append(y.view(np.int32))
    for flags, y in zip(FLAGS, found, strict=True):
        np.testing.assert_array_equal(y, found[0], err_msg=flags)
    a, b, c = x
    np.testing.assert_array_equal(found[0][0].view(np.float32), a * b + c, err_msg="rounded twice, as numpy does")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("shape", [(16, 32, 64), (64, 8, 128), (16, 8, 16), (32, 64, 48)])
def test_products(shape: tuple[int, int, int], rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulators along columns, along rows and along k; sums of squares and of exponentials."""
    m, n, k = shape
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((n, k)).astype(np.float16)
    found = list[tuple[np.ndarray, np.ndarray]]()
    for flags in FLAGS:
        y, s = np.zeros((m, n), np.float32), np.zeros(m, np.float32)
        kernel = compiled("products", PRODUCTS, flags, monkeypatch)
        kernel(x, w if rows else np.ascontiguousarray(w.T), y, s, tile=(*shape, rows))
        found.append((y, s))
    for flags, (y, s) in zip(FLAGS, found, strict=True):
        np.testing.assert_array_equal(y, found[0][0], err_msg=flags)
        np.testing.assert_array_equal(s, found[0][1], err_msg=flags)
    products = x.astype(np.float16).astype(np.float64) @ w.T.astype(np.float64)
    exact = products * 3 + (x.astype(np.float64) ** 2).sum(1, keepdims=True)
    np.testing.assert_allclose(found[0][0], exact, rtol=1e-5, atol=1e-4)
