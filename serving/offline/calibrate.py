"""Choosing codes for the activations that a text causes: GPTQ over the layers of a model, one after the other.

Needs torch and transformers. The whole model is in memory, in float32. Each layer's linear modules are rounded for the inputs
that they get when all layers before are rounded already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.offline.model_source import ModelSource
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix, Recipe

WINDOW, MOST_WINDOWS = 512, 128


class _Reached(Exception):
    """The first layer was called; nothing after it is of interest."""


def calibrate(
    source: ModelSource, names: Sequence[str], recipe: Recipe, text: Path, progress: Callable[[int, int], None]
) -> dict[str, QuantizedMatrix]:
    """The matrices called `names`, rounded for the activations of the first 128 windows of 512 tokens of a text file.

    Matrices outside of the model's layers are rounded without regard to activations. Raises TilusError when the text is shorter
    than a window, or transformers does not know the architecture.
    """
    tokens = _windows(source, text)
    model = _dense_model(source)
    layers = _layers(model)
    prefixes = {id(module): name for name, module in model.named_modules()}
    found: dict[str, QuantizedMatrix] = {}
    with torch.inference_mode():
        states, arguments = _inputs_of_first(model, layers[0], tokens)
        for layer in layers:
            inside = {
                f"{prefixes[id(layer)]}.{name}.weight": module
                for name, module in layer.named_modules()
                if f"{prefixes[id(layer)]}.{name}.weight" in names
            }
            moments = _moments(layer, inside, states, arguments)
            for name, module in inside.items():
                found[name] = recipe.quantize(module.weight, name=name, moments=moments[name])
                module.weight.copy_(torch.from_numpy(found[name].dequantize()))
                progress(len(found), len(names))
            states = [_run(layer, state, arguments) for state in states]
    for name in names:
        if name not in found:
            found[name] = recipe.quantize(source.floats(name), name=name)
            progress(len(found), len(names))
    return found


def _windows(source: ModelSource, text: Path) -> torch.Tensor:
    ids = source.tokenizer().encode(text.read_text(encoding="utf-8"))
    count = min(len(ids) // WINDOW, MOST_WINDOWS)
    if not count:
        raise TilusError(
            f"{text} has {len(ids)} tokens, expected at least {WINDOW}",
            hint="calibrate on a longer text, such as a book",
        )
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def _dense_model(source: ModelSource) -> Any:
    """transformers' model with all weights in float32."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise TilusError(
            "calibrating needs the package transformers", hint="pip install transformers, or leave out --calibrate"
        ) from error
    settings = source.config()
    kind = str(settings.get("model_type"))
    dropped = ("model_type", "architectures", "torch_dtype", "dtype")
    try:
        config = AutoConfig.for_model(kind, **{key: value for key, value in settings.items() if key not in dropped})
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except ValueError as error:
        raise TilusError(f"transformers does not know models of type {kind!r}: {error}") from error
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in source.names():
            if name in parameters:
                parameters[name].copy_(torch.from_numpy(np.array(source.floats(name))))
    model.tie_weights()
    return model


def _layers(model: Any) -> list[Any]:
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    raise TilusError(f"{type(model).__name__} has no list of {count} layers, so it cannot be calibrated")


def _inputs_of_first(model: Any, layer: Any, tokens: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """What the first layer gets for each window: the states, and its other arguments, the same for all windows."""
    states: list[torch.Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(module: Any, inputs: tuple[torch.Tensor, ...], others: dict[str, Any]) -> None:
        states.append(inputs[0] if inputs else others.pop("hidden_states"))
        arguments.update(others)
        raise _Reached

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    for window in tokens:
        with contextlib.suppress(_Reached):
            model(window[None], use_cache=False)
    handle.remove()
    return states, arguments


def _run(layer: Any, state: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    result = layer(state, **arguments)
    return result[0] if isinstance(result, tuple) else result


def _moments(
    layer: Any, modules: dict[str, Any], states: Sequence[torch.Tensor], arguments: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The sum of x x^T over all inputs x of each module."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros(())) + (x.T @ x).double()

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    for state in states:
        _run(layer, state, arguments)
    for handle in handles:
        handle.remove()
    missing = [name for name in modules if name not in sums]
    if missing:
        raise TilusError(f"{missing[0]} got no activations from the text, so it cannot be calibrated")
    return {name: total.numpy() for name, total in sums.items()}
