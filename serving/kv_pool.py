"""The memory of the key-value cache: pages in which all layers' keys and values lie together, in the format of `--kv-dtype`.

A page is contiguous, scales included, so that one copy moves it whatever its format.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.kernels import KvCache
from serving.model_config import ModelConfig
from tilus.kernels import KV_FORMATS, QuantizedCache

_PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16}
_ALIGNMENT = 16  # bytes: pages start at multiples of it, which copies of GPUs need


@dataclass(frozen=True)
class PageShape:
    """Of a page. kv_dtype: fp16, bf16, or a name of KV_FORMATS, whose scales are of single tokens and heads."""

    config: ModelConfig
    page_size: int
    kv_dtype: str = "fp16"

    @property
    def nbytes(self) -> int:
        return -(-(self.codes_nbytes + self.factors_nbytes) // _ALIGNMENT) * _ALIGNMENT

    @property
    def codes_nbytes(self) -> int:
        """Of elements or codes."""
        nbits = 16 if self.kv_dtype in _PLAIN else KV_FORMATS[self.kv_dtype].code.nbits
        return self.page_size * self.config.kv_values_per_token * nbits // 8

    @property
    def factors_nbytes(self) -> int:
        """Of scales and centres."""
        kinds = 0 if self.kv_dtype in _PLAIN else KV_FORMATS[self.kv_dtype].kinds
        return self.page_size * self.config.num_layers * 2 * self.config.num_kv_heads * kinds * 2


class KvPool:
    """memory: uint8 [pages, bytes of a page]. layers: the cache of each layer, views of it."""

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device) -> None:
        self.shape = shape
        self.memory = _zeros(num_pages, shape.nbytes, device)
        self.layers: tuple[KvCache, ...] = (
            _plain(self.memory, shape) if shape.kv_dtype in _PLAIN else _quantized(self.memory, shape)
        )


def _plain(memory: Tensor, shape: PageShape) -> tuple[KvCache, ...]:
    config = shape.config
    elements = memory[:, : shape.codes_nbytes].view(_PLAIN[shape.kv_dtype])
    by_layer = elements.view(-1, config.num_layers, 2, shape.page_size, config.num_kv_heads, config.head_dim)
    return by_layer.unbind(1)


def _quantized(memory: Tensor, shape: PageShape) -> tuple[KvCache, ...]:
    config, kind = shape.config, KV_FORMATS[shape.kv_dtype]
    heads = config.num_layers, config.num_kv_heads, 2
    behind = shape.codes_nbytes + shape.factors_nbytes
    codes = memory[:, : shape.codes_nbytes].view(-1, *heads, shape.page_size, config.head_dim * kind.code.nbits // 8)
    factors = memory[:, shape.codes_nbytes : behind].view(torch.float16).view(-1, *heads, kind.kinds, shape.page_size)
    return tuple(QuantizedCache(kind, *parts) for parts in zip(codes.unbind(1), factors.unbind(1)))


def _zeros(num_pages: int, page_nbytes: int, device: torch.device) -> Tensor:
    """On the CPU the system makes them when a page is first touched: no start waits for a pool of a GiB."""
    if device.type != "cpu":
        return torch.zeros((num_pages, page_nbytes), dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, num_pages * page_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, page_nbytes)
