"""The decoder against transformers, and its independence of chunks, pages and company."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_llama import CPU, TINY, tiny_engine, tiny_tensors, write_tiny
from torch_kernels import TorchKernels

from serving.build import open_model
from serving.config import parse_args
from serving.core import Batch, BatchItem, Request, SamplingParams
from serving.errors import RequestError
from serving.layers import Dense
from serving.loader import Checkpoint, open_checkpoint
from serving.model import Model, load_model
from serving.quantize import Rounding
from serving.step_inputs import step_tensors
from tilus.dtypes import dtype
from tilus.errors import TilusError
from tilus.kernels.quantize import QuantizedMatrix

GREEDY = SamplingParams(temperature=0)
PAGE_SIZE = 4


class WideKernels(TorchKernels):
    """The same kernels without rounding activations to float16."""

    activations = (torch.float32,)

    def linear(self, x, weight, *, out_dtype=torch.float32, **options):
        return super().linear(x, weight, out_dtype=torch.float32, **options)

    def round(self, values, dtype=None):
        return values.float()


def new_pool(dtype: torch.dtype, pages: int = 40) -> tuple[torch.Tensor, ...]:
    """Poisoned: what is read without having been written shows."""
    shape = (pages, TINY["num_hidden_layers"], 2, PAGE_SIZE, TINY["num_key_value_heads"], TINY["head_dim"])
    return torch.full(shape, torch.nan, dtype=dtype).unbind(1)


def logits_of(
    model: Model, tokens: list[int], chunks: list[int], pages: list[int], pool: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Logits after each chunk, [number of chunks, vocabulary]; the tokens go through one chunk a step."""
    rows, start = [], 0
    for size in chunks:
        item = BatchItem("r", tuple(tokens[start : start + size]), start, tuple(pages), GREEDY, 0)
        rows.append(model.forward(step_tensors(Batch((item,)), PAGE_SIZE, CPU), pool))
        start += size
    return torch.cat(rows)


@pytest.fixture(scope="module")
def reference(tiny_directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(reference) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([prompt()])).logits[0]


def prompt(length: int = 45) -> list[int]:
    return np.random.default_rng(11).integers(0, 256, length).tolist()


def test_equals_transformers_without_rounding(tiny_checkpoint: Checkpoint, expected: torch.Tensor) -> None:
    """Same computation, same weights: only the order of float32 sums differs."""
    model = load_model(tiny_checkpoint, WideKernels(), CPU)
    found = logits_of(model, prompt(), [1] * 45, list(range(12)), new_pool(torch.float32))
    assert expected.abs().max() > 5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_float16_activations_stay_within_their_rounding(tiny_model: Model, expected: torch.Tensor) -> None:
    """Each layer rounds 8 tensors to float16, each value by at most 2^-11 of itself, and norms keep relative errors as
    they are: with the embedding and the last norm, errors add to at most (8 layers + 2) * 2^-11 of the logits' size.
    A wrong computation is off by that size itself."""
    found = logits_of(tiny_model, prompt(), [1] * 45, list(range(12)), new_pool(torch.float16))
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < (8 * TINY["num_hidden_layers"] + 2) * 2**-11
    top = expected.topk(2).values
    sure = top[:, 0] - top[:, 1] > 8 * error * expected.square().mean().sqrt()
    assert sure.sum() > 30
    assert torch.equal(found.argmax(-1)[sure], expected.argmax(-1)[sure])


@settings(max_examples=25)
@given(st.data())
def test_chunks_and_pages_do_not_matter(tiny_model: Model, data: st.DataObject) -> None:
    """However a prompt is cut, and wherever its pages lie, the last logits are the same bits."""
    tokens = prompt(data.draw(st.integers(1, 30)))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=4)) - {len(tokens)})
    sizes = np.diff([0, *cuts, len(tokens)]).tolist()
    pages = data.draw(st.permutations(range(40)))[: -(-len(tokens) // PAGE_SIZE)]
    whole = logits_of(tiny_model, tokens, [len(tokens)], list(range(10)), new_pool(torch.float16))
    parts = logits_of(tiny_model, tokens, sizes, pages, new_pool(torch.float16))
    assert torch.equal(parts[-1], whole[-1])


def test_company_does_not_matter(tiny_model: Model) -> None:
    """A batch of a decode, a chunk inside a prompt and a whole prompt gives each what it gets alone."""
    prompts = {"decode": prompt(9), "inside": prompt(20)[5:], "whole": prompt(13)[2:]}
    pool = new_pool(torch.float16)
    pages = {"decode": (3, 1, 30), "inside": (2, 9, 8, 7), "whole": (0, 20, 21)}
    alone = {
        name: logits_of(tiny_model, tokens, [len(tokens)], list(range(10)), new_pool(torch.float16))[0]
        for name, tokens in prompts.items()
    }
    logits_of(tiny_model, prompts["decode"][:-1], [8], list(pages["decode"]), pool)
    items = (
        BatchItem("decode", tuple(prompts["decode"][-1:]), 8, pages["decode"], GREEDY, 0),
        BatchItem("inside", tuple(prompts["inside"][:6]), 0, pages["inside"], None, 0),
        BatchItem("whole", tuple(prompts["whole"]), 0, pages["whole"], GREEDY, 0),
    )
    found = tiny_model.forward(step_tensors(Batch(items), PAGE_SIZE, CPU), pool)
    assert torch.equal(found, torch.stack([alone["decode"], alone["whole"]]))
    rest = BatchItem("inside", tuple(prompts["inside"][6:]), 6, pages["inside"], GREEDY, 0)
    found = tiny_model.forward(step_tensors(Batch((rest,)), PAGE_SIZE, CPU), pool)
    assert torch.equal(found[0], alone["inside"])


def test_a_step_inside_prompts_has_no_logits(tiny_model: Model) -> None:
    item = BatchItem("r", (1, 2, 3), 0, (0,), None, 0)
    found = tiny_model.forward(step_tensors(Batch((item,)), PAGE_SIZE, CPU), new_pool(torch.float16))
    assert found.shape == (0, TINY["vocab_size"])


def test_a_prompt_longer_than_a_step_goes_in_chunks(tiny_checkpoint: Checkpoint, tiny_model: Model) -> None:
    """The same answer as in one piece, and the head sees only rows whose token is wanted."""

    class Watching(TorchKernels):
        def linear(self, x, weight, *, out_dtype=torch.float16, **options):
            if out_dtype == torch.float32:
                head_rows.append(x.shape[0])
            return super().linear(x, weight, out_dtype=out_dtype, **options)

        def rms_norm(self, x, *arguments):
            step_rows.add(x.shape[0])
            return super().rms_norm(x, *arguments)

    head_rows: list[int] = []
    step_rows: set[int] = set()
    answers = []
    for model, budget in ((load_model(tiny_checkpoint, Watching(), CPU), 8), (tiny_model, 64)):
        engine = tiny_engine(model, tiny_checkpoint, max_step_tokens=budget, max_batch=2)
        engine.add(Request("r", tuple(prompt(45)), SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
            engine.check()
        answers.append([token for output in outputs for token in output.tokens])
    assert answers[0] == answers[1] and len(answers[0]) == 5
    assert step_rows == {8, 5, 1}  # 45 tokens are five chunks of 8 and one of 5
    assert head_rows == [1] * 5


def test_step_tensors_place_every_token() -> None:
    """What decodes comes first; rows that are sampled are in the order of the batch."""
    items = (
        BatchItem("a", (7, 8, 9), 3, (5, 2), GREEDY, 0),
        BatchItem("b", (1,), 0, (4,), None, 0),
        BatchItem("c", (2, 3), 7, (1, 0, 6), GREEDY, 0, num_drafts=1),
        BatchItem("d", (4,), 1, (3,), GREEDY, 0),
    )
    step = step_tensors(Batch(items), PAGE_SIZE, CPU)
    assert step.token_ids.tolist() == [4, 7, 8, 9, 1, 2, 3]
    assert step.positions.tolist() == [1, 3, 4, 5, 0, 7, 8]
    assert step.slots.tolist() == [3 * 4 + 1, 5 * 4 + 3, 2 * 4, 2 * 4 + 1, 4 * 4, 0 * 4 + 3, 6 * 4]
    assert step.q_start.tolist() == [0, 3, 4, 6] and step.decodes == 1
    assert step.kv_lens.tolist() == [2, 6, 1, 9]
    assert step.last is not None and step.last.tolist() == [3, 5, 6, 0]
    pages = [[3], [5, 2], [4], [1, 0, 6]]
    assert [row[: len(own)] for row, own in zip(step.block_tables.tolist(), pages)] == pages
    for tensor in (value for value in vars(step).values() if isinstance(value, torch.Tensor)):
        assert tensor.dtype == torch.int32 and tensor.data_ptr() % 64 == 0


def test_steps_that_only_decode_want_all_rows() -> None:
    items = [BatchItem(name, (7,), 3, (5, 2), GREEDY, 0) for name in "ab"]
    step = step_tensors(Batch(tuple(items)), PAGE_SIZE, CPU)
    assert (step.decodes, step.q_start.tolist(), step.last) == (2, [0], None)


def test_greedy_text_equals_transformers(tiny_model: Model, tiny_checkpoint: Checkpoint, reference) -> None:
    tokens = prompt(12)
    engine = tiny_engine(tiny_model, tiny_checkpoint)
    engine.add(Request("r", tuple(tokens), SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)))
    found: list[int] = []
    while engine.has_work:
        found += [token.token_id for output in engine.step() for token in output.tokens]
        engine.check()
    with torch.inference_mode():
        ids = torch.tensor([tokens + found])
        logits = reference(ids).logits[0, len(tokens) - 1 : -1]
    margins = logits.topk(2).values
    assert (margins[:, 0] - margins[:, 1]).min() > 0.02  # no step is decided by rounding
    assert logits.argmax(-1).tolist() == found


def test_shards_are_one_model(tiny_directory: Path, tmp_path: Path, tiny_model: Model) -> None:
    directory = write_tiny(tmp_path / "sharded")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for index in range(2):
        shard = f"model-{index + 1:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[index::2]}
        save_file(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load_model(open_checkpoint(directory), TorchKernels(), CPU)
    found, expected = (
        logits_of(m, prompt(9), [9], list(range(3)), new_pool(torch.float16)) for m in (model, tiny_model)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_files(tmp_path: Path, stored: torch.dtype) -> None:
    directory = write_tiny(tmp_path / "half")
    save_file({name: t.to(stored) for name, t in tiny_tensors().items()}, directory / "model.safetensors")
    weights = open_checkpoint(directory).weights
    expected = tiny_tensors()["model.layers.1.mlp.up_proj.weight"].to(stored).float().numpy()
    step = np.abs(expected).max() / 127
    np.testing.assert_allclose(weights.matrix("blk.1.ffn_up").dequantize(), expected, rtol=0, atol=0.51 * step)
    np.testing.assert_array_equal(weights.vector("output_norm"), tiny_tensors()["model.norm.weight"].to(stored).float())


def test_an_untied_head_is_used(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "untied", tie_word_embeddings=False)
    tensors = tiny_tensors()
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, directory / "model.safetensors")
    model = load_model(open_checkpoint(directory), TorchKernels(), CPU)
    assert torch.equal(model.head, -torch.as_tensor(tensors["model.embed_tokens.weight"].double()))


def mixed_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with the values' projection, and the factors of gates, quantised in another way."""

    class Mixed:
        def __init__(self, weights, other) -> None:
            self.has, self.vector = weights.has, weights.vector
            self.matrix = lambda name: (other if name.endswith(("attn_v", "ffn_up")) else weights).matrix(name)

    other = open_checkpoint(checkpoint.weights._tensors.path, dtype("uint8"))
    return Checkpoint("mixed", checkpoint.config, checkpoint.tokenizer, Mixed(checkpoint.weights, other.weights))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_what_is_stored_as_floats(group: int) -> None:
    rounding = Rounding(dtype("uint4"), group)
    weight = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    for name, size in (("blk.0.attn_q", group), ("blk.1.ffn_down", group), ("token_embd", 32)):
        found = rounding.of(name)(weight, name)
        assert isinstance(found, QuantizedMatrix) and found.group == size and found.scales.shape == (4, 256 // size)
        assert np.abs(found.dequantize() - weight).max() <= np.abs(weight).max() / 7


def test_rows_that_groups_do_not_divide_are_named(tmp_path: Path) -> None:
    """The server's --group is that of its weights."""
    config = parse_args(["--model", str(write_tiny(tmp_path / "m")), "--group", "64"])
    with pytest.raises(TilusError, match=r"q_proj.weight: groups of 64 do not divide K = 96"):
        open_model(config)[1].weights.matrix("blk.0.attn_q")


def test_parts_that_are_quantised_differently_stay_apart(tiny_checkpoint: Checkpoint, tiny_model: Model) -> None:
    model = load_model(mixed_checkpoint(tiny_checkpoint), TorchKernels(), CPU)
    for found, count in ((model, 2), (tiny_model, 1)):
        for layer in found.layers:
            assert isinstance(layer.feed_forward, Dense)
            assert [len(linear.parts) for linear in (layer.qkv, layer.feed_forward.gate_up)] == [count, count]
    found, exact = (logits_of(m, prompt(9), [9], list(range(3)), new_pool(torch.float16)) for m in (model, tiny_model))
    assert 0 < (found - exact).abs().max() < 0.2  # they lost little


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "has architecture 'GPT2LMHeadModel', but supported are Gemma2ForCausalLM, Gemma3ForCausalLM, LlamaForCausalLM, ",
        ),
        ({"partial_rotary_factor": 0.5}, "config.json has partial_rotary_factor = 0.5, which is not supported"),
        ({"hidden_act": "gelu"}, "config.json has hidden_act = 'gelu', which is not supported"),
        (
            {"sliding_window": 64, "layer_types": ["linear_attention", "full_attention"]},
            "config.json has layers of type linear_attention, which are not supported",
        ),
        ({"quantization_config": {"quant_method": "quip"}}, "is quantised by 'quip', but supported are gptq, awq, "),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4}},
            "config.json has a rotary embedding of {'rope_theta': 10000.0, 'rope_type': 'dynamic', 'factor': 4}, which is not",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 4}},
            "config.json has a rotary embedding of type 'llama3' without 'low_freq_factor'",
        ),
        ({"hidden_size": None}, "config.json has no key 'hidden_size', which a LlamaForCausalLM needs"),
        (
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "num_experts": 4,
                "num_experts_per_tok": 5,
                "moe_intermediate_size": 32,
            },
            "5 of 4 experts compute a token, but must be at least one of them",
        ),
        ({"num_key_value_heads": 4}, "the model has 6 query heads and 4 key-value heads, but the first must be"),
        ({"vocab_size": 100}, "the tokenizer has 259 tokens, but the embedding only 100"),
    ],
)
def test_models_of_other_kinds_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(TilusError) as caught:
        open_checkpoint(write_tiny(tmp_path / "m", **changes))
    assert message in str(caught.value)


def test_added_tokens_may_have_no_row_in_the_embedding(tmp_path: Path, tiny_model: Model) -> None:
    """As a token for images in models for text alone; a prompt that has it is refused."""
    checkpoint = open_checkpoint(write_tiny(tmp_path / "m", vocab_size=258))
    engine = tiny_engine(tiny_model, checkpoint)
    with pytest.raises(RequestError, match="the prompt contains token 258, but token ids go from 0 to 257"):
        engine.add(Request("r", checkpoint.tokenizer.encode("a<|im_end|>"), GREEDY))


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        TilusError, match=r"the model .* does not exist\n  hint: --model takes a directory or a .gguf file"
    ):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(TilusError, match=r"has no config\.json, so it is no model in Hugging Face's format"):
        open_checkpoint(tmp_path)
    directory = write_tiny(tmp_path / "m")
    (directory / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(TilusError, match="is not a safetensors file"):
        open_checkpoint(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(TilusError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_checkpoint(directory)
    save_file({"model.norm.weight": torch.ones(96, dtype=torch.float64)}, directory / "model.safetensors")
    weights = open_checkpoint(directory).weights
    with pytest.raises(TilusError, match=r"has no tensor model\.layers\.1\.self_attn\.q_proj\.weight; it has 1 others"):
        weights.matrix("blk.1.attn_q")
    with pytest.raises(TilusError, match=r"model\.norm\.weight has dtype float64, supported are float32"):
        weights.vector("output_norm")
