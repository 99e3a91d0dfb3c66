"""Steps that between them launch every kernel that a server can need: what is compiled before the first client comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from serving.config import EngineConfig
from serving.core import UNKNOWN, Batch, BatchItem, SamplingParams
from serving.kernels import KvCache, PackedWeight
from serving.model import Layer, Model
from tilus.kernels.quantize import QuantizedWeight

_FINE, _EACH_FINE, _EACH = 512, 8, 128
_SHORT = 128  # tokens of a prompt, from which on it is attended to in one way


def rehearsal(config: EngineConfig) -> Iterator[Batch]:
    """Prompts of all sizes, and short ones beside sequences that decode, of which there are as many as there may be.

    How a kernel is specialised depends on the number of tokens or sequences by its plan only, and plans change at multiples of 8,
    above 512 of 128; and on the alignment of what belongs to the prompts, by how many sequences decode in front of them. All
    pages are the same one: nothing may be launched.
    """
    limit = min(config.max_step_tokens, config.max_model_len, config.num_pages * config.page_size)
    sizes = (1, 2, 4, *range(_EACH_FINE, _FINE, _EACH_FINE), *range(_FINE, limit + _EACH, _EACH))
    for tokens in sizes:
        yield _batch(0, min(tokens, limit), config.page_size)
    for decodes in range(1, config.max_batch):
        for tokens in sizes if decodes in (1, 2, 4) else (_EACH_FINE,):
            if tokens <= min(_SHORT, limit, config.max_step_tokens - decodes):
                yield _batch(decodes, tokens, config.page_size)


def _batch(decodes: int, prompt: int, page_size: int) -> Batch:
    return Batch(tuple(_item(index, 1, page_size) for index in range(decodes)) + (_item(decodes, prompt, page_size),))


def _item(index: int, tokens: int, page_size: int) -> BatchItem:
    return BatchItem(str(index), (0,) * tokens, 0, (0,) * -(-tokens // page_size), SamplingParams(temperature=0), 0)


def asking_item() -> BatchItem:
    """A row that asks for all that most do not: log-probabilities, and logits that are edited and masked."""
    params = SamplingParams(repetition_penalty=2.0, logprobs=0)
    return _item(0, 1, 1)._replace(params=params, history=(0,), allowed=b"")


def resumed_item() -> BatchItem:
    """A row behind a draft, of which only the device knows whether it is right."""
    return _item(0, 1, 1)._replace(token_ids=(UNKNOWN,))


def without_repetitions(model: Model, caches: Sequence[KvCache]) -> tuple[Model, Sequence[KvCache]]:
    """A model of `tilus.kernels` with few layers, and their caches: of those whose weights have the same shapes and forms one, or
    as many as have neighbours that leave a norm to it, or take one from it, and others."""
    alone = [layer.qkv.only is not None for layer in model.layers]
    reads, is_read = (False, *alone[1:]), (*alone[1:], False)
    kinds = [_kind(layer) for layer in model.layers]
    found, kept = set[object](), list[int]()
    for index in sorted(range(len(kinds)), key=lambda index: index if index < len(kinds) - 1 else 0):
        parts = {(kinds[index], "qkv", reads[index]), (kinds[index], "down", is_read[index])}
        if not parts <= found:
            kept.append(index)
            found |= parts
    kept.sort()
    return replace(model, layers=tuple(model.layers[index] for index in kept)), [caches[index] for index in kept]


def _kind(layer: Layer) -> object:
    norms = (layer.q_norm, layer.post_attention_norm, layer.post_ffw_norm)
    weights = (*layer.qkv.parts, *layer.attn_output.parts, *layer.feed_forward.weights)
    return layer.window, *(norm is None for norm in norms), *map(_form, weights)


def _form(weight: PackedWeight) -> object:
    """What decides the kernel of a weight."""
    if isinstance(weight, QuantizedWeight):
        return replace(weight.header, global_scale=1.0)
    return tuple(weight.shape)
