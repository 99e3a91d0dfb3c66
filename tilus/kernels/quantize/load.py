"""Opening a checkpoint, whatever its format: names to quantised matrices and plain arrays, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint import (
    awq,
    bitsandbytes,
    blocks,
    compressed_tensors,
    gptq,
    microscaling,
    native,
)
from tilus.kernels.quantize.checkpoint.gguf import GGUFFile
from tilus.kernels.quantize.checkpoint.safetensors import Array, StoredTensor
from tilus.kernels.quantize.checkpoint.tensors import Module, Settings, Tensors, read_json
from tilus.kernels.quantize.matrix import QuantizedMatrix

FORMATS: dict[str, Callable[[Tensors, Settings], dict[str, Module]]] = {
    "gptq": gptq.modules,
    "awq": awq.modules,
    "compressed-tensors": compressed_tensors.modules,
    "bitsandbytes": bitsandbytes.modules,
    "fp8": blocks.modules,
    "mxfp4": microscaling.modules,
    native.METHOD: native.modules,
}
# Names of tensors that only quantised checkpoints have.
_TELLTALES = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight.absmax", "_blocks")


class CheckpointTensors(Mapping[str, "QuantizedMatrix | Array"]):
    """The weights of a checkpoint by name. A quantised weight stands under the name that it would have unquantised, such as
    `model.layers.0.mlp.up_proj.weight`. Floats are float32, exactly; other plain tensors are as stored.

    method: how it is quantised, a key of `FORMATS`, "gguf" or None. Looking a tensor up reads it, and raises TilusError for
    damaged ones.
    """

    def __init__(
        self, path: Path, method: str | None, tensors: Mapping[str, StoredTensor], modules: Mapping[str, Module]
    ) -> None:
        self.path = path
        self.method = method
        self._tensors = tensors
        self._modules = {f"{name}.weight": module for name, module in modules.items()}
        used = {part for module in modules.values() for part in module.parts}
        for name in self._modules:
            if name in tensors and name not in used:
                raise TilusError(f"{path} has {name} both as it is and quantised")
        self._names = [*self._modules, *(name for name in tensors if name not in used)]

    def __getitem__(self, name: str) -> QuantizedMatrix | Array:
        if name in self._modules:
            return _checked(self._modules[name].read(), name)
        return self._tensors[name].array()

    def stored(self, name: str) -> StoredTensor:
        """A plain tensor as it lies in the file."""
        return self._tensors[name]

    def is_quantized(self, name: str) -> bool:
        return name in self._modules

    def stored_nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in its files, which are not read: of a quantised one, with its scales and all else."""
        parts = self._modules[name].parts if name in self._modules else (name,)
        return sum(self._tensors[part].data.nbytes for part in parts)

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _GGUFTensors(Mapping[str, "QuantizedMatrix | Array"]):
    """The tensors of a GGUF file under its own names. Rows of q and k are in its order for rotary embedding."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> QuantizedMatrix | Array:
        found = self._file.read(name)
        return _checked(found, name) if isinstance(found, QuantizedMatrix) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)


def load(path: str | Path) -> Mapping[str, QuantizedMatrix | Array]:
    """The weights of a checkpoint: a directory in Hugging Face's format, a .safetensors file, or a .gguf file.

    Files are mapped into memory and read tensor by tensor, when one is looked up. How the weights are quantised is read from
    config.json (quantize_config.json and quant_config.json of older GPTQ and AWQ models): GPTQ, AWQ, compressed-tensors,
    bitsandbytes, fp8, mxfp4 and tilus' own format. Raises TilusError, by name, for anything else.
    """
    path = Path(path)
    if not path.exists():
        raise TilusError(
            f"the checkpoint {path} does not exist", hint="expected a directory, a .safetensors or a .gguf file"
        )
    if path.is_file() and path.suffix != ".safetensors":
        return _GGUFTensors(GGUFFile(path))
    return open_tensors(path)


def open_tensors(path: Path) -> CheckpointTensors:
    """`load` of a directory or a .safetensors file."""
    tensors = Tensors(path)
    settings = quantization_settings(path if path.is_dir() else path.parent)
    if settings is None:
        suspicious = next((name for name in tensors if name.endswith(_TELLTALES)), None)
        if suspicious is not None:
            raise TilusError(
                f"{path} has a tensor {suspicious}, but config.json has no quantization_config that says what it means"
            )
        return CheckpointTensors(path, None, tensors, {})
    method = str(settings.get("quant_method"))
    if method not in FORMATS:
        raise TilusError(f"{path} is quantised by {method!r}, but supported are {', '.join(FORMATS)} and GGUF files")
    return CheckpointTensors(path, method, tensors, FORMATS[method](tensors, settings))


def quantization_settings(directory: Path) -> dict[str, Any] | None:
    """How a directory says that its weights are quantised, or None."""
    config = read_json(directory / "config.json")
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if isinstance(found, dict):
            settings = cast(dict[str, Any], found)
            usual = "compressed-tensors" if key == "compression_config" else None
            return {"quant_method": usual} | settings if usual else settings
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        settings = read_json(directory / name)
        if settings:
            return {"quant_method": method} | settings
    if (directory / "hf_quant_config.json").is_file():
        return {"quant_method": "modelopt"}
    return None


def _checked(matrix: QuantizedMatrix, name: str) -> QuantizedMatrix:
    """The matrix, whose scales, minima and codes must stand for finite numbers."""
    for part, values in (("scales", matrix.scales), ("minima", matrix.mins)):
        if values is not None and not np.isfinite(values).all():
            raise TilusError(f"{name} has {part} that are not finite")
    every_code = np.arange(matrix.dtype.num_codes).astype(np.uint8)
    if matrix.table is not None:
        finite = np.isfinite(matrix.table)
    else:
        finite = np.isfinite(matrix.dtype.decode(every_code).astype(np.float32))
    if not finite.all() and not finite[matrix.codes].all():
        raise TilusError(f"{name} has codes of {matrix.dtype} that stand for no finite number")
    return matrix
