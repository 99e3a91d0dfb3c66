"""Writing safetensors files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tilus.kernels.quantize.checkpoint.safetensors import StoredTensor


def write_safetensors(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """A file with these tensors; those of a model's size are written as they are, without a copy in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.data.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.data.data)
