"""Tokenizers of GGUF files: words against the originals' own code, SentencePiece against its definition."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import byte_tokenizer
from tokenizers import pre_tokenizers

from serving.gguf_tokenizer import from_gguf
from serving.tokenizer import Tokenizer
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile

ALPHABET = "aZé中🙂'sdlvet’0123456789 \t\n\r.,!?$+^~|-_("
texts = st.lists(
    st.sampled_from([*ALPHABET, "  ", "\n\n", "'re", "I'LL", "e\u0301", "12345", "...", " word", "\u00a0"]), max_size=25
).map("".join)


def write(path: Path, **metadata: object) -> GGUFFile:
    writer = GGUFWriter(str(path), "llama")
    for name, value in metadata.items():
        key = f"tokenizer.ggml.{name}"
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def byte_pairs(path: Path, pre: str, **changes: object) -> Tokenizer:
    """Bytes, three special tokens, and words that merges make, of which `Ġthe` has no merge."""
    vocabulary = [token for token, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda entry: entry[1])]
    metadata = {
        "model": "gpt2", "pre": pre, "tokens": [*vocabulary, "Ġt", "Ġth", "Ġthe"], "token_type": [1] * 256 + [3] * 3 + [1] * 3,
        "merges": ["Ġ t", "Ġt h"], "bos_token_id": 257, "eos_token_id": 258,
    }  # fmt: skip
    return from_gguf(write(path, **(metadata | changes)))


def words_of_transformers(pre: str) -> Callable[[str], list[str]]:
    """How the tokenizer that a name stands for cuts text."""
    from transformers import GPT2Tokenizer, Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if pre == "llama-bpe":
        pattern = regex.compile(inspect.signature(TikTokenConverter).parameters["pattern"].default)
        return lambda text: [match[0] for match in pattern.finditer(text)]
    fast = {"gpt-2": GPT2Tokenizer, "qwen2": Qwen2Tokenizer}[pre](vocab={}, merges=[]).backend_tokenizer

    def words(text: str) -> list[str]:
        normal = text if fast.normalizer is None else fast.normalizer.normalize_str(text)
        return [decoded(word) for word, _ in fast.pre_tokenizer.pre_tokenize_str(normal)]

    return words


def default_words(text: str) -> list[str]:
    """llama.cpp's patterns for files without a name: each cuts the words that the ones before it have left."""
    words = [text]
    for pattern in (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ):
        words = [piece for word in words for piece in regex.split(f"({pattern})", word) if piece]
    return words


def decoded(word: str) -> str:
    """Bytes that are written as characters, as text again."""
    table = byte_tokenizer()
    return table.decode([table.token_to_id(symbol) for symbol in word])


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "default"])
def test_words_are_those_of_the_original(tmp_path: Path, pre: str) -> None:
    fast = byte_pairs(tmp_path / "t.gguf", pre).fast
    expected = default_words if pre == "default" else words_of_transformers(pre)

    @settings(max_examples=60)
    @given(texts)
    def check(text: str) -> None:
        normal = text if fast.normalizer is None else fast.normalizer.normalize_str(text)
        found = [decoded(word) for word, _ in fast.pre_tokenizer.pre_tokenize_str(normal)]
        assert found == expected(text)
        assert fast.decode(fast.encode(text, add_special_tokens=False).ids) == normal

    check()


def test_what_follows_from_the_name(tmp_path: Path) -> None:
    """Llama 3 takes a word that is a token whatever merges say, and begins with bos; others only where the file says so."""
    llama = byte_pairs(tmp_path / "a.gguf", "llama-bpe")
    assert llama.encode(" the") == (257, 261) and llama.fast.encode(" the", add_special_tokens=False).ids == [261]
    qwen = byte_pairs(tmp_path / "b.gguf", "qwen2")
    assert qwen.encode(" the") == (260, qwen.fast.token_to_id("e"))
    assert byte_pairs(tmp_path / "c.gguf", "qwen2", add_bos_token=True).encode(" t") == (257, 259)


def test_all_ends_of_a_turn_end_an_answer(tmp_path: Path) -> None:
    """What the file names as eos and eot, and tokens that are known to end a turn."""
    assert byte_pairs(tmp_path / "a.gguf", "qwen2", eos_token_id=256).eos_ids == {256, 258}
    assert byte_pairs(tmp_path / "b.gguf", "qwen2", eot_token_id=257).eos_ids == {257, 258}


def test_a_token_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(TilusError, match="its tokenizer contradicts itself: eos is token 300 of 262"):
        byte_pairs(tmp_path / "a.gguf", "qwen2", eos_token_id=300)


PIECES = {"▁a": -1.0, "bc": -2.0, "ab": -3.0, "▁ab": -4.0, "cb": -5.0, "abc": -6.0, "▁▁": -7.0, "é": -8.0}
CHARACTERS = ["▁", "a", "b", "c"]
SENTENCE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS, *PIECES, "<user>"]
KINDS = [2, 3, 3, *[6] * 256, *[1] * (len(CHARACTERS) + len(PIECES)), 4]


def sentencepiece(path: Path, **changes: object) -> Tokenizer:
    scores = [0.0] * 259 + [-100.0] * len(CHARACTERS) + [*PIECES.values()] + [0.0]
    metadata = {
        "model": "llama",
        "tokens": SENTENCE,
        "scores": scores,
        "token_type": KINDS,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return from_gguf(write(path, **(metadata | changes)))


def joined(text: str) -> list[str]:
    """SentencePiece's rule: the two neighbours that make the piece of the best score are joined, the first ones among equals,
    until no two make a piece; what is no piece then is its bytes."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-PIECES[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in PIECES]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    known = {*PIECES, *CHARACTERS}
    return [piece for s in symbols for piece in ([s] if s in known else [f"<0x{byte:02X}>" for byte in s.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_joins_the_best_first(tmp_path: Path, prefix: bool) -> None:
    tokenizer = sentencepiece(tmp_path / "t.gguf", add_space_prefix=prefix)

    @settings(max_examples=60)
    @given(st.text("abc é中\n", max_size=14))
    def check(text: str) -> None:
        found = [SENTENCE[index] for index in tokenizer.encode(text)]
        assert found == ["<s>", *(joined(" " + text if prefix and text else text))]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        shown = " " + text if prefix and text else text  # tokens have the space that comes in front of a text
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)[1:])).decode() == shown

    check()


def test_tokens_of_users_are_found_in_sentences(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path / "t.gguf", add_space_prefix=False, add_bos_token=False)
    assert [SENTENCE[index] for index in tokenizer.encode("ab<user>c</s>")] == ["ab", "<user>", "c", "</s>"]


def test_words_are_bytes() -> None:
    """The oracle's own decoding."""
    word = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é 🙂")[0][0]
    assert decoded(word) == "é 🙂"
