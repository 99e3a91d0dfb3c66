"""Small kernels, each with the conversions that its layouts should cost: no more, and at the cheapest place.

`EXPECTED` maps a kernel's name to (tile, instruction that it is converted for, loops around the conversion). A result that is
converted behind its instruction has the name of the tile that it becomes.
"""

from __future__ import annotations

import tilus
from tilus import Tensor, f16, f32, int32, uint3, uint4
from tilus.layout import auto, local, spatial

PINNED = spatial(32, 4).local(2, 16)
ROWS = auto((64, 64), 128, 4)
COLUMNS = auto((64, 64), 128, 4, (0, 1))

EXPECTED: dict[str, list[tuple[str, str, str]]] = {
    "no_tiles": [],
    "elementwise": [],
    "narrow_and_wide": [],
    "bias_before_the_tile": [],
    "bias_outside_of_the_loop": [],
    "transposed_outside_of_the_loop": [],
    "softmax": [],
    "sum_of_columns": [],
    "triangle": [],
    "indices": [],
    "epilogue": [],
    "attention": [],
    "reshape_that_straddles": [("x_1", "reshape", ""), ("t", "reshape", "")],
    "bytes_for_a_product": [("turned", "dot", "for")],
    "pinned_accumulator": [("acc", "dot", "for"), ("acc", "dot", "for")],
    "accumulator_in_another_order": [],
    "used_twice_in_a_loop": [("tile", "dot", "")],
    "used_in_a_branch": [("tile", "dot", "if")],
    "majority": [("t_1", "where", "")],
    "one_result_instead_of_two_operands": [("t_1", "assign", "for")],
    "transposed_nibbles": [("t", "store", "")],
    "nibbles_along_columns": [("t", "load", ""), ("t", "store", "")],
    "nibbles_in_another_order": [("t", "load", ""), ("t", "store", "")],
    "three_bits": [("t", "load", ""), ("t", "store", "")],
    "nibbles_through_shared": [("t", "store_shared", ""), ("t_2", "load_shared", ""), ("t_2", "store", "")],
}


@tilus.kernel
def no_tiles(y: Tensor[int32, 1]):
    tilus.grid(1, warps=1)
    tilus.atomic_add(y, [0], 1)


@tilus.kernel
def elementwise(x: Tensor[f16, 64, 64], y: Tensor[f32, 64, 64]):
    tilus.grid(1, warps=4)
    tilus.store(y, [0, 0], tilus.load(x, [0, 0], [64, 64]).to(f32) * 2 + 1)


@tilus.kernel
def narrow_and_wide(w: Tensor[f32, 64, 64], x: Tensor[f16, 64, 64], y: Tensor[f32, 64, 64]):
    """The narrow tile needs the longer runs, although it is loaded last."""
    tilus.grid(1, warps=4)
    wide = tilus.load(w, [0, 0], [64, 64])
    tilus.store(y, [0, 0], wide + tilus.load(x, [0, 0], [64, 64]).to(f32))


@tilus.kernel
def bias_before_the_tile(b: Tensor[f32, 64], x: Tensor[f32, 64, 64], y: Tensor[f32, 64, 64]):
    tilus.grid(1, warps=4)
    row = tilus.load(b, [0], [64])
    tilus.store(y, [0, 0], tilus.load(x, [0, 0], [64, 64]) + row)


@tilus.kernel
def bias_outside_of_the_loop(b: Tensor[f32, 64, 64], x: Tensor[f32, 128, 64], y: Tensor[f32, 128, 64]):
    tilus.grid(1, warps=4)
    bias = tilus.load(b, [0, 0], [64, 64])
    for i in tilus.range(0, x.shape[0], 64):
        tilus.store(y, [i, 0], tilus.load(x, [i, 0], [64, 64]) + bias)


@tilus.kernel
def transposed_outside_of_the_loop(b: Tensor[f32, 64, 64], x: Tensor[f32, 128, 64], y: Tensor[f32, 128, 64]):
    """What the loop loads has the wide accesses."""
    tilus.grid(1, warps=4)
    bias = tilus.load(b, [0, 0], [64, 64], dims=[1, 0])
    for i in tilus.range(0, x.shape[0], 64):
        tilus.store(y, [i, 0], bias + tilus.load(x, [i, 0], [64, 64]))


@tilus.kernel
def softmax(x: Tensor[f32, 64, 64], y: Tensor[f32, 64, 64]):
    tilus.grid(1, warps=4)
    rows = tilus.load(x, [0, 0], [64, 64])
    weights = rows - tilus.max(rows, axis=1, keepdims=True)
    tilus.store(y, [0, 0], weights + tilus.sum(weights, axis=1)[:, None])


@tilus.kernel
def sum_of_columns(x: Tensor[f32, 128, 64], y: Tensor[f32, 64]):
    tilus.grid(1, warps=4)
    total = tilus.zeros([64])
    for i in tilus.range(0, x.shape[0], 64):
        total += tilus.sum(tilus.load(x, [i, 0], [64, 64]), axis=0)
    tilus.store(y, [0], total)


@tilus.kernel
def triangle(x: Tensor[f32, 64, 64], y: Tensor[f32, 64, 64]):
    tilus.grid(1, warps=4)
    rows = tilus.arange(64, shape=[64, 1], axis=0)
    columns = tilus.arange(64, shape=[1, 64], axis=1)
    tilus.store(y, [0, 0], tilus.where(rows >= columns, tilus.load(x, [0, 0], [64, 64]), 0.0))


@tilus.kernel
def indices(y: Tensor[int32, 64, 64]):
    tilus.grid(1, warps=4)
    tilus.store(y, [0, 0], tilus.arange(64, shape=[64, 64], axis=1) + 1)


@tilus.kernel
def epilogue(
    a: Tensor[f16, 64, 32],
    b: Tensor[f16, 32, 64],
    r: Tensor[f16, 64, 64],
    bias: Tensor[f32, 64],
    y: Tensor[f16, 64, 64],
):
    tilus.grid(1, warps=4)
    row = tilus.load(bias, [0], [64])
    acc = tilus.dot(tilus.load(a, [0, 0], [64, 32]), tilus.load(b, [0, 0], [32, 64]))
    tilus.store(y, [0, 0], (acc + row + tilus.load(r, [0, 0], [64, 64]).to(f32)).to(f16))


@tilus.kernel
def attention(q: Tensor[f16, 64, 64], k: Tensor[f16, 64, 64], v: Tensor[f16, 64, 64], y: Tensor[f32, 64, 64]):
    """Two by two warps would share the first product best, but its result is an operand of the second."""
    tilus.grid(1, warps=4)
    keys, values = tilus.shared(f16, [64, 64]), tilus.shared(f16, [64, 64])
    tilus.store_shared(keys, tilus.load(k, [0, 0], [64, 64]))
    tilus.store_shared(values, tilus.load(v, [0, 0], [64, 64]))
    tilus.sync()
    scores = tilus.dot(tilus.load(q, [0, 0], [64, 64]), tilus.load_shared(keys).T)
    weights = scores - tilus.max(scores, axis=1, keepdims=True)
    tilus.store(y, [0, 0], tilus.dot(tilus.maximum(weights, -8.0).to(f16), tilus.load_shared(values)))


@tilus.kernel
def reshape_that_straddles(x: Tensor[f32, 12, 10], y: Tensor[f32, 8, 15]):
    tilus.grid(1, warps=1)
    tilus.store(y, [0, 0], tilus.reshape(tilus.load(x, [0, 0], [12, 10]), [8, 15]))


@tilus.kernel
def bytes_for_a_product(x: Tensor[f16, 32, 128], w: Tensor[uint4, 64, 128], y: Tensor[f32, 32, 64]):
    """In the fragment's layout the codes would arrive a byte a load."""
    tilus.grid(1, warps=4)
    acc = tilus.zeros([32, 64])
    for k in tilus.range(0, x.shape[1], 64):
        codes = tilus.load(w, [0, k], [64, 64])
        turned = tilus.transpose(codes.to(f16) - 8)
        acc = tilus.dot(tilus.load(x, [0, k], [32, 64]), turned, acc)
    tilus.store(y, [0, 0], acc)


@tilus.kernel
def pinned_accumulator(a: Tensor[f16, 64, 32], b: Tensor[f16, 32, 64], y: Tensor[f32, 64, 64]):
    tilus.grid(1, warps=4)
    acc = tilus.zeros([64, 64], layout=PINNED)
    for k in tilus.range(0, a.shape[1], 16):
        acc = tilus.dot(tilus.load(a, [0, k], [64, 16]), tilus.load(b, [k, 0], [16, 64]), acc)
    tilus.store(y, [0, 0], acc)


@tilus.kernel
def accumulator_in_another_order(a: Tensor[f16, 64, 32], b: Tensor[f16, 32, 64], y: Tensor[f32, 64, 64]):
    """Each thread holds what tensor cores give it, in other registers: nothing has to move."""
    tilus.grid(1, warps=4)
    order = spatial(2, 2).column_local(2, 4).local(2, 1).spatial(8, 4).local(1, 2)
    acc = tilus.zeros([64, 64], layout=order)
    for k in tilus.range(0, a.shape[1], 16):
        acc = tilus.dot(tilus.load(a, [0, k], [64, 16]), tilus.load(b, [k, 0], [16, 64]), acc)
    tilus.store(y, [0, 0], acc)


@tilus.kernel
def used_twice_in_a_loop(a: Tensor[f16, 64, 64], b: Tensor[f16, 128, 64], y: Tensor[f32, 64, 64]):
    tilus.grid(1, warps=4)
    tile = tilus.load(a, [0, 0], [64, 64], layout=auto((64, 64), 128, 8))
    acc = tilus.zeros([64, 64])
    for k in tilus.range(0, b.shape[0], 64):
        acc = tilus.dot(tile, tilus.load(b, [k, 0], [64, 64]), acc)
        acc = tilus.dot(tile, tilus.load(b, [k, 0], [64, 64]), acc)
    tilus.store(y, [0, 0], acc)


@tilus.kernel
def used_in_a_branch(a: Tensor[f16, 64, 64], n: int32, y: Tensor[f32, 64, 64]):
    """Not in front of the branch: it may not be taken."""
    tilus.grid(1, warps=4)
    tile = tilus.load(a, [0, 0], [64, 64], layout=auto((64, 64), 128, 8))
    acc = tilus.zeros([64, 64])
    if n > 3:
        acc = tilus.dot(tile, tilus.load(a, [0, 0], [64, 64]), acc)
    tilus.store(y, [0, 0], acc)


@tilus.kernel
def majority(x: Tensor[f16, 64, 64], y: Tensor[f32, 64, 64]):
    """One tile of booleans moves, not two of f32."""
    tilus.grid(1, warps=4)
    a = tilus.load(x, [0, 0], [64, 64], layout=ROWS)
    c = tilus.load(y, [0, 0], [64, 64], layout=COLUMNS)
    tilus.sync()
    tilus.store(y, [0, 0], tilus.where(a + a > 1.0, c, c + c))


@tilus.kernel
def one_result_instead_of_two_operands(x: Tensor[f32, 128, 64], y: Tensor[f32, 64, 64], z: Tensor[f32, 64, 64]):
    tilus.grid(1, warps=4)
    last = tilus.zeros([64, 64], layout=ROWS)
    for i in tilus.range(0, x.shape[0], 64):
        a = tilus.load(x, [i, 0], [64, 64], layout=COLUMNS)
        c = tilus.load(y, [0, 0], [64, 64], layout=COLUMNS)
        last = a + c
    tilus.store(z, [0, 0], last)


@tilus.kernel
def transposed_nibbles(w: Tensor[uint4, 64, 64], y: Tensor[uint4, 64, 64]):
    tilus.grid(1, warps=4)
    tilus.store(y, [0, 0], tilus.load(w, [0, 0], [64, 64]).T)


@tilus.kernel
def nibbles_along_columns(w: Tensor[uint4, 64, 64], y: Tensor[uint4, 64, 64]):
    tilus.grid(1, warps=4)
    t = tilus.load(w, [0, 0], [64, 64], layout=spatial(2, 64).local(32, 1))
    tilus.store(y, [0, 0], t)


@tilus.kernel
def nibbles_in_another_order(w: Tensor[uint4, 32, 32], y: Tensor[uint4, 32, 32]):
    """Each thread holds a whole row, but even columns before odd ones."""
    tilus.grid(1, warps=1)
    order = spatial(32, 1) * local(2, 16).permute([1, 0]).reshape((1, 32))
    t = tilus.load(w, [0, 0], [32, 32], layout=order)
    tilus.store(y, [0, 0], t)


@tilus.kernel
def three_bits(w: Tensor[uint3, 32, 32], y: Tensor[uint3, 32, 32]):
    tilus.grid(1, warps=1)
    t = tilus.load(w, [0, 0], [32, 32], layout=local(8, 1).spatial(4, 8).local(1, 4))
    tilus.store(y, [0, 0], t)


@tilus.kernel
def nibbles_through_shared(w: Tensor[uint4, 32, 32], y: Tensor[uint4, 32, 32]):
    tilus.grid(1, warps=1)
    buffer = tilus.shared(uint4, [32, 32])
    tilus.store_shared(buffer, tilus.load(w, [0, 0], [32, 32]).T)
    tilus.sync()
    t = tilus.load_shared(buffer, layout=spatial(1, 32).local(32, 1))
    tilus.store(y, [0, 0], t)
