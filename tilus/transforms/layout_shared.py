"""Give every shared tensor without a pinned layout one that its accesses like.

A tensor that is read as tensor-core fragments gets the XOR swizzle in which ldmatrix has no bank conflicts; others are row-major.

Requires: layouts of all register tiles. Ensures: every SharedTensor has a layout.
"""

from __future__ import annotations

from dataclasses import replace

from tilus.ir.function import Function
from tilus.ir.tensor import SharedTensor, Tensor
from tilus.ir.visit import instructions
from tilus.ir.visit import replace as replace_tensors
from tilus.layout import SharedLayout, row_major
from tilus.target import Target


def layout_shared(function: Function, target: Target) -> Function:
    wishes: dict[SharedTensor, list[SharedLayout]] = {}
    for stmt in instructions(function.body):
        for tensor in stmt.inst.operands:
            if isinstance(tensor, SharedTensor) and tensor.layout is None:
                wishes.setdefault(tensor, [])
                wish = stmt.inst.shared_layout_wish(tensor)
                if wish is not None:
                    wishes[tensor].append(wish)
    chosen: dict[Tensor, Tensor] = {
        tensor: replace(tensor, layout=wish[0] if wish else row_major(tensor.shape)) for tensor, wish in wishes.items()
    }
    body = replace_tensors(function.body, chosen)
    return function if body is function.body else replace(function, body=body)
