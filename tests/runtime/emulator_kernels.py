"""Tiny PTX kernels for the emulator's tests, as text: one instruction on arrays, or a body put into a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator import Result, run_kernel

_LETTER = {1: "h", 2: "h", 4: "r", 8: "d"}


def kernel_text(
    body: str, params: Sequence[str] = ("u64 out",), *, threads: int = 32, shared: int = 0, extern: bool = False,
    alignment: int = 128,
) -> str:  # fmt: skip
    """A one-kernel module. params: 'type name'. Registers %p %h %r %d and a shared array `smem` are declared."""
    declared = ", ".join(f".param .{param.split()[0]} {param.split()[1]}" for param in params)
    array = f".shared .align {alignment} .b8 smem[{shared}];" if shared else ""
    dynamic = ".extern .shared .align 128 .b8 dyn[];\n" if extern else ""
    return (
        f".version 8.1\n.target sm_90a\n.address_size 64\n{dynamic}.visible .entry kernel({declared})\n"
        f".reqntid {threads}, 1, 1\n{{\n.reg .pred %p<20>;\n.reg .b16 %h<60>;\n.reg .b32 %r<400>;\n.reg .b64 %d<60>;\n"
        f"{array}\n{body}\nret;\n}}\n"
    )


def run_body(body: str, out: npt.NDArray[Any], *args: Any, **options: Any) -> Result:
    """Run a body with parameters `out` and `in0`, `in1`... and %r0 = thread, %d0 = out, %d1.. = the inputs."""
    shape = {name: options.pop(name) for name in ("threads", "shared", "extern", "alignment") if name in options}
    grid = options.pop("grid", (1, 1, 1))
    params = ["u64 out", *(f"u64 in{index}" for index in range(len(args)))]
    loads = "".join(f"ld.param.u64 %d{index}, [{param.split()[1]}];\n" for index, param in enumerate(params))
    text = kernel_text(loads + "mov.u32 %r0, %tid.x;\n" + body, params, **shape)
    return run_kernel(text, "kernel", grid, [out, *args], **options)


def apply(instruction: str, result: Any, *inputs: npt.NDArray[Any], threads: int = 128) -> npt.NDArray[Any]:
    """`instruction` on every element of the inputs: `{d}` is the result register, `{0}`, `{1}`.. the inputs'.

    result: numpy dtype of the elements that come back (bool for a predicate).
    """
    count = len(inputs[0])
    is_predicate = np.dtype(result) == np.bool_
    out = np.zeros(count, np.uint32 if is_predicate else result)
    lines = [
        "mov.u32 %r0, %tid.x;", "mov.u32 %r1, %ctaid.x;", f"mad.lo.u32 %r0, %r1, {threads}, %r0;",
        f"setp.ge.u32 %p19, %r0, {count};", "@%p19 ret;", "ld.param.u64 %d0, [out];",
    ]  # fmt: skip
    names: list[str] = []
    for index, array in enumerate(inputs):
        size = array.dtype.itemsize
        register = f"%{_LETTER[size]}{10 + index}"
        lines += [
            f"ld.param.u64 %d{index + 1}, [in{index}];",
            f"mad.wide.u32 %d{index + 1}, %r0, {size}, %d{index + 1};",
            f"ld.global.{'u8' if size == 1 else f'b{size * 8}'} {register}, [%d{index + 1}];",
        ]
        names.append(register)
    size = out.dtype.itemsize
    destination = "%p1" if is_predicate else f"%{_LETTER[size]}30"
    lines.append(instruction.format(*names, d=destination) + ";")
    if is_predicate:
        lines.append("selp.u32 %r30, 1, 0, %p1;")
        destination = "%r30"
    lines += [f"mad.wide.u32 %d0, %r0, {size}, %d0;", f"st.global.b{size * 8} [%d0], {destination};"]
    params = ["u64 out", *(f"u64 in{index}" for index in range(len(inputs)))]
    text = kernel_text("\n".join(lines), params, threads=threads)
    run_kernel(text, "kernel", (-(-count // threads), 1, 1), [out, *map(np.ascontiguousarray, inputs)])
    return out.astype(np.bool_) if is_predicate else out
