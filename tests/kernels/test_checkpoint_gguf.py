"""The GGUF reader and the block formats, against the `gguf` package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from serving.loader import default_model, open_checkpoint
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile, QuantizedMatrix, load
from tilus.kernels.quantize.checkpoint import ggml

FORMATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_values_are_ggmls_bit_for_bit(name: str, data: st.DataObject) -> None:
    kind = GGMLQuantizationType[name]
    format = ggml.block_format(kind, "t")
    assert (format.block_size, format.block_nbytes) == gguf.GGML_QUANT_SIZES[kind]
    num_rows, num_blocks = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    size = num_rows * num_blocks * format.block_nbytes
    rows = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(num_rows, -1)
    with np.errstate(all="ignore"):  # random scales may be inf or NaN
        expected = rows.view(np.float32) if name == "F32" else gguf.dequantize(rows, kind)
        found = ggml.to_floats(rows, format)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_of_a_block_matters(name: str) -> None:
    """Flipping any bit of a block changes what both see, in the same way."""
    kind = GGMLQuantizationType[name]
    format = ggml.block_format(kind, "t")
    block = np.random.default_rng(3).integers(0, 256, (1, format.block_nbytes), dtype=np.uint8)
    flipped = np.repeat(block, format.block_nbytes * 8, axis=0)
    bits = np.arange(len(flipped))
    flipped[bits, bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
    with np.errstate(all="ignore"):
        expected = flipped.view(np.float32) if name == "F32" else gguf.dequantize(flipped, kind)
        np.testing.assert_array_equal(ggml.to_floats(flipped, format), expected)


def write(path: Path) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -3)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1 / 3)
    writer.add_bool("yes", True)
    writer.add_string("text", "größer ☃")
    writer.add_array("texts", ["a", "", "ß"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_custom_alignment(64)
    writer.add_tensor("wide", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.add_tensor("half", np.arange(5, dtype=np.float16))
    blocks = np.arange(3 * 2 * 18, dtype=np.uint8).reshape(3, 36)
    writer.add_tensor("packed", blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "all-types.gguf")


def test_reads_what_the_reference_writes(written: Path) -> None:
    file = GGUFFile(written)
    assert file.metadata | {"general.architecture": "llama"} == file.metadata
    expected = {"u8": 200, "i8": -5, "u16": 60000, "i16": -3, "u32": 2**32 - 1, "i32": -(2**31), "u64": 2**64 - 1}
    expected |= {"i64": -(2**63), "f32": 0.5, "f64": 1 / 3, "yes": True, "text": "größer ☃", "texts": ["a", "", "ß"]}
    expected |= {"numbers": [1, -2, 3], "nested": [[1, 2], [3]], "general.alignment": 64}
    assert {key: file.metadata[key] for key in expected} == expected
    assert {name: (t.shape, t.format.name) for name, t in file.tensors.items()} == {
        "wide": ((2, 3, 4), "F32"),
        "half": ((5,), "F16"),
        "packed": ((3, 64), "Q4_0"),
    }
    np.testing.assert_array_equal(file.tensors["wide"].rows.view(np.float32).reshape(2, 3, 4).ravel(), np.arange(24))
    np.testing.assert_array_equal(file.tensors["half"].rows.view(np.float16)[0], np.arange(5))
    np.testing.assert_array_equal(file.tensors["packed"].rows.ravel(), np.arange(108))


def test_a_file_cut_anywhere_is_refused(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    last = max(t.rows.ctypes.data + t.rows.nbytes for t in GGUFFile(written).tensors.values())
    first = min(t.rows.ctypes.data for t in GGUFFile(written).tensors.values())
    assert last > first
    path = tmp_path / "cut.gguf"
    end_of_data = len(whole.rstrip(b"\0"))
    for size in range(end_of_data):
        path.write_bytes(whole[:size])
        with pytest.raises(TilusError, match=r"is cut short|is not a GGUF file"):
            GGUFFile(path)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"GGML", "is not a GGUF file: it starts with b'GGML', expected b'GGUF'"),
        (4, b"\x01\0\0\0", "has GGUF version 1, expected 2 or 3 (little endian)"),
        (4, b"\0\0\0\x03", "has GGUF version 50331648, expected 2 or 3 (little endian)"),
    ],
)
def test_other_files_are_refused(written: Path, tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    data = bytearray(written.read_bytes())
    data[offset : offset + len(value)] = value
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    with pytest.raises(TilusError) as caught:
        GGUFFile(path)
    assert str(caught.value) == f"{path} {message}"


def write_tensor(path: Path, name: str, data: np.ndarray, kind: GGMLQuantizationType) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    path = write_tensor(
        tmp_path / "q2.gguf", "blk.0.attn_q.weight", np.zeros((1, 84), np.uint8), GGMLQuantizationType.Q2_K
    )
    with pytest.raises(TilusError) as caught:
        GGUFFile(path)
    assert str(caught.value) == (
        "tensor blk.0.attn_q.weight has GGUF type Q2_K (id 10), "
        "but supported are F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16\n"
        "  hint: convert the model to one of these with llama-quantize"
    )


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0"])
def test_load_reads_what_ggml_quantises(tmp_path: Path, name: str) -> None:
    kind = GGMLQuantizationType[name]
    weight = np.random.default_rng(5).normal(0, 1, (6, 64)).astype(np.float32)
    packed = gguf.quantize(weight, kind)
    tensors = load(write_tensor(tmp_path / "one.gguf", "blk.0.ffn_up.weight", packed, kind))
    assert list(tensors) == ["blk.0.ffn_up.weight"] and len(tensors) == 1
    matrix = tensors["blk.0.ffn_up.weight"]
    assert isinstance(matrix, QuantizedMatrix) and matrix.group == 32 and matrix.scale_dtype.name == "f16"
    np.testing.assert_array_equal(matrix.dequantize(), gguf.dequantize(packed, kind))


def test_load_refuses_quantised_tensors_that_are_no_matrices_and_scales_that_are_no_numbers(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    path = write_tensor(tmp_path / "3d.gguf", "experts", np.zeros((2, 3, 34), np.uint8), kind)
    with pytest.raises(TilusError, match=r"experts is stored as Q8_0 with shape \[2, 3, 32\], but .* must be matrices"):
        load(path)["experts"]
    path = write_tensor(tmp_path / "nan.gguf", "w", np.full((1, 34), 255, np.uint8), kind)
    with pytest.raises(TilusError, match="w has scales that are not finite"):
        load(path)["w"]


@pytest.mark.slow
def test_a_file_with_any_byte_changed_is_read_or_refused(written: Path, tmp_path: Path) -> None:
    """Damage in the header never ends in another exception, nor in endless work."""
    whole, path = written.read_bytes(), tmp_path / "damaged.gguf"
    for place in range(min(len(whole), 1200)):
        for change in (0x01, 0x80, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            try:
                file = GGUFFile(path)
                for name in file.tensors:
                    file.read(name)
            except TilusError:
                continue


def test_arrays_nested_without_end_are_refused(tmp_path: Path) -> None:
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
    nested = ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 5000
    path = tmp_path / "nested.gguf"
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + counts + key + nested)
    with pytest.raises(TilusError, match="are nested more than 8 deep"):
        GGUFFile(path)


def test_type_names_are_ggmls() -> None:
    for kind in GGMLQuantizationType:
        if kind.name in FORMATS:
            assert ggml.block_format(kind, "t").name == kind.name
        elif kind in ggml._OTHER_NAMES:
            assert ggml._OTHER_NAMES[kind] == kind.name


def test_missing_and_mistyped_keys_are_named(written: Path) -> None:
    file = GGUFFile(written)
    for call, message in (
        (lambda: file.integer("absent"), "metadata key absent is missing, expected int"),
        (lambda: file.integer("text"), "metadata key text is 'größer ☃', expected int"),
        (lambda: file.texts("numbers"), "metadata key numbers holds int, expected str"),
        (lambda: file.tensor("absent"), "has no tensor absent; it has 3 others"),
    ):
        with pytest.raises(TilusError) as caught:
            call()
        assert message in str(caught.value)


@pytest.fixture(scope="module")
def reference() -> gguf.GGUFReader:
    return gguf.GGUFReader(default_model())


def test_the_real_file_has_the_same_metadata_and_tensors(reference: gguf.GGUFReader) -> None:
    file = GGUFFile(default_model())
    fields = {key: field for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert set(file.metadata) == set(fields)
    for key, value in file.metadata.items():
        if not isinstance(value, list) or len(value) < 100:
            assert fields[key].contents() == value, key
    assert file.integers("tokenizer.ggml.token_type") == fields["tokenizer.ggml.token_type"].contents()
    tokens = fields["tokenizer.ggml.tokens"]
    for index in range(0, 49152, 97):
        assert bytes(tokens.parts[tokens.data[index]]).decode() == file.texts("tokenizer.ggml.tokens")[index]
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        found = file.tensor(tensor.name)
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert found.format.name == tensor.tensor_type.name
        assert np.array_equal(found.rows, tensor.data.view(np.uint8).reshape(found.rows.shape))


@pytest.mark.slow
def test_the_real_file_has_the_same_values(reference: gguf.GGUFReader) -> None:
    file = GGUFFile(default_model())
    for tensor in reference.tensors:
        found = file.tensor(tensor.name)
        values = ggml.to_floats(found.rows, found.format)
        assert np.array_equal(values, gguf.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)), (
            tensor.name
        )


def test_q_and_k_rows_come_in_halves(reference: gguf.GGUFReader) -> None:
    """The first half of each head's rows are the file's even rows, the second half its odd ones; others stay."""
    weights = open_checkpoint(default_model()).weights
    tensors = {tensor.name: tensor for tensor in reference.tensors}
    for name, heads in (("attn_q", 9), ("attn_k", 3), ("attn_v", 0), ("attn_output", 0)):
        tensor = tensors[f"blk.5.{name}.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        for head in range(heads):
            rows = expected[64 * head : 64 * head + 64]
            expected[64 * head : 64 * head + 64] = np.concatenate([rows[0::2], rows[1::2]])
        np.testing.assert_array_equal(weights.matrix(f"blk.5.{name}").dequantize(), expected)
