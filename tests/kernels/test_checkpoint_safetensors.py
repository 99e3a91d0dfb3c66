"""The safetensors reader against the package of that name; files cut or damaged anywhere are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tilus.errors import TilusError
from tilus.kernels.quantize import load
from tilus.kernels.quantize.checkpoint.safetensors import SafetensorsFile, StoredTensor
from tilus.kernels.quantize.checkpoint.writer import write_safetensors

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
OTHERS = (
    torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64,
)  # fmt: skip


def random_tensors() -> dict[str, torch.Tensor]:
    """Every type, with all bytes random where every byte has a meaning."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, torch.Tensor] = {}
    for dtype in (*FLOATS, *OTHERS):
        size = 24 * torch.empty(0, dtype=dtype).element_size()
        data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
        found[str(dtype)] = data.view(dtype).reshape(2, 3, 4)
    return found | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 5)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safetensors") / "model.safetensors"
    save_file(random_tensors(), path, {"format": "pt"})
    return path


def test_values_are_torchs(written: Path) -> None:
    """Floats of at most 32 bits become float32 exactly, the rest stays what it is."""
    file, expected = load(written), random_tensors()
    assert set(file) == set(expected)
    for name, tensor in expected.items():
        values = tensor.float() if tensor.dtype in FLOATS else tensor
        assert file[name].dtype == values.numpy().dtype
        np.testing.assert_array_equal(file[name], values.numpy())


def test_what_is_written_is_read_by_the_package(written: Path, tmp_path: Path) -> None:
    source = SafetensorsFile(written)
    write_safetensors(tmp_path / "copy.safetensors", [source[name] for name in source])
    copy = load_file(tmp_path / "copy.safetensors")
    for name, tensor in random_tensors().items():
        assert copy[name].dtype == tensor.dtype and copy[name].shape == tensor.shape
        assert torch.equal(
            copy[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        )


def test_a_file_cut_anywhere_is_refused(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [end for entry in parse(whole).values() for end in entry["data_offsets"]]
    sizes = {
        *range(200),
        *range(header_end - 20, header_end + 20),
        *(header_end + p + d for p in places for d in (-1, 0, 1)),
    }
    path = tmp_path / "model.safetensors"
    for size in sorted(size for size in sizes if size < len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(TilusError, match=r"is cut short|is not a safetensors file"):
            load(path)


def parse(whole: bytes) -> dict[str, dict[str, list[int]]]:
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__")
    return header


@pytest.mark.slow
def test_a_header_with_bytes_changed_is_read_or_refused(written: Path, tmp_path: Path) -> None:
    whole, path = written.read_bytes(), tmp_path / "model.safetensors"
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in range(0, header_end, 7):
        for change in (0x01, 0x10, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            try:
                for value in load(path).values():
                    assert value is not None
            except TilusError:
                continue


def raw(header: object, data: bytes = b"", *, text: bytes | None = None) -> bytes:
    encoded = json.dumps(header).encode() if text is None else text
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file: it does not start with the size of a JSON header"),
        (b"GGUF" * 10, "is not a safetensors file"),
        (raw(None, text=b"{]"), "has a damaged header: Expecting property name"),
        (raw(None, text=b'{"a": "\xff"}'), "has a damaged header: 'utf-8' codec"),
        (raw(None, text=b'{"a":' * 100_000), "has a damaged header: "),
        (raw({"a": 1}), "the header's entry of a is damaged: 1"),
        (raw({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "the header's entry of a is damaged"),
        (
            raw({"a": entry("F32", [1], 0, 8)}, bytes(8)),
            r"a of shape \[1\] and dtype F32 takes 4 bytes, but its place, 0 to 8",
        ),
        (raw({"a": entry("F4", [1], 0, 4)}, bytes(4)), "a has dtype F4, but supported are BOOL, U8, I8"),
        (raw({"a": entry("F32", [1], 4, 8)}, bytes(8)), "a begins at byte 4 of the data, expected 0"),
        (raw({"a": entry("F32", [1], 0, 4)}, bytes(8)), "has 8 bytes of data, but its tensors end at 4"),
        (raw({"a": entry("F32", [1], 0, 4)}, bytes(2)), "is cut short: 2 bytes of data, but a ends at 4"),
        (raw({"a": entry("F32", [2**60, 2**60], 0, 4)}, bytes(4)), "takes 5316911983139663491615228241121378304 bytes"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(TilusError, match=message):
        load(path)


def test_shards_are_opened_when_they_are_needed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load(tmp_path)
    assert list(tensors) == ["a", "b", "c"] and len(tensors) == 3 and "b" in tensors
    assert np.asarray(tensors["a"]).tolist() == [1, 1]
    with pytest.raises(TilusError, match=r"two\.safetensors cannot be read: No such file or directory"):
        tensors["b"]
    with pytest.raises(
        TilusError, match=r"one\.safetensors has no tensor c, although model\.safetensors\.index\.json says so"
    ):
        tensors["c"]
    with pytest.raises(TilusError, match="has no tensor d; it has 3 others"):
        tensors["d"]


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", 7, ""])
def test_an_index_names_only_files_beside_it(tmp_path: Path, place: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(TilusError, match=r"tensor a is in .*, expected the name of a file beside the index"):
        load(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        TilusError, match=r"does not exist\n  hint: expected a directory, a \.safetensors or a \.gguf file"
    ):
        load(tmp_path / "absent")
    with pytest.raises(TilusError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(tmp_path)
    files.write(tmp_path, {"a": np.ones(2)}, None)
    for text, message in (("{", "is not valid JSON"), ("[1]", "is not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(TilusError, match=message):
            load(tmp_path)


def test_nothing_is_read_before_it_is_used(tmp_path: Path) -> None:
    """A file of 1 TiB, all of it a hole, opens at once, and the small tensor at its end is read."""
    size = 2**40
    header = json.dumps(
        {"big": entry("F32", [size // 4], 0, size), "small": entry("F32", [2], size, size + 8)}
    ).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(size, 1)
        file.write(np.float32([3, 4]).tobytes())
    assert np.asarray(load(path)["small"]).tolist() == [3, 4]


def test_stored_tensors_know_their_bytes() -> None:
    tensor = StoredTensor("a", "U8", (2, 2), np.arange(4, dtype=np.uint8))
    assert tensor.codes().tolist() == [[0, 1], [2, 3]]
