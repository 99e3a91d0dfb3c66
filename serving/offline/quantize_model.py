"""Quantising a whole model: `tilus quantize`.

Every matrix called `*.weight` is rounded, except embeddings, heads and routers, which lose more than they weigh; the rest is
copied. Tensors are read, rounded and written one after the other, so that a model may be larger than the memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from serving.offline.model_source import ModelSource, open_source
from tilus.errors import TilusError
from tilus.kernels.quantize import CheckpointWriter, QuantizedMatrix, Recipe

_Floats = npt.NDArray[np.float32]

USUALLY_IGNORED = ("lm_head", r"re:.*embed.*", r"re:.*\.(gate|router)")


@dataclass(frozen=True)
class Report:
    """What became of a model. format: how its matrices are stored. nbits: of a quantised weight, scales included, on average.
    error: the norm of all rounding errors over the norm of all quantised weights."""

    format: str
    num_matrices: int
    nbytes: int
    nbits: float
    error: float


def quantize_model(
    source: Path,
    target: Path,
    recipe: Recipe,
    *,
    ignore: Sequence[str] = (),
    calibration: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the model at `source` (a Hugging Face directory or a GGUF file), quantised, into the new directory `target`.

    ignore: modules that stay as they are, besides `USUALLY_IGNORED`: names, or `re:` and a pattern that their whole name matches.
    calibration: a text file; codes are then chosen by GPTQ for the activations that it causes (needs torch and transformers).
    progress: called with (matrices done, matrices in all). Raises TilusError, by the tensor's name, for weights that cannot be
    quantised, and leaves nothing behind then.
    """
    model = open_source(source)
    chosen = chosen_names(model, ignore)
    if not chosen:
        raise TilusError(f"{source} has no weight that is not ignored, so there is nothing to quantise")
    totals = Totals()
    with CheckpointWriter(target) as writer:
        model.write_files(writer.path)
        calibrated = _calibrated(model, chosen, recipe, calibration, progress)
        for name in model.names():
            if name not in chosen:
                model.copy(name, writer)
                continue
            weight = model.floats(name)
            matrix = calibrated[name] if calibrated else recipe.quantize(weight, name=name)
            totals.add(weight, matrix, matrix.dequantize())
            writer.add_matrix(name.removesuffix(".weight"), matrix)
            if not calibrated:
                progress(totals.num_matrices, len(chosen))
        format = writer.finish(model.config())
    return totals.report(format, writer.nbytes)


def chosen_names(model: ModelSource, ignore: Sequence[str] = ()) -> list[str]:
    """The tensors that are quantised."""
    patterns = (*USUALLY_IGNORED, *ignore)
    return [name for name in model.names() if model.is_matrix(name) and not _is_ignored(name, patterns)]


def _is_ignored(name: str, patterns: Sequence[str]) -> bool:
    module = name.removesuffix(".weight")
    return module == name or any(
        re.fullmatch(pattern[3:], module) if pattern.startswith("re:") else pattern == module for pattern in patterns
    )


def _calibrated(
    model: ModelSource,
    chosen: Sequence[str],
    recipe: Recipe,
    text: Path | None,
    progress: Callable[[int, int], None],
) -> Mapping[str, QuantizedMatrix]:
    if text is None:
        return {}
    from serving.offline.calibrate import calibrate

    return calibrate(model, chosen, recipe, text, progress)


class Totals:
    """Sums over the matrices of a model."""

    def __init__(self) -> None:
        self.num_matrices = 0
        self._num_weights = 0
        self._nbits = 0
        self._error = 0.0
        self._norm = 0.0

    def add(self, weight: _Floats, matrix: QuantizedMatrix, rounded: _Floats) -> None:
        """A weight, what it became, and the values of that."""
        self.num_matrices += 1
        self._num_weights += weight.size
        per_group = matrix.scale_dtype.nbits * (2 if matrix.mins is not None else 1)
        per_group += matrix.dtype.nbits if matrix.zeros is not None else 0
        self._nbits += weight.size * matrix.dtype.nbits + matrix.scales.size * per_group
        self._error += float(np.square(rounded - weight).sum(dtype=np.float64))
        self._norm += float(np.square(weight).sum(dtype=np.float64))

    def report(self, format: str, nbytes: int) -> Report:
        """The sums as a report on a model stored in this format and size."""
        error = (self._error / self._norm) ** 0.5 if self._norm else 0.0
        return Report(format, self.num_matrices, nbytes, self._nbits / self._num_weights, error)
