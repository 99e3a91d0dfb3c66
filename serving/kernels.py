"""What the model asks of a kernel library. `tilus.kernels` is the one in use; tests bring another as an oracle.

All tensors are torch's, on one device; activations are float16, or bfloat16 where a model's do not fit. M counts the tokens of a
step, S its sequences.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from tilus import kernels
from tilus.kernels import KvFrame, QuantizedCache
from tilus.kernels.quantize import QuantizedMatrix

# What cuts sums in one way or another.
_SUMMING = ("linear", "linear_add_rms_norm", "paged_attention", "mixture")

# Each library has its own packed form of a weight; the model carries it from `pack` to `linear`, and asks it for `shape`, (N, K).
PackedWeight = Any

# What linear layers read: tensors [M, K], or what `linear_add_rms_norm` leaves to its reader.
Activations = Any

# One layer's keys and values: float16 or bfloat16 [pages, 2, page_size, Hkv, D], keys at index 0, or quantised.
KvCache = Tensor | QuantizedCache


class Quantize(Protocol):
    """Packing of weights."""

    def pack(self, matrix: QuantizedMatrix, device: torch.device, *, gated: bool = False) -> PackedWeight:
        """A weight [N, K], whose scales and minimums are numbers of `matrix.scale_dtype`, on a device. gated: for `linear` with
        an activation; N is a multiple of 16."""
        ...


class Kernels(Protocol):
    @property
    def quantize(self) -> Quantize: ...

    def pack_dense(self, values: Tensor, *, gated: bool = False) -> PackedWeight:
        """A weight float16 [N, K] that is not quantised. gated: as for `quantize.pack`."""
        ...

    def linear(
        self, x: Activations, weight: PackedWeight, *, bias: Tensor | None = None, activation: str | None = None,
        out_dtype: torch.dtype = ..., out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [M, K] by weight [N, K], plus bias float32 [N] -> [M, N] in out_dtype, float16 by default. activation: silu or
        gelu_tanh, of a gated weight, whose results [M, N / 2] are those of `silu_mul` or `gelu_mul`. out: columns that it is
        written to."""
        ...

    def start_rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, scale: float = 1.0, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x [M, H], weight float32 [H] -> the norm of x * scale, [M, H] in out_dtype, by default that of x, and the residual
        stream, float32, that begins with x * scale."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, x_norm: Tensor | None = None, constant: bool = False
    ) -> Tensor:  # fmt: skip
        """residual (float32 [M, H]) += x in place, or where x_norm (float32 [H]) is given the norm of x with this weight;
        returns the norm of the sum, [M, H] in the dtype of x. constant: nothing in front in the stream still writes weights."""
        ...

    def linear_add_rms_norm(
        self, x: Activations, weight: PackedWeight, residual: Tensor, norm: Tensor, eps: float, *, bias: Tensor | None = None,
        reader: PackedWeight | None = None, scale: float = 1.0,
    ) -> Activations:  # fmt: skip
        """`add_rms_norm(linear(x, weight, bias=bias), residual, norm, eps)`, weights being constant. Without reader it is a
        tensor, else for `linear` with this weight and nobody else, which may be left to take the norm. scale: a power of two,
        such that numbers of the stream times scale * norm fit into the type of x."""
        ...

    def rope_append(
        self, qkv: Tensor, positions: Tensor, cos_sin: Tensor, slots: Tensor, kv_cache: KvCache, *,
        q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = ..., frame: KvFrame | None = None,
        constant: bool = False,
    ) -> Tensor:  # fmt: skip
        """Rotate q and k of qkv [M, (Hq + 2 Hkv) D], write k and v to the cache at slots, in its format; returns q [M, Hq, D] in
        the dtype of a cache of 16 bits, else in qkv's.

        positions, slots: int32 [M], a slot being page * page_size + offset; negative ones are not written. cos_sin: float32
        [max_pos, D], first the D/2 cosines, then the sines; halves are rotated as in Hugging Face's models. q_norm, k_norm:
        float32 [D], weights of the norm of each head in front of its rotation. frame: the coordinates of a cache of 4 bits.
        constant: nothing in front in the stream still writes the integers, cos_sin and the weights.
        """
        ...

    def restore_values(self, out: Tensor, frame: KvFrame) -> Tensor:
        """What attention [M, Hq, D] would give without the cache's frame, in place."""
        ...

    def paged_attention(
        self, q: Tensor, kv_cache: KvCache, block_tables: Tensor, q_start: Tensor, kv_lens: Tensor, scale: float, *,
        window: int | None = None, soft_cap: float | None = None, decodes: int = 0, out_dtype: torch.dtype | None = None,
        constant_tables: bool = False, constant_past: bool = False,
    ) -> Tensor:  # fmt: skip
        """Causal attention of q [M, Hq, D] over pages -> [M, Hq, D] in out_dtype.

        block_tables: int32 [S, max_pages]. kv_lens: int32 [S]. The first `decodes` sequences have one row of q each; q_start:
        int32 [S - decodes + 1], where the rows of the others start behind those. Token j of a sequence with q_len of them sees
        the first kv_len - q_len + j + 1 entries, of these only the last `window`. soft_cap: scaled scores s become
        soft_cap * tanh(s / soft_cap). constant_tables: nothing in front in the stream still writes the integers;
        constant_past: nor the cached tokens in front of the step's.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [M, 2 F] -> silu(first half) * second half, [M, F]."""
        ...

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """The same with gelu, in its approximation by tanh."""
        ...

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        """x float32 [M, N] = cap * tanh(x / cap), in place."""
        ...

    def mixture(
        self, x: Tensor, logits: Tensor, gate_up: PackedWeight, down: PackedWeight, *, top: int, normalized: bool
    ) -> Tensor:
        """Of each token x [M, H] the sum of what its `top` experts give, which have the largest logits (float32 [M, E]), weighted
        by the softmax of all, normalized: over its experts. gate_up: of all experts on top of each other, of each F gates and
        then F factors, [E * 2 F, H]; down: [E * H, F]."""
        ...

    def embedding(self, ids: Tensor, table: Tensor, scales: Tensor | None = None) -> Tensor:
        """Rows of the table: float16 [V, H], or int8 [V, H] with scales float16 [V, H / 32] -> float16 [M, H]."""
        ...


@functools.cache
def default_kernels(invariant: bool = False) -> Kernels:
    """`tilus.kernels`.

    invariant: such that a token's results have the same bits whatever else is in its step, however prompts are cut, and whether
    it is computed again. Sums are then cut in one way, at the cost of time.
    """
    if not invariant:
        return cast(Kernels, kernels)
    changed = {name: functools.partial(getattr(kernels, name), invariant=True) for name in _SUMMING}
    return cast(Kernels, SimpleNamespace(**vars(kernels) | changed))
