"""The layers of a decoder: linear ones, feed-forward ones, and the residual stream that they add to.

What models of an architecture have or have not is data: tensors that are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.kernels import Activations, Kernels, PackedWeight
from serving.model_config import Experts

Combine = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear layer. Fused layers are a single weight where their parts are quantised alike, else several. columns: those of x
    that this device computes, where it has all of the weight; None: as many as the weight has."""

    parts: tuple[PackedWeight, ...]
    bias: Tensor | None = None
    columns: range | None = None

    @property
    def only(self) -> PackedWeight | None:
        """The weight, where there is but one."""
        return self.parts[0] if len(self.parts) == 1 else None

    def __call__(self, kernels: Kernels, x: Activations, combine: Combine | None = None) -> Tensor:
        """combine: of parts that several devices compute of the sums."""
        if combine is not None:  # rounded once, as on one device
            total = combine(kernels.linear(x, self.parts[0], out_dtype=torch.float32))
            return (total if self.bias is None else total + self.bias).to(x.dtype)
        if self.only is not None:
            return kernels.linear(x, self.only, bias=self.bias)
        widths = [int(part.shape[0]) for part in self.parts]
        out = torch.empty((x.shape[0], sum(widths)), dtype=x.dtype, device=x.device)
        biases = [None] * len(widths) if self.bias is None else self.bias.split(widths)
        for part, bias, columns in zip(self.parts, biases, out.split(widths, dim=1)):
            kernels.linear(x, part, bias=bias, out=columns)
        return out

    def gathered(self, x: Tensor, columns: range, combine: Combine) -> Tensor:
        """x with all columns, of which each device has some: whatever is added to zeros keeps its bits."""
        whole = x.new_zeros((x.shape[0], self.parts[0].shape[1]))
        whole[:, columns.start : columns.stop] = x
        return combine(whole)


@dataclass(frozen=True, eq=False)
class Norm:
    """weight: float32 [H]. scale: a power of two, by which no product of an element of the stream is larger than that element."""

    weight: Tensor
    scale: float = 1.0

    @staticmethod
    def of(weight: Tensor) -> Norm:
        largest = 1.0 if weight.is_meta else max(1.0, float(weight.abs().max()))  # torch's meta device has no data
        return Norm(weight, 2.0 ** -math.ceil(math.log2(largest)))


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream of a step, float32 [M, H], and what adds to it in place. combine: as for `Linear`."""

    kernels: Kernels
    values: Tensor
    eps: float
    combine: Combine | None

    def add(self, x: Tensor, norm: Norm, post_norm: Tensor | None) -> Tensor:
        """Returns the norm of the sum. post_norm: weight of the norm of x that is added instead of x."""
        return self.kernels.add_rms_norm(x, self.values, norm.weight, self.eps, x_norm=post_norm, constant=True)

    def add_linear(
        self, layer: Linear, x: Tensor, norm: Norm, post_norm: Tensor | None, reader: PackedWeight | None
    ) -> Activations:
        """`add` of a layer's results. reader: the only weight that reads the norm; None: others do."""
        combine = self.combine
        if combine is not None and layer.columns is not None:
            x, combine = layer.gathered(x, layer.columns, combine), None
        if combine is not None or post_norm is not None or layer.only is None:
            return self.add(layer(self.kernels, x, combine), norm, post_norm)
        return self.kernels.linear_add_rms_norm(
            x, layer.only, self.values, norm.weight, self.eps, bias=layer.bias, reader=reader, scale=norm.scale
        )


@dataclass(frozen=True, eq=False)
class Dense:
    """A gated feed-forward layer. gate_up: one gated weight, or gates and factors by themselves."""

    gate_up: Linear
    down: Linear
    activation: str

    @property
    def weights(self) -> tuple[PackedWeight, ...]:
        return (*self.gate_up.parts, *self.down.parts)

    @property
    def reader(self) -> PackedWeight | None:
        """The only weight that reads the layer's activations; None: there are several."""
        return self.gate_up.only

    def add_to(
        self, stream: Stream, x: Activations, norm: Norm, post_norm: Tensor | None, reader: PackedWeight | None
    ) -> Activations:
        """`Stream.add_linear` of what the layer makes of x."""
        return stream.add_linear(self.down, self._gated(stream.kernels, x), norm, post_norm, reader)

    def _gated(self, kernels: Kernels, x: Activations) -> Tensor:
        if self.gate_up.only is not None:
            return kernels.linear(x, self.gate_up.only, bias=self.gate_up.bias, activation=self.activation)
        gate_up = self.gate_up(kernels, x)
        return kernels.silu_mul(gate_up) if self.activation == "silu" else kernels.gelu_mul(gate_up)


@dataclass(frozen=True, eq=False)
class Mixture:
    """A feed-forward layer of experts, each of which is gated by SiLU. Each device has all of them: nothing is combined."""

    router: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    experts: Experts

    @property
    def weights(self) -> tuple[PackedWeight, ...]:
        return self.router, self.gate_up, self.down

    reader = None  # router and experts read the layer's activations

    def add_to(
        self, stream: Stream, x: Tensor, norm: Norm, post_norm: Tensor | None, reader: PackedWeight | None
    ) -> Tensor:
        """`Stream.add` of what the layer makes of x. reader: as for `Dense`."""
        return stream.add(self._mixed(stream.kernels, x), norm, post_norm)

    def _mixed(self, kernels: Kernels, x: Tensor) -> Tensor:
        logits = kernels.linear(x, self.router, out_dtype=torch.float32)
        top, normalized = self.experts.active, self.experts.normalized
        return kernels.mixture(x, logits, self.gate_up, self.down, top=top, normalized=normalized)
