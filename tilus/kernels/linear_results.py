"""What linear layers make of their sums before they round them: a bias, and gates times factors (see `activation`)."""

from __future__ import annotations

import tilus
from tilus import f32
from tilus.kernels.quantize.gates import GATE_ROWS, PAIR_ROWS


def offsets_of(bias, first_row, rows: int, gated: bool):
    """The biases of `rows` rows of the weight in f32, [rows, 1] and None; of a gated weight those of gates and of factors, each
    [rows / 2, 1]. bias: in the order of the model, all gates first; None: there are none."""
    if bias is None:
        return None, None
    if not gated:
        return column(bias, first_row, rows), None
    gate, width = first_row // 2, bias.shape[0] // 2
    return column(bias, gate, rows // 2), column(bias, width + gate, rows // 2)


def column(bias, first, count: int):
    return tilus.reshape(tilus.cast(tilus.load(bias, [first], [count]), f32), [count, 1])


def finished(sums, offsets, activation):
    """sums [rows, tokens] plus offsets; of a gated weight activation(gate) * factor, [rows / 2, tokens]."""
    rows, tokens = sums.shape
    if activation is None:
        return plus(sums, offsets[0])
    pairs = tilus.reshape(sums, [rows // PAIR_ROWS, 2, GATE_ROWS, tokens])
    gate = plus(tilus.reshape(tilus.select(pairs, 1, 0), [rows // 2, tokens]), offsets[0])
    up = plus(tilus.reshape(tilus.select(pairs, 1, 1), [rows // 2, tokens]), offsets[1])
    return activation(gate) * up


def plus(sums, offset):
    return sums if offset is None else sums + offset
