"""The kernels of the model in plain torch: an oracle that shares no code with `tilus.kernels`.

Everything is computed in `compute` precision and rounded once to the result's type. With float64 a row's result
does not depend on which rows share its batch (the order of summation changes it by far less than a rounding step).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilus.kernels.quantize import QuantizedMatrix


class TorchKernels:
    activations: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def __init__(self, compute: torch.dtype = torch.float64) -> None:
        self.compute = compute

    def round(self, values: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
        """Activations are float16 by default."""
        return values.to(dtype)

    @property
    def quantize(self) -> TorchKernels:
        return self

    def pack(self, matrix: QuantizedMatrix, device: torch.device, *, gated: bool = False) -> Tensor:
        """The dense weight, float [N, K]; the model gives scales and minimums that float16 holds. gated changes nothing."""
        assert matrix.zeros is None and matrix.table is None and matrix.columns is None and matrix.global_scale == 1
        scales, mins = (
            None if a is None else torch.from_numpy(a).to(self.compute) for a in (matrix.scales, matrix.mins)
        )
        assert scales is not None and torch.equal(scales, scales.half().to(self.compute))
        n, k = matrix.codes.shape
        groups = torch.from_numpy(matrix.dtype.decode(matrix.codes)).to(self.compute).view(n, scales.shape[1], -1)
        dense = groups * scales[..., None]
        if mins is not None:
            assert torch.equal(mins, mins.half().to(self.compute))
            dense = dense + mins[..., None]
        return dense.view(n, k).to(device)

    def linear(
        self, x: Tensor, weight: Tensor, *, bias: Tensor | None = None, activation: str | None = None,
        out_dtype: torch.dtype | None = None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert x.dtype in self.activations
        y = x.to(self.compute) @ weight.T
        y = y if bias is None else y + bias
        y = (y if activation is None else self.gated(y, activation)).to(out_dtype or x.dtype)
        return y if out is None else out.copy_(y)

    def normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(self.compute)
        return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return self.round(self.normed(x, weight, eps), dtype)

    def start_rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, scale: float = 1.0, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        residual = x.float() * scale
        return self.rms_norm(residual, weight, eps, out_dtype or x.dtype), residual

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        *,
        x_norm: Tensor | None = None,
        constant: bool = False,
    ) -> Tensor:
        assert residual.dtype == torch.float32
        residual += x.float() if x_norm is None else self.normed(x, x_norm, eps).float()
        return self.rms_norm(residual, weight, eps, x.dtype)

    def linear_add_rms_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor, eps: float, *, bias: Tensor | None = None,
        reader: Tensor | None = None, scale: float = 1.0,
    ) -> Tensor:  # fmt: skip
        return self.add_rms_norm(self.linear(x, weight, bias=bias), residual, norm, eps)

    def rope_append(
        self, qkv: Tensor, positions: Tensor, cos_sin: Tensor, slots: Tensor, kv_cache: Tensor, *,
        q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0, frame: None = None,
        constant: bool = False,
    ) -> Tensor:  # fmt: skip
        _, _, page_size, kv_heads, head_dim = kv_cache.shape
        heads = qkv.view(qkv.shape[0], -1, head_dim).to(self.compute)
        q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        q, k = (x if norm is None else self.normed(x, norm, eps) for x, norm in ((q, q_norm), (k, k_norm)))
        cos, sin = cos_sin[positions.long()].to(self.compute)[:, None].chunk(2, dim=-1)

        def rotate(vectors: Tensor) -> Tensor:
            first, second = vectors.chunk(2, dim=-1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
            return self.round(turned, kv_cache.dtype)

        pages, offsets = slots.long() // page_size, slots.long() % page_size
        kv_cache[pages, 0, offsets] = rotate(k)
        kv_cache[pages, 1, offsets] = self.round(v, kv_cache.dtype)
        return rotate(q)

    def paged_attention(
        self, q: Tensor, kv_cache: Tensor, block_tables: Tensor, q_start: Tensor, kv_lens: Tensor, scale: float, *,
        window: int | None = None, soft_cap: float | None = None, decodes: int = 0, out_dtype: torch.dtype | None = None,
        constant_tables: bool = False, constant_past: bool = False,
    ) -> Tensor:  # fmt: skip
        _, _, page_size, kv_heads, head_dim = kv_cache.shape
        out = torch.empty_like(q, dtype=out_dtype)
        starts = [*range(decodes), *(q_start + decodes).tolist()]
        for row, kv_len in enumerate(kv_lens.tolist()):
            pages = block_tables[row, : math.ceil(kv_len / page_size)].long()
            keys, values = kv_cache[pages].transpose(0, 1).reshape(2, -1, kv_heads, head_dim)[:, :kv_len]
            queries = q[starts[row] : starts[row + 1]].to(self.compute)
            repeat = q.shape[1] // kv_heads
            keys, values = (t.to(self.compute).repeat_interleave(repeat, dim=1) for t in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
            position = torch.arange(kv_len - len(queries), kv_len)[:, None]
            seen = torch.arange(kv_len) <= position
            if window is not None:
                seen &= position - torch.arange(kv_len) < window
            if soft_cap is not None:
                scores = soft_cap * (scores / soft_cap).tanh()
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            out[starts[row] : starts[row + 1]] = self.round(torch.einsum("hqk,khd->qhd", weights, values), out.dtype)
        return out

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.to(self.compute).chunk(2, dim=-1)
        if activation == "silu":
            return torch.nn.functional.silu(gate) * up
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self.round(self.gated(gate_up, "silu"), gate_up.dtype)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return self.round(self.gated(gate_up, "gelu_tanh"), gate_up.dtype)

    def mixture(
        self, x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, *, top: int, normalized: bool
    ) -> Tensor:
        share, chosen = logits.to(self.compute).softmax(-1).topk(top)
        share = share / share.sum(-1, keepdim=True) if normalized else share
        first, second = gate_up.chunk(logits.shape[1]), down.chunk(logits.shape[1])
        rows: list[Tensor] = []
        for token, (weights, experts) in enumerate(zip(share, chosen.tolist())):
            row = x[token : token + 1]
            given = [self.linear(self.silu_mul(self.linear(row, first[e])), second[e]) for e in experts]
            rows.append(sum(w * y.to(self.compute) for w, y in zip(weights, given)))
        return self.round(torch.cat(rows), x.dtype)

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        assert x.dtype == torch.float32
        return x.copy_(cap * (x.to(self.compute) / cap).tanh())

    def embedding(self, ids: Tensor, table: Tensor, scales: Tensor | None = None) -> Tensor:
        rows = table[ids.long()].to(self.compute)
        if scales is not None:
            groups = scales[ids.long()].to(self.compute)
            rows = (rows.view(*groups.shape, -1) * groups[..., None]).view(rows.shape)
        return self.round(rows)
