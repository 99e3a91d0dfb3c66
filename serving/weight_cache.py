"""Packed weights that are kept between starts: one file a model in the cache directory, rebuilt when anything changed. What
else is made of a model (`serving.kv_frames`) is kept likewise."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch

from serving import weight_file
from serving.config import version
from serving.kernels import Kernels
from serving.packing import PackedWeights
from tilus import config
from tilus.dtypes import f16, int8
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix, QuantizedWeight

_LOG = logging.getLogger("serving")
_SUFFIX = ".weights"
_DIGITS = 24


class WeightCache:
    """The entry of one model, packed in one way, in `config.cache_dir() / "weights"`; of other tensors in another `directory`.

    Its name says the model's path and, as a hash, all that decides the packed form: the model's files with sizes and times of
    change, what floats are rounded to, the format of the file, what the kernels make of a small weight (`form`, which
    also says what else decides other tensors), tilus' version. A model has one entry: writing it removes the others of the same
    path.
    """

    def __init__(self, model: Path, rounding: str, form: str, directory: str = "weights") -> None:
        self.directory = config.cache_dir() / directory
        model = model.resolve()
        parts = _files(model), rounding, weight_file.FORMAT_VERSION, form, version()
        self.key = _hash(json.dumps(parts))
        self._prefix = _hash(str(model)) + "-"
        self.path = self.directory / f"{self._prefix}{self.key}{_SUFFIX}"

    def load(self) -> PackedWeights | None:
        """The tensors, mapped into memory; None when they must be made: there is no entry, or it is of no use."""
        try:
            return weight_file.read(self.path, self.key)
        except OSError:  # absent or unreadable: `store` will say so if it matters
            return None
        except (TilusError, LookupError, TypeError, ValueError) as error:
            # A header with the right hash can still come from a version of tilus that is under development.
            _LOG.warning("making the %s again: %s", self.directory.name, error)
            return None

    def store(self, weights: PackedWeights) -> PackedWeights:
        """Write the entry. What comes back on a CPU is mapped from it; `weights` on a GPU, or when it cannot be written, which is
        logged."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            weight_file.write(self.path, self.key, weights)
        except OSError as error:
            _LOG.warning(
                "cannot keep the %s in %s (%s): they are made at every start; set TILUS_CACHE_DIR to a directory that can be "
                "written and has room",
                self.directory.name,
                self.directory,
                error.strerror,
            )
            return weights
        self._remove_others()
        is_here = all(tensor.device.type == "cpu" for tensor in weights.tensors.values())
        return self.load() or weights if is_here else weights

    def _remove_others(self) -> None:
        for path in {*self.directory.glob(f"{self._prefix}*")} - {self.path}:
            with contextlib.suppress(OSError):  # another server writes it or removed it, or it belongs to another user
                if path.suffix == weight_file.TEMPORARY:
                    weight_file.remove_abandoned(path)
                else:
                    path.unlink()


def moved(weights: PackedWeights, device: torch.device) -> PackedWeights:
    """Weights of the cache in the memory of a device."""
    if device.type == "cpu":
        return weights
    tensors = {name: tensor.to(device) for name, tensor in weights.tensors.items()}
    linears = {name: tuple(part.to(device) for part in parts) for name, parts in weights.linears.items()}
    return PackedWeights(tensors, linears)


def packed_form(kernels: Kernels, device: torch.device) -> str | None:
    """What a library makes of a small weight on a device, in words: its layout. None for a form of its own, which no cache
    can keep."""
    codes = np.zeros((1, 32), np.uint8)
    small = QuantizedMatrix(codes, np.ones((1, 1), np.float32), None, int8, scale_dtype=f16)
    weight = kernels.quantize.pack(small, device)
    return json.dumps(weight.header.to_json()) if isinstance(weight, QuantizedWeight) else None


def _files(model: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change (ns) of what the weights are read from."""
    kinds = (".safetensors", ".json")
    files = sorted(path for path in model.iterdir() if path.suffix in kinds) if model.is_dir() else [model]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
