"""`tilus tune`: fast plans or compiled kernels for the linear layers of a model, ahead of time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tilus.command import Command
from tilus.errors import TilusError

if TYPE_CHECKING:
    from tilus.kernels.tuning import Problem, Product
    from tilus.runtime.cuda import Device
    from tilus.runtime.tuned_plans import Tuned


@click.command("tune", cls=Command)
@click.argument("model", type=click.Path(path_type=Path), metavar="DIR | CONFIG.json | FILE.gguf")
@click.option(
    "--weight-dtype", default="int4", show_default=True,
    help="How weights are stored: a type as for `tilus quantize`, or that of --act for products without quantisation. Quantised "
    "matrices of a GGUF file stay as they are.",
)  # fmt: skip
@click.option(
    "--group", type=int, help="Weights that share a scale; 0 for a whole row (default: 128, or the preset's)."
)
@click.option("--scheme", help="symmetric, zero, minimum, table, mx or nv (default: by the type).")
@click.option(
    "--head-dtype", default="int8", show_default=True,
    help="The same for the last layer, in groups of 32 or the preset's, as the server packs it.",
)  # fmt: skip
@click.option(
    "--act", type=click.Choice(("f16", "bf16")), default="f16", show_default=True, help="Type of activations."
)
@click.option(
    "--tokens", default="1,4,8,16,32,64,128,256", show_default=True, metavar="M,M,...",
    help="Numbers of tokens. A plan serves its whole bucket: 1, 2-4, 5-8, 9-16, ..., 129-256, then powers of two.",
)  # fmt: skip
@click.option("--device", "index", type=int, default=0, show_default=True, metavar="N", help="Which GPU.")
@click.option("--again", is_flag=True, help="Measure what is known, too.")
@click.option("--json", "wants_json", is_flag=True, help="Print JSON with the times of all candidates.")
@click.option("--compile-only", is_flag=True, help="Measure nothing: compile the kernels that will run. Needs no GPU.")
@click.option("--target", metavar="NAME", help="With --compile-only: compile for this target, as for a GPU of --sms.")
@click.option("--sms", type=int, default=132, show_default=True, help="With --target: multiprocessors of that GPU.")
def tune_command(
    model: Path, weight_dtype: str, group: int | None, scheme: str | None, head_dtype: str, act: str, tokens: str,
    index: int, again: bool, wants_json: bool, compile_only: bool, target: str | None, sms: int,
) -> None:  # fmt: skip
    """Find the fastest plan of every linear layer of a model on this GPU, ahead of time.

    Without it, kernels run by plans that a rule chooses. About ten candidates for each shape and number of tokens are compiled,
    checked and timed; the winners are kept in TILUS_CACHE_DIR and used by every process that starts later.
    TILUS_AUTOTUNE=1 does the same in a running program for whatever shape it first meets. See docs/performance.md.

    \b
    tilus tune Llama-3-8B/config.json --group 128 --tokens 1,16,64,256
    tilus tune model.gguf --json > tuned.json
    tilus tune Llama-3-8B --compile-only --target sm_90a
    """
    from tilus.dtypes import DTYPES
    from tilus.kernels import tuning
    from tilus.kernels.model_layers import model_layers, weight_recipe
    from tilus.kernels.quantize import PRESETS

    if target is not None and not compile_only:
        raise click.UsageError("--target goes with --compile-only; times are of the GPU that is there")
    if compile_only and (again or wants_json):
        raise click.UsageError("--again and --json go with measurements, which --compile-only does not make")
    weight = weight_recipe(weight_dtype, act, group, scheme)
    head = weight_recipe(head_dtype, act, None if head_dtype in PRESETS else 32)
    products = tuning.products_of(model_layers(model, weight, head), _counts(tokens), DTYPES[act])
    if compile_only:
        _compile_plans([product.problem for product in products], target, sms, index)
        return
    results = _tuned(products, index, again)
    if wants_json:
        lines = [tuning.to_json(product, result) for product, result in zip(products, results, strict=True)]
        click.echo(json.dumps(lines, indent=1))
    else:
        click.echo(tuning.table(products, results))


def _counts(text: str) -> list[int]:
    """Numbers of tokens from `1,16`."""
    parts = text.split(",")
    wrong = [part for part in parts if not part.isascii() or not part.isdigit() or int(part) == 0]
    if wrong:
        raise click.UsageError(
            f"--tokens {text}: {wrong[0]!r} is no number of tokens, expected M,M,... such as 1,16,64"
        )
    return [int(part) for part in parts]


def _tuned(products: Sequence[Product], index: int, again: bool) -> list[Tuned]:
    from tilus.kernels import tuning

    device = _device(index)
    with click.progressbar(length=len(products), label=f"tuning on {device.name}", file=sys.stderr) as bar:
        problems = [product.problem for product in products]
        return tuning.tune_all(problems, device, again=again, done=lambda: bar.update(1))


def _device(index: int) -> Device:
    from tilus.runtime import cuda

    try:
        return cuda.device(index)
    except TilusError as error:
        hint = "--compile-only --target NAME needs none; `tilus doctor` says what is missing"
        raise TilusError(f"tuning needs a GPU: {error.message}", hint=hint) from error


def _compile_plans(problems: Sequence[Problem], target: str | None, num_sms: int, index: int) -> None:
    from tilus.kernels import tuning
    from tilus.target import get_target

    device = _device(index) if target is None else None
    chosen = device.target if device is not None else get_target(target or "")
    start = time.perf_counter()
    with click.progressbar(length=1, label=f"compiling for {chosen}", file=sys.stderr) as bar:

        def done(count: int, total: int) -> None:
            bar.length = total
            bar.update(count - bar.pos)

        count = tuning.compile_plans(problems, chosen, num_sms if device is None else device.num_sms, device, done=done)
    click.echo(f"{count} kernels for {len(problems)} products, {time.perf_counter() - start:.1f} s")
