"""The tokenizer in a GGUF file's metadata: byte-pair encoding of bytes ("gpt2"), or SentencePiece's of characters ("llama")."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from serving.tokenizer import Tokenizer
from tilus.errors import TilusError
from tilus.kernels.quantize import GGUFFile

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
# Ends of a turn in a chat, which end an answer beside the token that the file names.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
_SPACE = "\u2581"


def _words(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Text cut by patterns, one after the other, and then into bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _with_digits(digits: str) -> pre_tokenizers.PreTokenizer:
    """How OpenAI's cl100k cuts text, but for runs of digits."""
    return _words(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
# How text is cut before byte-pair merging, by tokenizer.ggml.pre. Only what is tested is listed.
_PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
    "gpt-2": _BYTE_LEVEL,
    "qwen2": _with_digits(r"\p{N}"),
    "llama-bpe": _with_digits(r"\p{N}{1,3}"),
    "default": _words(  # of files whose converter did not know better
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ),
}
# Of a word that is a token, the merges are not looked at; and there is a beginning unless the file says otherwise.
_LLAMA_3 = "llama-bpe"


def from_gguf(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a file. Raises TilusError for a kind that is not supported, and for one that contradicts itself."""
    tokens, types = file.texts("tokenizer.ggml.tokens"), file.integers("tokenizer.ggml.token_type")
    kind, pre = file.text("tokenizer.ggml.model"), file.text("tokenizer.ggml.pre", "default")
    try:
        if kind == "llama":
            fast = _sentencepiece(file, tokens, types)
        elif kind == "gpt2" and pre in _PRE_TOKENIZERS:
            fast = _byte_pairs(file, tokens, pre)
        else:
            raise TilusError(
                f"{file.path}: its tokenizer is {kind!r} with tokenizer.ggml.pre = {pre!r}, but supported is 'llama', or "
                "'gpt2' with " + " or ".join(repr(name) for name in _PRE_TOKENIZERS),
                hint="use the same model in Hugging Face's format, whose tokenizer.json says everything",
            )
    except TilusError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise TilusError(f"{file.path}: its tokenizer contradicts itself: {error}") from error
    named = list(zip(tokens, types))
    fast.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in named if kind == _CONTROL])
    fast.add_tokens([AddedToken(t, normalized=False) for t, kind in named if kind == _USER_DEFINED])
    special = {name: _token(file, tokens, name) for name in ("bos", "eos") if _id(file, name) >= 0}
    if file.flag("tokenizer.ggml.add_bos_token", kind == "llama" or pre == _LLAMA_3) and "bos" in special:
        fast.post_processor = processors.TemplateProcessing(
            single=[special["bos"], "$A"], special_tokens=[(special["bos"], _id(file, "bos"))]
        )
    ends = {_id(file, "eos"), _id(file, "eot")} - {-1}
    ends |= {index for index, (token, kind) in enumerate(named) if kind == _CONTROL and token in _ENDS}
    return Tokenizer(
        fast=fast,
        eos_ids=frozenset(ends),
        chat_template=file.text("tokenizer.chat_template", "") or None,
        special={f"{name}_token": token for name, token in special.items()},
        vocab_size=len(tokens),
    )


def _id(file: GGUFFile, name: str) -> int:
    """-1 where the file has no such token."""
    return file.integer(f"tokenizer.ggml.{name}_token_id", -1)


def _token(file: GGUFFile, tokens: Sequence[str], name: str) -> str:
    index = _id(file, name)
    if index >= len(tokens):
        raise TilusError(f"{file.path}: its tokenizer contradicts itself: {name} is token {index} of {len(tokens)}")
    return tokens[index]


def _byte_pairs(file: GGUFFile, tokens: Sequence[str], pre: str) -> FastTokenizer:
    pairs = [merge.partition(" ") for merge in file.texts("tokenizer.ggml.merges")]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(left, right) for left, _, right in pairs],
        ignore_merges=pre == _LLAMA_3,
    )
    fast = FastTokenizer(model)
    if pre == "qwen2":
        fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = _PRE_TOKENIZERS[pre]
    fast.decoder = decoders.ByteLevel()
    return fast


def _sentencepiece(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> FastTokenizer:
    """Characters are joined to the token of the best score first; what is no token in the end becomes bytes. That is byte-pair
    encoding with a merge for each way to cut a token into two, in the order of scores."""
    scores = file.numbers("tokenizer.ggml.scores")
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for index, token in sorted(enumerate(tokens), key=lambda entry: -scores[entry[0]])
        if types[index] not in (_UNKNOWN, _CONTROL)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    unknown = next((token for token, kind in zip(tokens, types) if kind == _UNKNOWN), None)
    fast = FastTokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return fast
