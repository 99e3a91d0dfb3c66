"""The command line: `tilus compile`, `tilus run`, `tilus layout`, `tilus quantize`, `tilus tune` and `tilus doctor`.

A user's mistake is shown with its line and a way out, and the exit status is 1; a wrong command line gives 2. `--traceback`
shows the compiler's own frames as well.
"""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilus import config
from tilus.command import Command
from tilus.errors import TilusError
from tilus.target import DEFAULT_TARGET, TARGETS
from tilus.tune_command import tune_command

if TYPE_CHECKING:
    from tilus.dump import Dump
    from tilus.forms import CpuKernel, GpuKernel
    from tilus.layout import RegisterLayout, SharedLayout

_View = Callable[[], str]

GPU_FORMS = ("ir", "ptx", "cubin", "sass")
CPU_FORMS = ("ir", "c", "asm")
CPU = "cpu"
TEXT_FORM = ".tilus"
_DEVICES = tuple(device for device in config.DEVICES if device != "auto")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tilus")
def main() -> None:
    """Kernels for any bit width, for GPUs and CPUs: compile them, run them, look at their layouts."""


@main.command("compile", cls=Command)
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


@main.command("run", cls=Command, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
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


@main.command("layout", cls=Command)
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


@main.command("quantize", cls=Command)
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
        from serving.offline.quantize_model import quantize_model
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


main.add_command(tune_command)


@main.command("doctor", cls=Command)
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
