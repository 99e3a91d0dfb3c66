"""The command line: `tilus compile`, `tilus run`, `tilus layout`, `tilus quantize`, `tilus tune` and `tilus doctor`.

A user's mistake is shown with its line and a way out, and the exit status is 1; a wrong command line gives 2. `--traceback`
shows the compiler's own frames as well.
"""

from __future__ import annotations

import ast
import json
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilus import config
from tilus.errors import TilusError
from tilus.target import DEFAULT_TARGET, TARGETS

if TYPE_CHECKING:
    from tilus.dump import Dump
    from tilus.forms import CpuKernel, GpuKernel
    from tilus.kernels.tuning import Problem, Product
    from tilus.layout import RegisterLayout, SharedLayout
    from tilus.runtime.tuned_plans import Tuned

_View = Callable[[], str]

GPU_FORMS = ("ir", "ptx", "cubin", "sass")
CPU_FORMS = ("ir", "c", "asm")
CPU = "cpu"
TEXT_FORM = ".tilus"
_DEVICES = tuple(device for device in config.DEVICES if device != "auto")


class _Command(click.Command):
    """A command that prints a TilusError without traceback, unless --traceback asks for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--traceback"], is_flag=True, help="Show where in tilus an error was raised."))

    def invoke(self, ctx: click.Context) -> Any:
        wants_traceback = ctx.params.pop("traceback")
        try:
            return super().invoke(ctx)
        except TilusError as error:
            if wants_traceback:
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tilus")
def main() -> None:
    """Kernels for any bit width, for GPUs and CPUs: compile them, run them, look at their layouts."""


@main.command("compile", cls=_Command)
@click.argument("source", metavar="FILE.py[:KERNEL] | FILE.tilus")
@click.option(
    "--emit", type=click.Choice(dict.fromkeys(GPU_FORMS + CPU_FORMS)),
    help=f"What to write: {', '.join(GPU_FORMS)} for a GPU (default: ptx), {', '.join(CPU_FORMS)} for the CPU (default: c); "
    "nothing with --report alone.",
)  # fmt: skip
@click.option(
    "--target", default=DEFAULT_TARGET.name, show_default=True, help=f"One of {', '.join(TARGETS)}, or {CPU}: this machine's."
)  # fmt: skip
@click.option(
    "-D", "definitions", multiple=True, metavar="NAME=VALUE",
    help="A compile-time argument, a dtype (-D wdtype=uint4) or the size of a dim (-D k=4096).",
)  # fmt: skip
@click.option("-o", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write to a file.")
@click.option(
    "--report", "wants_report", is_flag=True, help="What it costs: registers, conflicts, arrays, instructions."
)
@click.option("--after", metavar="PASS", help="With --emit ir: the IR after this pass (default: before all passes).")
@click.option("--dump", type=click.Path(path_type=Path, file_okay=False), help="Write every stage into this directory.")
@click.option("--allow-spills", is_flag=True, help="Let a kernel keep registers in local memory.")
def compile_command(
    source: str, emit: str | None, target: str, definitions: tuple[str, ...], output: Path | None, wants_report: bool,
    after: str | None, dump: Path | None, allow_spills: bool,
) -> None:  # fmt: skip
    """Compile a kernel, for a GPU without GPU, driver or CUDA toolkit, for the CPU with the system's C compiler.

    Sizes that are not given with -D are unknown multiples of 16; tensors are contiguous and aligned.
    """
    from tilus.dump import Dump

    form = emit or (None if wants_report else "c" if target == CPU else "ptx")
    _check_form(form, target, after, output, allow_spills)
    files = Dump(dump) if dump else None
    kernel = _kernel(source, definitions, target, files, allow_spills)
    if files is not None:
        kernel.dump(files)
    if form is not None:
        _write(kernel.ir(after) if form == "ir" else kernel.product(form), output)
    if wants_report:
        click.echo(kernel.report(), err=form is not None and output is None)


def _check_form(form: str | None, target: str, after: str | None, output: Path | None, allow_spills: bool) -> None:
    """Raises: UsageError for options that do not go together."""
    forms = CPU_FORMS if target == CPU else GPU_FORMS
    if form is not None and form not in forms:
        other = f"a GPU, as in --target {DEFAULT_TARGET}" if target == CPU else f"--target {CPU}"
        raise click.UsageError(
            f"--emit {form} with --target {target}, which has {', '.join(forms)}; {form} goes with {other}"
        )
    if after is not None and form != "ir":
        raise click.UsageError("--after goes with --emit ir")
    if form == "cubin" and output is None:
        raise click.UsageError("--emit cubin writes machine code: give a file with -o")
    if allow_spills and target == CPU:
        raise click.UsageError(f"--allow-spills goes with a GPU; with --target {CPU} the C compiler allots registers")


def _kernel(
    source: str, definitions: tuple[str, ...], target: str, files: Dump | None, allow_spills: bool
) -> GpuKernel | CpuKernel:
    from tilus.forms import CpuKernel, GpuKernel
    from tilus.target import get_target

    if target == CPU:
        from tilus.runtime.cpu.features import host_target

        return CpuKernel(_read_function(source, definitions), host_target(), files)
    chosen = get_target(target)
    return GpuKernel(_read_function(source, definitions), chosen, files, allow_spills=allow_spills)


@main.command("run", cls=_Command, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--device", type=click.Choice(_DEVICES), help="Where kernels run (default: by their arguments).")
@click.option("--time", "wants_times", is_flag=True, help="Print how long the launches of each kernel took.")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run_command(device: str | None, wants_times: bool, file: Path, args: tuple[str, ...]) -> None:
    """Run a Python program whose kernels are launched on a device."""
    import os

    from tilus.runtime import launch_times

    if device is not None:
        os.environ["TILUS_DEVICE"] = device
    sys.argv = [str(file), *args]
    sys.path.insert(0, str(file.parent))
    if not wants_times:
        runpy.run_path(str(file), run_name="__main__")
        return
    with launch_times.recording() as times:
        try:
            runpy.run_path(str(file), run_name="__main__")
        finally:
            click.echo(launch_times.render(times), err=True)


@main.command("layout", cls=_Command)
@click.argument("expression")
@click.option("--svg", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw it into this file.")
@click.option("--dtype", "dtype_name", default="f16", show_default=True, help="Element type: decides banks and costs.")
@click.option("--banks", is_flag=True, help="A shared layout as the memory has it: rows of 32 banks.")
@click.option("--access", metavar="LAYOUT", help="Wavefronts and bank conflicts of this register layout's accesses.")
@click.option("--to", "target", metavar="LAYOUT", help="The conversion to this register layout: plan and travel.")
def layout_command(
    expression: str, picture: Path | None, dtype_name: str, banks: bool, access: str | None, target: str | None
) -> None:
    """Show where a layout puts each element: thread:slot of a register layout, offset/bank of a shared one.

    The atoms mma_a, mma_b and mma_c (fragments of mma.m16n8k16) may be used as names.

    \b
    tilus layout 'spatial(2, 2) * mma_c' --svg accumulator.svg
    tilus layout 'swizzled((8, 64), 2)' --banks
    tilus layout 'row_major((8, 64))' --access 'local(1, 8).spatial(8, 4).local(1, 2)'
    tilus layout mma_c --to 'spatial(16, 2).local(1, 4)'
    """
    if sum((banks, access is not None, target is not None)) > 1:
        raise click.UsageError("--banks, --access and --to show different things: give one of them")
    text, image = _views(expression, dtype_name, banks, access, target)
    if picture is not None:
        _write(image(), picture)
    else:
        click.echo(text())


def _views(
    expression: str, dtype_name: str, banks: bool, access: str | None, target: str | None
) -> tuple[_View, _View]:
    """What `tilus layout` prints, and what it draws."""
    from functools import partial

    from tilus.dtypes import dtype
    from tilus.layout import draw

    layout, nbits = _read_layout(expression), dtype(dtype_name).nbits
    if access is not None:
        memory, tile = _shared("--access", layout), _register("the layout after --access", _read_layout(access))
        return partial(draw.access_table, memory, tile, nbits), partial(draw.access_svg, memory, tile, nbits)
    if target is not None:
        src, dst = _register("--to", layout), _register("the layout after --to", _read_layout(target))
        return partial(draw.conversion_table, src, dst, nbits), partial(draw.conversion_svg, src, dst, nbits)
    if banks:
        memory = _shared("--banks", layout)
        return partial(draw.bank_table, memory, nbits), partial(draw.bank_svg, memory, nbits)
    return partial(draw.text_table, layout, nbits), partial(draw.svg, layout, nbits)


def _register(what: str, layout: RegisterLayout | SharedLayout) -> RegisterLayout:
    from tilus.layout import RegisterLayout

    if isinstance(layout, RegisterLayout):
        return layout
    raise TilusError(f"{what}: {layout} is a shared layout, expected a register layout")


def _shared(what: str, layout: RegisterLayout | SharedLayout) -> SharedLayout:
    from tilus.layout import SharedLayout

    if isinstance(layout, SharedLayout):
        return layout
    raise TilusError(f"{what}: {layout} is a register layout, expected a shared layout")


@main.command("quantize", cls=_Command)
@click.argument("model", type=click.Path(path_type=Path), metavar="DIR | FILE.gguf")
@click.option(
    "-o", "output", type=click.Path(path_type=Path), required=True, help="The directory to write; must not exist."
)
@click.option(
    "--dtype", "dtype_name", default="int4", show_default=True,
    help="A type of 1 to 8 bits (int4, uint3, float6_e3m2, ...), or nf4, mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3, "
    "mxfp8_e5m2, nvfp4.",
)  # fmt: skip
@click.option(
    "--group", type=int, help="Weights that share a scale; 0 for a whole row (default: 128, or the preset's)."
)
@click.option("--scheme", help="symmetric, zero, minimum, table, mx or nv (default: by the type).")
@click.option(
    "--ignore", multiple=True, metavar="NAME", help="A module to leave as it is, or re:PATTERN; may be repeated."
)
@click.option(
    "--calibrate", "calibration", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Choose codes by GPTQ, for this text (needs torch and transformers).",
)  # fmt: skip
def quantize_command(
    model: Path, output: Path, dtype_name: str, group: int | None, scheme: str | None, ignore: tuple[str, ...],
    calibration: Path | None,
) -> None:  # fmt: skip
    """Quantise a model: a directory in Hugging Face's format, or a GGUF file.

    Scales are searched so that the squared error is least. The result is written as compressed-tensors where that expresses the
    type, else in tilus' own format; see docs/quantization.md.
    """
    from tilus.kernels.quantize import recipe

    try:
        from serving.quantize_model import quantize_model
    except ModuleNotFoundError as error:
        raise TilusError(
            f"quantising models needs the package {error.name}", hint="pip install 'tilus[serve]'"
        ) from error
    chosen = recipe(dtype_name, group, scheme)
    with click.progressbar(length=1, label="quantising", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        report = quantize_model(model, output, chosen, ignore=ignore, calibration=calibration, progress=progress)
    click.echo(
        f"{output}: {report.num_matrices} matrices as {report.format}, {report.nbits:.2f} bits a weight, "
        f"{report.nbytes / 2**20:.1f} MiB in all, relative error {100 * report.error:.2f} %"
    )


@main.command("tune", cls=_Command)
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
    weight, head = (
        weight_recipe(weight_dtype, act, group, scheme),
        weight_recipe(head_dtype, act, None if head_dtype in PRESETS else 32),
    )
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
    from tilus.runtime import cuda

    device = cuda.device(index)
    with click.progressbar(length=len(products), label=f"tuning on {device.name}", file=sys.stderr) as bar:
        problems = [product.problem for product in products]
        return tuning.tune_all(problems, device, again=again, done=lambda: bar.update(1))


def _compile_plans(problems: Sequence[Problem], target: str | None, num_sms: int, index: int) -> None:
    from tilus.kernels import tuning
    from tilus.runtime import cuda
    from tilus.target import get_target

    device = cuda.device(index) if target is None else None
    chosen = device.target if device is not None else get_target(target or "")
    start = time.perf_counter()
    with click.progressbar(length=1, label=f"compiling for {chosen}", file=sys.stderr) as bar:

        def done(count: int, total: int) -> None:
            bar.length = total
            bar.update(count - bar.pos)

        count = tuning.compile_plans(problems, chosen, num_sms if device is None else device.num_sms, device, done=done)
    click.echo(f"{count} kernels for {len(problems)} products, {time.perf_counter() - start:.1f} s")


@main.command("doctor", cls=_Command)
def doctor_command() -> None:
    """What tilus finds on this machine, what is missing, and how to get it."""
    from tilus import doctor

    click.echo(doctor.render())


def _read_function(source: str, definitions: tuple[str, ...]) -> Any:
    """The IR of `FILE.py[:KERNEL]` or `FILE.tilus`."""
    if source.endswith(TEXT_FORM):
        from tilus.instructions import INSTRUCTIONS
        from tilus.ir.parser import parse_function

        if definitions:
            raise click.UsageError(f"-D {definitions[0]}: the text form of a kernel has no parameters left to define")
        return parse_function(_read(Path(source)), INSTRUCTIONS, file=source, locations=True)
    from tilus.lang.kernel_file import load_kernel

    file, colon, name = source.rpartition(":")
    path = Path(file if colon else source)
    kernel = load_kernel(path, name if colon else None)
    return kernel.ir(**dict(_definition(text) for text in definitions))


def _definition(text: str) -> tuple[str, Any]:
    """The name and value of `NAME=VALUE`; a value is a dtype, a Python literal or a register layout."""
    from tilus.dtypes import DTYPES

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise click.UsageError(f"-D {text}: expected NAME=VALUE")
    if value in DTYPES:
        return name, DTYPES[value]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass  # no literal: a layout, or a mistake
    from tilus.layout import LayoutError, parse_layout

    try:
        return name, parse_layout(value)
    except LayoutError:
        raise TilusError(
            f"-D {text}: {value!r} is no value, expected a dtype, a Python literal or a layout",
            hint=f"text needs quotes of its own: -D \"{name}='{value}'\"",
        ) from None


def _read_layout(expression: str) -> RegisterLayout | SharedLayout:
    """A register layout, or else a shared one."""
    from tilus.layout import LayoutError, atoms, parse_layout, parse_shared_layout

    named = {atom.__name__: atom() for atom in (atoms.mma_a, atoms.mma_b, atoms.mma_c)}
    try:
        return parse_layout(expression, named)
    except LayoutError as register_error:
        try:
            return parse_shared_layout(expression)
        except LayoutError as shared_error:
            shared = expression.lstrip("( ").startswith(("row_major", "column_major", "padded", "strided", "swizzled"))
            raise (shared_error if shared else register_error) from None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise TilusError(f"cannot read {path}: {error.strerror}") from error


def _write(content: str | bytes, output: Path | None) -> None:
    """To a file, or to the standard output."""
    if output is None:
        click.echo(content, nl=isinstance(content, str) and not content.endswith("\n"))
        return
    try:
        output.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise TilusError(f"cannot write {output}: {error.strerror}") from error


if __name__ == "__main__":
    main()
