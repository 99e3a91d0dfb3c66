"""Writing a quantised model in Hugging Face's directory format: shards, their index, and config.json that says what they mean.

The directory appears with its last file or not at all: it is written beside its place and renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.kernels.quantize.checkpoint import compressed_writer, native
from tilus.kernels.quantize.checkpoint.native import store_floats
from tilus.kernels.quantize.checkpoint.safetensors import StoredTensor
from tilus.kernels.quantize.checkpoint.tensors import INDEX, WHOLE
from tilus.kernels.quantize.checkpoint.writer import write_safetensors
from tilus.kernels.quantize.matrix import Floats, QuantizedMatrix

SHARD_NBYTES = 4 << 30
# A linear layer that has no tensor of its own when it shares the embedding's.
_TIED = {"lm_head"}


class CheckpointWriter:
    """`with CheckpointWriter(directory) as writer:` add tensors, then `finish`. Without `finish`, or after an exception, nothing
    is left. At most a shard is in memory.

    Matrices are stored as compressed-tensors where that expresses them, else in tilus' own format; all of one model must be
    alike in this. Raises TilusError when the directory exists, or when it cannot be written.
    """

    def __init__(self, directory: Path, shard_nbytes: int = SHARD_NBYTES) -> None:
        self._target = directory
        self._shard_nbytes = shard_nbytes
        self._pending: list[StoredTensor] = []
        self._shards: list[tuple[Path, list[str]]] = []
        self._format: str | None = None
        self._headers: dict[str, dict[str, Any]] = {}
        self._plain: list[str] = []
        self.nbytes = 0
        if directory.exists():
            raise TilusError(f"{directory} exists already", hint="choose another place, or remove it first")

    def __enter__(self) -> CheckpointWriter:
        parent = self._target.absolute().parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{self._target.name}.", dir=parent))
            self.path.chmod(0o755)
        except OSError as error:
            raise TilusError(f"cannot write into {parent}: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # after `finish` it is no longer there
        if isinstance(error, OSError):
            raise TilusError(f"cannot write {self._target}: {error.strerror}") from error

    def add(self, tensor: StoredTensor) -> None:
        """A tensor that stays as it is."""
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2:
            self._plain.append(tensor.name.removesuffix(".weight"))
        self._append([tensor])

    def add_floats(self, name: str, values: Floats, dtype: DataType) -> None:
        """A tensor of floats, rounded to f16, bf16 or f32."""
        limit = float(dtype.max_value)
        if values.size and not float(np.abs(values).max()) <= limit:
            raise TilusError(f"{name} has values beyond {limit:g}, the largest of {dtype}")
        self.add(store_floats(name, values, dtype))

    def add_matrix(self, module: str, matrix: QuantizedMatrix) -> None:
        """The quantised weight of a module: `X` for what would be `X.weight` unquantised."""
        format = compressed_writer.format_of(matrix) or native.METHOD
        if self._headers and format != self._format:
            raise TilusError(f"{module} would be stored as {format}, but the modules before it as {self._format}")
        self._format = format
        if format == native.METHOD:
            tensors, self._headers[module] = native.store(module, matrix)
        else:
            tensors, self._headers[module] = (
                compressed_writer.store(module, matrix),
                compressed_writer.weights_of(matrix),
            )
        self._append(tensors)

    def finish(self, config: dict[str, Any]) -> str:
        """Write what is left, and config.json with these settings; returns the name of the format."""
        self._flush()
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, 1):
            name = WHOLE if len(self._shards) == 1 else f"model-{number:05}-of-{len(self._shards):05}.safetensors"
            path.rename(self.path / name)
            weight_map |= dict.fromkeys(names, name)
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            (self.path / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        settings = config | {"quantization_config": self._quantization()}
        (self.path / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        self.path.rename(self._target)
        return self._format or "unquantised"

    def _append(self, tensors: list[StoredTensor]) -> None:
        nbytes = sum(tensor.data.size for tensor in tensors)
        if self._pending and sum(tensor.data.size for tensor in self._pending) + nbytes > self._shard_nbytes:
            self._flush()
        self._pending += tensors
        self.nbytes += nbytes

    def _flush(self) -> None:
        if self._pending or not self._shards:
            path = self.path / f"shard-{len(self._shards) + 1}"
            write_safetensors(path, self._pending)
            self._shards.append((path, [tensor.name for tensor in self._pending]))
            self._pending = []

    def _quantization(self) -> dict[str, Any]:
        if self._format == native.METHOD:
            return {"quant_method": native.METHOD, "version": native.VERSION, "modules": self._headers}
        alike: dict[str, list[str]] = {}
        for module, weights in self._headers.items():
            alike.setdefault(json.dumps(weights), []).append(module)
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if len(alike) == 1 else modules,
                "weights": json.loads(weights),
                "input_activations": None,
                "output_activations": None,
                "format": self._format,
            }
            for i, (weights, modules) in enumerate(alike.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self._format,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(dict.fromkeys([*self._plain, *(_TIED - self._headers.keys())])),
            "kv_cache_scheme": None,
        }
