"""Programs for the command line, and ways to call it."""

from __future__ import annotations

from click.testing import CliRunner, Result

from tilus.cli import main

KERNELS = """\
import sys

import tilus
from tilus import Const, Tensor, f16, f32

LENGTH = len(sys.argv)  # 1: the command line of `tilus` is not this file's


@tilus.kernel
def axpy(x: Tensor[f32, "n"], y: Tensor[f32, "n"], a: f32, *, block: Const = 1024):
    tilus.grid(tilus.cdiv(x.shape[0], block), warps=4)
    i = tilus.block_id(0) * block
    xs = tilus.load(x, [i], shape=[block])
    tilus.store(y, [i], a * xs + tilus.load(y, [i], shape=[block]))


@tilus.kernel
def widen(x: Tensor["t", "n"], y: Tensor[f32, "n"], *, layout: Const = None):
    tilus.grid(1, warps=1)
    tilus.store(y, [0], tilus.cast(tilus.load(x, [0], shape=[256], layout=layout), f32))
"""
ONE_KERNEL = """\
import tilus
from tilus import Tensor, f16, f32


@tilus.kernel
def square(a: Tensor[f16, "n", "n"], c: Tensor[f32, "n", "n"]):
    tilus.grid(1, warps=4)
    s = tilus.shared(f16, [64, 64])
    tilus.store_shared(s, tilus.load(a, [0, 0], shape=[64, 64]))
    tilus.sync()
    tile = tilus.load_shared(s)
    tilus.store(c, [0, 0], tilus.dot(tile, tilus.load_shared(s), tilus.zeros([64, 64], f32)))
"""


def tilus_(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def output_of(*args: object) -> str:
    result = tilus_(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal_of(*args: object, exit_code: int = 1) -> str:
    result = tilus_(*args)
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    return result.stderr
