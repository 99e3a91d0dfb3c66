"""Token ids of the real model, chat templates, and text from tokens without half characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import byte_tokenizer, write_tiny
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from serving import tokenizer as tokenizers_module
from serving.errors import RequestError
from serving.gguf_tokenizer import from_gguf
from serving.loader import default_model
from serving.tokenizer import Detokenizer, TemplateOptions, Tokenizer, from_huggingface
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile

FRANCE = (
    "1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 198 1 4093 198 1780 314 "
    "260 3575 282 4649 47 2 198 1 520 9531 198"
)
TRICKY = [
    "Hello world",
    " leading and  double   spaces ",
    "tabs\tand\nnew\r\nlines\n\n",
    "digits 1234567890 3.14",
    "naïve café ß ÄÖÜ",
    "漢字とかな 한국어",
    "🙂👩‍👩‍👧 emoji \U0001f1eb\U0001f1f7",
    "it's I'll you've we'd",
    "def f(x):\n    return x ** 2  # comment",
    "<|im_start|>user\nhi<|im_end|>",
    "\u200bzero\u00a0width\ufeff",
    "",
]


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return from_gguf(GGUFFile(default_model()))


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> Tokenizer:
    return from_huggingface(tiny_directory)


def test_golden_chat(smollm: Tokenizer) -> None:
    ids = smollm.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert " ".join(map(str, ids)) == FRANCE
    assert smollm.decode((504, 3575, 282, 4649, 314, 7042, 30, 2)) == "The capital of France is Paris."
    assert smollm.eos_ids == {2} and smollm.vocab_size == 49152


@pytest.mark.parametrize("text", TRICKY)
def test_text_survives(smollm: Tokenizer, text: str) -> None:
    ids = smollm.encode(text)
    assert smollm.fast.decode(list(ids), skip_special_tokens=False) == text
    assert b"".join(map(smollm.token_bytes, ids)).decode() == text
    assert all(0 <= token_id < 49152 for token_id in ids)


def test_digits_stand_alone_and_control_tokens_are_one(smollm: Tokenizer) -> None:
    assert len(smollm.encode("1234")) == 4
    assert smollm.encode("<|im_start|>") == (1,)
    assert smollm.decode((1, 2, 0)) == ""


@pytest.mark.slow
def test_ids_equal_the_reference_implementation(smollm: Tokenizer) -> None:
    from transformers import AutoTokenizer

    path = default_model()
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in TRICKY:
        assert list(smollm.encode(text)) == reference(text)["input_ids"], text
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    for conversation in (messages, messages[:1], [{"role": "system", "content": "s"}, *messages]):
        expected = reference.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        assert smollm.render_chat(conversation) == expected


def test_a_conversation_with_a_system_prompt(smollm: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert smollm.render_chat(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@given(st.lists(st.one_of(st.text(max_size=6).map(str.encode), st.binary(max_size=4)), max_size=8))
def test_pieces_make_up_the_whole_and_characters_stay_whole(parts: list[bytes]) -> None:
    """With single-byte tokens: text is shown as soon as it is complete, invalid bytes at the latest at the end."""
    fast = byte_tokenizer()
    symbols = {chr(c): c for c in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [byte for byte in range(256) if byte not in symbols.values()]
    symbols |= {chr(256 + i): byte for i, byte in enumerate(others)}
    token_of = {byte: fast.token_to_id(symbol) for symbol, byte in symbols.items()}
    data = b"".join(parts)
    ids = [token_of[byte] for byte in data]
    stream = Detokenizer(lambda chunk: fast.decode(chunk))
    pieces = [stream.push(token_id) for token_id in ids]
    shown = "".join(pieces)
    assert shown + stream.flush() == data.decode("utf-8", errors="replace") == fast.decode(ids)
    for count in range(len(ids) + 1):
        so_far, prefix = "".join(pieces[:count]), data[:count]
        assert data.decode("utf-8", errors="replace").startswith(so_far)
        try:
            complete = prefix.decode()
        except UnicodeDecodeError:
            continue
        if not complete.endswith("\ufffd"):
            assert so_far == complete


SYMBOLS = [
    "<s>",
    "\u2581",
    "\u2581\u2581",
    "\u2581the",
    "a",
    "n't",
    ".",
    "\u00e9",
    *(f"<0x{byte:02X}>" for byte in range(256)),
]


def sentencepiece() -> FastTokenizer:
    """Decodes as Llama 2 does: bytes in a row make characters, and the first space of a text is not shown."""
    fast = FastTokenizer(models.BPE({symbol: index for index, symbol in enumerate(SYMBOLS)}, [], byte_fallback=True))
    fast.add_special_tokens(SYMBOLS[:1])
    parts = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    fast.decoder = decoders.Sequence(list(parts))
    return fast


@given(st.lists(st.one_of(st.sampled_from(SYMBOLS[:8]), st.sampled_from("\u4f60\u597d\U0001f642\u00df")), max_size=12))
def test_pieces_make_up_the_whole_where_first_spaces_are_stripped(parts: list[str]) -> None:
    """Characters that the vocabulary lacks are bytes."""
    fast, symbols = sentencepiece(), list[str]()
    for part in parts:
        symbols += [part] if part in SYMBOLS else [f"<0x{byte:02X}>" for byte in part.encode()]
    ids = list(map(SYMBOLS.index, symbols))
    stream = Detokenizer(fast.decode)
    assert "".join(map(stream.push, ids)) + stream.flush() == fast.decode(ids)


@pytest.mark.parametrize("where", [0, 1, 2], ids=["first", "in a character", "behind text"])
def test_invisible_tokens_do_not_pile_up(where: int) -> None:
    """Models that may not stop tend to repeat their end token."""
    fast, windows = byte_tokenizer(), list[int]()

    def decode(ids: tuple[int, ...]) -> str:
        windows.append(len(ids))
        return fast.decode(ids)

    stream = Detokenizer(decode)
    text = fast.encode("ñaé").ids
    ids = [*text[:where], *[258] * 50, *text[where:], 258]
    assert "".join(stream.push(token_id) for token_id in ids) + stream.flush() == "ñaé"
    assert max(windows) <= 2 + 2  # bytes of a character behind those of one


def test_huggingface_settings(tiny: Tokenizer) -> None:
    assert tiny.eos_ids == {258} and tiny.vocab_size == 259
    assert tiny.special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert tiny.render_chat([{"role": "user", "content": "x"}]) == (
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tiny.encode("ab") == (tiny.fast.token_to_id("a"), tiny.fast.token_to_id("b"))


def test_where_eos_comes_from(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "m")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 7]}))
    assert from_huggingface(directory).eos_ids == {258, 7}
    (directory / "generation_config.json").unlink()
    write_tiny(directory, eos_token_id=None)
    assert from_huggingface(directory).eos_ids == {258}  # the tokenizer's own
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(TilusError, match="but one of the three must say where answers end"):
        from_huggingface(directory)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, \n"}]


def test_the_end_of_a_rendered_chat(tiny: Tokenizer) -> None:
    """It begins an answer, or ends with the last message's end, or with its last character, blanks included."""
    begun = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nWell, \n"
    assert tiny.render_chat(CHAT) == begun + "<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.render_chat(CHAT, (), TemplateOptions(starts_answer=False)) == begun + "<|im_end|>\n"
    assert tiny.render_chat(CHAT, (), TemplateOptions(False, continues_final=True)) == begun
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert tiny.render_chat(CHAT, tools, TemplateOptions(False, continues_final=True)).endswith(begun)


def test_variables_for_templates(tiny: Tokenizer) -> None:
    template = "{{ mood }}{{ eos_token }}{{ messages | length }}"
    other = Tokenizer(tiny.fast, tiny.eos_ids, template, tiny.special, tiny.vocab_size)
    options = TemplateOptions(variables={"mood": "calm", "eos_token": "x", "messages": [], "add_generation_prompt": 5})
    assert other.render_chat(CHAT, (), options) == "calm<|im_end|>2"


@pytest.mark.parametrize(
    ("template", "count"), [("{{ messages[0].content }}", 0), ("{{ messages[1].content * 2 }}", 2)]
)
def test_a_template_that_hides_the_last_message(tiny: Tokenizer, template: str, count: int) -> None:
    other = Tokenizer(tiny.fast, tiny.eos_ids, template, tiny.special, tiny.vocab_size)
    with pytest.raises(RequestError) as caught:
        other.encode_chat(CHAT, (), TemplateOptions(False, continues_final=True))
    assert caught.value.param == "continue_final_message"
    assert caught.value.message == (
        f"the model's chat template shows the last message {count} times, but must once for continue_final_message"
    )


def test_the_template_file_comes_first(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "m")
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert from_huggingface(directory).render_chat([{"role": "user", "content": "x"}]) == "<|im_start|>x"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('take turns') }}", "the model's chat template refuses the messages: take turns"),
        ("{{ messages.append(1) }}", "refuses the messages: "),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages: "),
        (None, "this model has no chat template; use /v1/completions"),
    ],
)
def test_templates_are_contained(tiny: Tokenizer, template: str | None, message: str) -> None:
    other = Tokenizer(tiny.fast, tiny.eos_ids, template, tiny.special, tiny.vocab_size)
    with pytest.raises(RequestError) as caught:
        other.encode_chat([{"role": "user", "content": "x"}])
    assert message in str(caught.value)


def test_a_broken_template_is_the_models_fault(tiny: Tokenizer) -> None:
    other = Tokenizer(tiny.fast, tiny.eos_ids, "{% if %}", tiny.special, tiny.vocab_size)
    with pytest.raises(TilusError, match="the model's chat template is not valid jinja"):
        other.render_chat([])


def test_unknown_tokenizers_are_named() -> None:
    file = GGUFFile(default_model())
    file.metadata["tokenizer.ggml.pre"] = "bloom"
    with pytest.raises(TilusError) as caught:
        from_gguf(file)
    assert str(caught.value) == (
        f"{file.path}: its tokenizer is 'gpt2' with tokenizer.ggml.pre = 'bloom', but supported is 'llama', or 'gpt2' with "
        "'smollm' or 'gpt-2' or 'qwen2' or 'llama-bpe' or 'default'\n"
        "  hint: use the same model in Hugging Face's format, whose tokenizer.json says everything"
    )


def test_a_tokenizer_that_contradicts_itself() -> None:
    file = GGUFFile(default_model())
    file.metadata["tokenizer.ggml.merges"] = ["absent☃ a"]
    with pytest.raises(TilusError, match=r"its tokenizer contradicts itself: .*absent☃"):
        from_gguf(file)


def test_bos_is_added_where_the_file_says_so() -> None:
    file = GGUFFile(default_model())
    file.metadata["tokenizer.ggml.add_bos_token"] = True
    fast = from_gguf(file)
    assert fast.encode("Hello") == (1, 19556)
    assert fast.encode_chat([{"role": "user", "content": "a"}])[:2] == (1, 9690)  # the template has its own


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TilusError, match=r"has no tokenizer\.json, the only tokenizer format that is supported"):
        tokenizers_module.from_huggingface(tmp_path)
