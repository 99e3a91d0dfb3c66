"""torch's scaled_dot_product_attention, on contiguous keys and values: what paging is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from paged.batches import L2_MULTIPLE, PagedBatch, check

BACKENDS = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}


def actions(batch: PagedBatch, backend: str, l2_nbytes: int) -> list[Callable[[], object]]:
    """One call for each copy of the keys and values; checked. Of sequences of equal lengths, for one query
    each, or for all of their tokens."""
    keys, values = batch.contiguous()
    copies = max(1, -(-L2_MULTIPLE * l2_nbytes // (keys.nbytes + values.nbytes)))
    pairs = [(keys, values), *((keys.clone(), values.clone()) for _ in range(copies - 1))]
    q, causal = batch.q.transpose(1, 2), batch.case.q_len > 1

    def attend(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return scaled_dot_product_attention(q, keys, values, scale=batch.scale, is_causal=causal, enable_gqa=True)

    check(batch, attend(keys, values).transpose(1, 2), backend)
    return [lambda k=k, v=v: attend(k, v) for k, v in pairs]
