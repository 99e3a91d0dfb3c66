"""Models of random weights: in the shape of their config.json, of numbers that a step computes with, of the size announced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_llama import CPU, TINY, tiny_engine

import tilus.kernels
from serving.config import parse_args
from serving.core import Request, SamplingParams
from serving.dummy import open_dummy
from serving.memory import expected_size, size_of
from serving.model import build_model
from serving.packing import pack_weights
from tilus.dtypes import dtype
from tilus.errors import TilusError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"tie_word_embeddings": False}))
    return tmp_path


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", ["int4", "uint3", "int8", "float6_e3m2", "float8_e4m3"])
def test_answers_of_a_random_model(config: Path, name: str) -> None:
    checkpoint = open_dummy(config, dtype(name))
    packed = pack_weights(checkpoint, tilus.kernels, CPU)
    assert expected_size(checkpoint, tilus.kernels, CPU) == size_of(packed)
    engine = tiny_engine(build_model(checkpoint.config, tilus.kernels, packed), checkpoint, page_size=16)
    engine.add(Request("r", (1, 2, 3), SamplingParams(max_tokens=8, temperature=0)))
    reasons = [output.finish_reason for _ in range(8) for output in engine.step()]
    assert reasons == [None] * 7 + ["length"], "no number, or no end by itself"


def test_every_token_is_seen_and_texts_are_bytes(config: Path) -> None:
    """A stream of tokens that show nothing is no measure of a server."""
    tokenizer = open_dummy(config, dtype("int4")).tokenizer
    assert tokenizer.vocab_size == TINY["vocab_size"] > 256
    texts = {tokenizer.decode((token_id,)) for token_id in range(256, tokenizer.vocab_size)}
    assert len(texts) == tokenizer.vocab_size - 256 and all(texts)
    assert len(tokenizer.encode("añz")) == 4 and tokenizer.decode(tokenizer.encode("añz")) == "añz"


def test_groups_and_rows(config: Path) -> None:
    weights = open_dummy(config / "config.json", dtype("int4"), group=16).weights
    matrix = weights.matrix("blk.1.ffn_up")
    assert matrix.shape == (TINY["intermediate_size"], TINY["hidden_size"]) and matrix.group == 16
    assert torch.from_numpy(matrix.codes).unique(dim=0).shape[0] == len(matrix.codes)
    spread = matrix.dequantize().std() * TINY["hidden_size"] ** 0.5
    assert 0.9 < spread < 1.1
    with pytest.raises(TilusError, match=r"rows of 96 weights in groups of 36, expected a multiple"):
        open_dummy(config, dtype("int4"), group=36).weights.matrix("blk.0.attn_q")


def test_what_is_missing_or_not_supported_is_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(TilusError, match=r"there is no .*absent\n  hint: --dummy takes a config.json"):
        open_dummy(tmp_path / "absent", dtype("int4"))
    (config / "config.json").write_text("{")
    with pytest.raises(TilusError, match="is not valid JSON"):
        open_dummy(config, dtype("int4"))
    (config / "config.json").write_text(json.dumps(TINY | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(TilusError, match="architecture 'GPT2LMHeadModel'"):
        open_dummy(config, dtype("int4"))
    assert parse_args(["--model", "m", "--dummy"]).dummy and not parse_args([]).dummy
