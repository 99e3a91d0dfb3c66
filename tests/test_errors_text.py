"""The whole texts of mistakes that the compiler finds behind the front end: layouts, shared memory, instructions, targets, tools.

Mistakes in Python syntax and in arguments are in tests/lang, those of the command line in tests/test_cli.py, a missing driver
is in tests/runtime/test_cuda_stub.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tilus
from tilus.compiler import compile_function
from tilus.lang.kernel_file import load_kernel
from tilus.target import get_target

HEAD = """\
import tilus
from tilus import Tensor, bf16, f16, f32, int32, uint4
from tilus.layout import local, padded, row_major, spatial


@tilus.kernel
def kernel(x: Tensor[f16, "m", "k"], y: Tensor[f32, "m", "k"], w: Tensor[uint4, "m", "k"]):
    tilus.grid(1, warps=1)
"""

# Body of the kernel -> the error when it is compiled for sm_80; FILE stands for the file's path.
REFUSED = {
    "layout of another shape": (
        """
a = tilus.load(x, [0, 0], shape=[16, 16], layout=spatial(4, 8))
""",
        """
layout spatial(4, 8) has shape [4, 8], tile a [16, 16]
  at FILE:9:9
    9 |     a = tilus.load(x, [0, 0], shape=[16, 16], layout=spatial(4, 8))
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: a layout covers the whole tile: repeat it with .local(...) or .spatial(...)
""",
    ),
    "layout of more threads": (
        """
a = tilus.load(x, [0, 0], shape=[16, 16], layout=spatial(8, 8).local(2, 2))
""",
        """
layout spatial(8, 8).local(2, 2) of a is for 64 threads, the block has 32
  at FILE:9:9
    9 |     a = tilus.load(x, [0, 0], shape=[16, 16], layout=spatial(8, 8).local(2, 2))
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: change `warps` in tilus.grid, or the layout
""",
    ),
    "with_layout of another shape": (
        """
a = tilus.load(x, [0, 0], shape=[16, 16])
tilus.store(x, [0, 0], tilus.with_layout(a, spatial(4, 8)))
""",
        """
layout spatial(4, 8) has shape [4, 8], tile t [16, 16]
  at FILE:10:28
   10 |     tilus.store(x, [0, 0], tilus.with_layout(a, spatial(4, 8)))
                                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  note: a has shape [16, 16] here
  at FILE:9:9
    9 |     a = tilus.load(x, [0, 0], shape=[16, 16])
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: a layout covers the whole tile: repeat it with .local(...) or .spatial(...)
""",
    ),
    "variable pinned to two layouts": (
        """
a = tilus.load(x, [0, 0], shape=[4, 8], layout=spatial(4, 8))
for i in tilus.range(x.shape[0]):
    a = tilus.load(x, [i, 0], shape=[4, 8], layout=spatial(8, 4).permute([1, 0]))
tilus.store(x, [0, 0], a)
""",
        """
variable a has the layout spatial(4, 8), and is assigned a tile pinned to column_spatial(4, 8)
  at FILE:11:9
   11 |         a = tilus.load(x, [i, 0], shape=[4, 8], layout=spatial(8, 4).permute([1, 0]))
                ^
  note: a is pinned to spatial(4, 8) here
  at FILE:9:9
    9 |     a = tilus.load(x, [0, 0], shape=[4, 8], layout=spatial(4, 8))
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  note: x_2 is pinned to column_spatial(4, 8) here
  at FILE:11:13
   11 |         a = tilus.load(x, [i, 0], shape=[4, 8], layout=spatial(8, 4).permute([1, 0]))
                    ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: pin only one of them, or convert the value: tilus.with_layout(x, spatial(4, 8))
""",
    ),
    "view of another size": (
        """
a = tilus.load(x, [0, 0], shape=[4, 8], layout=spatial(4, 8))
b = tilus.view(a, f32, [4, 8], spatial(4, 8))
tilus.store(y, [0, 0], b)
""",
        """
view: a thread holds 16 bits of f16 and would hold 32 bits of f32
  at FILE:10:9
   10 |     b = tilus.view(a, f32, [4, 8], spatial(4, 8))
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  note: its operand is pinned to spatial(4, 8) here
  at FILE:9:9
    9 |     a = tilus.load(x, [0, 0], shape=[4, 8], layout=spatial(4, 8))
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: a view keeps each thread's bits: the layout's slots times the dtype's bits must be the same on both sides
""",
    ),
    "view without layouts": (
        """
a = tilus.load(x, [0, 0], shape=[4, 8])
b = tilus.view(a, f32, [4, 4], spatial(4, 8))
tilus.store(y, [0, 0], b)
""",
        """
view needs the layouts of both tiles
  at FILE:10:9
   10 |     b = tilus.view(a, f32, [4, 4], spatial(4, 8))
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: load the source with layout=..., and give the result's layout to tilus.view
""",
    ),
    "shared layout of another shape": (
        """
s = tilus.shared(f16, [16, 16], layout=row_major((8, 16)))
tilus.store_shared(s, tilus.load(x, [0, 0], shape=[16, 16]))
""",
        """
layout row_major((8, 16)) has shape [8, 16], the shared tensor [16, 16]
  at FILE:9:9
    9 |     s = tilus.shared(f16, [16, 16], layout=row_major((8, 16)))
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: padding is part of a layout, not of its shape: tilus.layout.padded(shape, pad)
""",
    ),
    "too much shared memory": (
        """
s = tilus.shared(f16, [2048, 64])
tilus.store_shared(s, tilus.load(x, [0, 0], shape=[2048, 64]))
""",
        """
kernel kernel needs 262144 bytes of shared memory (s 262144), sm_80 has 166912 per block
  at FILE:7:1
    7 | def kernel(x: Tensor[f16, "m", "k"], y: Tensor[f32, "m", "k"], w: Tensor[uint4, "m", "k"]):
        ^^^^^^^^^^
  hint: use smaller tiles or fewer pipeline stages
""",
    ),
    "tile larger than the shared tensor": (
        """
s = tilus.shared(f16, [16, 16])
tilus.store_shared(s, tilus.load(x, [0, 0], shape=[32, 16]))
""",
        """
store_shared: a tile of shape [32, 16] does not fit into shared of [16, 16]
  at FILE:10:5
   10 |     tilus.store_shared(s, tilus.load(x, [0, 0], shape=[32, 16]))
            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: use a smaller tile, or a larger shared tensor
""",
    ),
    "store of another dtype": (
        """
tilus.store(y, [0, 0], tilus.load(x, [0, 0], shape=[16, 16]))
""",
        """
store: tile of f16 to y of f32
  at FILE:9:5
    9 |     tilus.store(y, [0, 0], tilus.load(x, [0, 0], shape=[16, 16]))
            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: cast it: tilus.cast(tile, f32)
""",
    ),
    "too few offsets": (
        """
tilus.store(x, [0], tilus.load(x, [0, 0], shape=[16, 16]))
""",
        """
store: 1 offsets for x, which has rank 2
  at FILE:9:5
    9 |     tilus.store(x, [0], tilus.load(x, [0, 0], shape=[16, 16]))
            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: give one offset for each dim of the tensor, also where the tile has fewer axes
""",
    ),
    "sum of two shapes": (
        """
a = tilus.load(x, [0, 0], shape=[16, 16]) + tilus.load(x, [0, 0], shape=[16, 8])
tilus.store(x, [0, 0], a)
""",
        """
+: shapes [16, 16] and [16, 8] do not broadcast
  at FILE:9:9
    9 |     a = tilus.load(x, [0, 0], shape=[16, 16]) + tilus.load(x, [0, 0], shape=[16, 8])
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: dims are matched from the last one; they must be equal or 1: reduce with keepdims=True, or tilus.reshape(x, [n, 1])
""",
    ),
    "sum of two dtypes": (
        """
a = tilus.load(x, [0, 0], shape=[16, 16]) + tilus.load(y, [0, 0], shape=[16, 16])
tilus.store(x, [0, 0], a)
""",
        """
+: operands of f16 and f32
  at FILE:9:9
    9 |     a = tilus.load(x, [0, 0], shape=[16, 16]) + tilus.load(y, [0, 0], shape=[16, 16])
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: cast one of them, for example tilus.cast(x, tilus.f16)
""",
    ),
    "dot of f32": (
        """
a = tilus.load(y, [0, 0], shape=[16, 16])
tilus.store(y, [0, 0], tilus.dot(a, a))
""",
        """
dot of f32 and f32, expected operands of f16, bf16, tf32, int8, uint8, int4, uint4, float8_e4m3, float8_e5m2
  at FILE:10:28
   10 |     tilus.store(y, [0, 0], tilus.dot(a, a))
                                   ^^^^^^^^^^^^^^^
  hint: cast the operands: tilus.cast(x, tilus.tf32)
""",
    ),
    "dot of unequal inner dims": (
        """
a = tilus.load(x, [0, 0], shape=[16, 16])
b = tilus.load(x, [0, 0], shape=[32, 16])
tilus.store(y, [0, 0], tilus.dot(a, b))
""",
        """
dot of shapes [16, 16] and [32, 16]: the inner dims differ
  at FILE:11:28
   11 |     tilus.store(y, [0, 0], tilus.dot(a, b))
                                   ^^^^^^^^^^^^^^^
  hint: the left tile is [m, k], the right one [k, n]: tilus.transpose swaps dims
""",
    ),
    "dot below the instruction's shape": (
        """
a = tilus.load(x, [0, 0], shape=[8, 16])
b = tilus.load(x, [0, 0], shape=[16, 8])
tilus.store(y, [0, 0], tilus.dot(a, b))
""",
        """
dot of shape m=8, n=8, k=16: expected multiples of 16, 8 and 8
  at FILE:11:28
   11 |     tilus.store(y, [0, 0], tilus.dot(a, b))
                                   ^^^^^^^^^^^^^^^
  hint: pad the tiles: loads give zeros outside of a tensor
""",
    ),
    "copies that would convert": (
        """
s = tilus.shared(f32, [16, 16])
tilus.copy_async(x, [0, 0], s)
""",
        """
copy_async: x of f16 to shared of f32
  at FILE:10:5
   10 |     tilus.copy_async(x, [0, 0], s)
            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: copies do not convert: make the shared tensor one of tilus.f16 and cast what is loaded
""",
    ),
    "copies too narrow for cp.async": (
        """
s = tilus.shared(f16, [16, 1])
tilus.copy_async(x, [0, 0], s)
""",
        """
copy_async from x: alignment and masks allow copies of 16 bits, cp.async moves 4, 8 or 16 bytes
  at FILE:10:5
   10 |     tilus.copy_async(x, [0, 0], s)
            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: make the contiguous dim a multiple of 16 bytes, or use tilus.load and tilus.store_shared
""",
    ),
    "accesses of half bytes": (
        """
a = tilus.load(w, [0, 0], shape=[32, 1])
tilus.store(w, [0, 0], a)
""",
        """
load: threads hold runs of 1 elements of uint4 of w, which is 4 bits; memory is accessed in whole bytes
  at FILE:9:9
    9 |     a = tilus.load(w, [0, 0], shape=[32, 1])
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: use multiples of 2 for the contiguous dim of tile, offset and tensor, a layout with longer runs, or tilus.view of bytes
""",
    ),
    "accesses of half bytes of shared memory": (
        """
codes = tilus.shared(uint4, [32, 1])
tilus.store(w, [0, 0], tilus.load_shared(codes))
""",
        """
load_shared: threads hold runs of 1 elements of uint4 of codes, which is 4 bits; memory is accessed in whole bytes
  at FILE:10:28
   10 |     tilus.store(w, [0, 0], tilus.load_shared(codes))
                                   ^^^^^^^^^^^^^^^^^^^^^^^^
  hint: use multiples of 2 for the contiguous dim of tile, offset and tensor, a layout with longer runs, or tilus.view of bytes
""",
    ),
    "reshape to another size": (
        """
a = tilus.load(x, [0, 0], shape=[16, 16])
tilus.store(x, [0, 0], tilus.reshape(a, [8, 16]))
""",
        """
reshape from [16, 16] (256 elements) to [8, 16] (128)
  at FILE:10:28
   10 |     tilus.store(x, [0, 0], tilus.reshape(a, [8, 16]))
                                   ^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: one extent may be -1: it follows from the others
""",
    ),
    "axis outside of the tile": (
        """
a = tilus.load(x, [0, 0], shape=[16, 16])
tilus.store(x, [0, 0], tilus.sum(a, axis=2))
""",
        """
sum over axis 2 of a tile of shape [16, 16], expected one of its 2 axes
  at FILE:10:28
   10 |     tilus.store(x, [0, 0], tilus.sum(a, axis=2))
                                   ^^^^^^^^^^^^^^^^^^^^
""",
    ),
    "negative wait": (
        """
tilus.wait(-1)
""",
        """
wait(-1): expected 0 or more pending groups
  at FILE:9:5
    9 |     tilus.wait(-1)
            ^^^^^^^^^^^^^^
""",
    ),
}


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_whole_message(body: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text(HEAD + "".join(f"    {line}\n" for line in body.strip().splitlines()))
    with pytest.raises(tilus.TilusError) as caught:
        compile_function(load_kernel(path).ir(), get_target("sm_80"))
    assert str(caught.value).replace(str(path), "FILE") == message.strip()


def test_several_mistakes_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    body = (
        "    a = tilus.load(x, [0, 0], shape=[16, 16], layout=spatial(4, 8))\n"
        "    b = tilus.load(x, [0, 0], shape=[16, 16], layout=spatial(2, 8))\n    tilus.store(x, [0, 0], a + b)\n"
    )
    path.write_text(HEAD + body)
    with pytest.raises(tilus.TilusError) as caught:
        compile_function(load_kernel(path).ir(), get_target("sm_80"))
    places = re.findall(r"^  at .*:(\d+):\d+$", str(caught.value), re.MULTILINE)
    assert {"9", "10"} <= set(places)


@tilus.kernel
def copy(x: tilus.Tensor[tilus.f32, "n"], y: tilus.Tensor[tilus.f32, "n"]):
    tilus.grid(tilus.cdiv(x.shape[0], 128), warps=1)
    i = tilus.block_id(0) * 128
    tilus.store(y, [i], tilus.load(x, [i], shape=[128]))


def text_of(error: pytest.ExceptionInfo[tilus.TilusError]) -> str:
    return str(error.value)


def test_unknown_target_device_and_pass() -> None:
    with pytest.raises(tilus.TilusError) as caught:
        copy.ptx(target="sm_75")
    assert (
        text_of(caught)
        == "unknown target 'sm_75'\n  hint: known targets: sm_80, sm_86, sm_89, sm_90a, sm_100a; `tilus compile` also knows cpu"
    )
    with pytest.raises(tilus.TilusError) as caught:
        copy.on("gpu")
    assert text_of(caught) == "unknown device 'gpu'\n  hint: expected one of auto, reference, emulator, cpu, cuda"
    with pytest.raises(tilus.TilusError) as caught:
        copy.ir(after="inline")
    assert text_of(caught).startswith("no pass is called 'inline'\n  hint: passes: eliminate_dead_code, unroll, ")


def test_a_bad_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_DEVICE", "tpu")
    x = np.zeros(4, np.float32)
    with pytest.raises(tilus.TilusError) as caught:
        copy(x, x)
    assert text_of(caught) == "TILUS_DEVICE is 'tpu', expected one of auto, reference, emulator, cpu, cuda"


def test_no_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel can be looked at without one; only machine code needs it."""
    monkeypatch.setattr("tilus.ptx.toolchain.candidates", lambda name: iter(()))
    monkeypatch.delenv("TILUS_PTXAS", raising=False)
    assert copy.ptx().startswith(".version")
    with pytest.raises(tilus.TilusError) as caught:
        copy.report()
    assert text_of(caught) == (
        "no assembler found: looked for ptxas in NVIDIA's wheels, PATH, CUDA_HOME, triton\n"
        "  hint: pip install 'nvidia-cuda-nvcc==13.0.*', or set TILUS_PTXAS to a ptxas binary"
    )


def test_no_driver(tmp_path: Path) -> None:
    """In a process in which loading libcuda fails, as it does without a driver."""
    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np\nimport cuda.bindings.driver as driver\nimport tilus\n\n\n"
        "def missing(*args):\n    raise RuntimeError('Failed to dlopen libcuda.so.1')\n\n\n"
        "driver.cuInit = missing\n\n\n"
        '@tilus.kernel\ndef copy(x: tilus.Tensor[tilus.f32, "n"], y: tilus.Tensor[tilus.f32, "n"]):\n'
        "    tilus.grid(1, warps=1)\n    tilus.store(y, [0], tilus.load(x, [0], shape=[32]))\n\n\n"
        "x = np.zeros(4, np.float32)\ncopy(x, x)\n"
    )
    command = [sys.executable, "-m", "tilus.cli", "run", "--device", "cuda", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: no CUDA driver found (libcuda.so.1)\n"
        "  hint: run `tilus doctor`, or use device='cpu', 'reference' or 'emulator', which need no GPU\n"
    )
