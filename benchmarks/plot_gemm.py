"""The results of `gemm.py int4` as a picture: the speed-up over the faster cuBLAS by tokens, one panel a shape and their mean.

    python benchmarks/plot_gemm.py RESULTS.json --out FILE.svg

A band shows what is possible: the limits of kernels that start one after the other, and of those with dependent launch. Needs
matplotlib (`pip install -e '.[bench]'`), and no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from products.limits import SPEEDUP_BARS, speedups

Row = Mapping[str, Any]

# Key of a row, label, colour, style. Colours differ in lightness, too.
LINES = (
    ("us", "tilus", "#0b5fa5", {"marker": "o", "linewidth": 2.2, "zorder": 5}),
    ("plain_us", "tilus, no dependent launch", "#6aaed6", {"marker": "o", "markerfacecolor": "white", "zorder": 4}),
    ("triton_us", "Triton", "#d95f02", {"marker": "s", "markersize": 4}),
)
LIMITS = ("limit_us", "plain_limit_us")


def draw(axes: Axes, rows: Sequence[Row], title: str, *, bars: bool) -> None:
    """One panel. Limits fill the room between them; cuBLAS is the line at 1."""
    shapes = len({(row["N"], row["K"]) for row in rows})
    best, plain = (speedups(rows, key, shapes) for key in LIMITS)
    common = [m for m in best if m in plain]
    low, high = [plain[m] for m in common], [best[m] for m in common]
    axes.fill_between(
        common, low, high, color="#bbbbbb", alpha=0.5, linewidth=0, label="limit, without / with dependent launch"
    )
    axes.plot(common, low, color="#888888", linewidth=0.8, linestyle="--")
    axes.plot(common, high, color="#888888", linewidth=0.8)
    for key, label, color, style in LINES:
        points = speedups(rows, key, shapes)
        axes.plot(
            list(points),
            list(points.values()),
            label=label,
            color=color,
            **{"linewidth": 1.4, "markersize": 5, **style},
        )
    axes.axhline(1, color="black", linewidth=1, label="cuBLAS, the faster of fp16 and bf16")
    if bars:
        wanted = {m: bar for m, bar in SPEEDUP_BARS.items() if m in best}
        axes.plot(
            list(wanted),
            list(wanted.values()),
            "_",
            color="#b2182b",
            markersize=14,
            markeredgewidth=2,
            label="asked for",
        )
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    tokens = sorted({row["M"] for row in rows})
    axes.set_xticks(tokens, [str(m) for m in tokens], rotation=60, fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.25, linewidth=0.6)


def figure(result: Mapping[str, Any]) -> Any:
    """The mean first, then the shapes in the order in which they were measured."""
    rows = result["suites"]["int4"]["rows"]
    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    columns = min(3, len(shapes) + 1)
    lines = -(-(len(shapes) + 1) // columns)
    picture, panels = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.3 * lines + 0.7), squeeze=False, sharey=True, layout="constrained"
    )  # fmt: skip
    flat = list(panels.flat)
    draw(flat[0], rows, f"geometric mean of {len(shapes)} shapes", bars=True)
    for axes, (n, k) in zip(flat[1:], shapes):
        draw(axes, [row for row in rows if (row["N"], row["K"]) == (n, k)], f"{n} x {k}", bars=False)
    for axes in flat[len(shapes) + 1 :]:
        axes.remove()
    flat[0].set_ylim(bottom=0)  # of all, now that the highest is known
    for axes in panels[:, 0]:
        axes.set_ylabel("speed-up over cuBLAS")
    for axes in flat[max(0, len(shapes) + 1 - columns) : len(shapes) + 1]:
        axes.set_xlabel("tokens")
    picture.suptitle(f"int4 weights, groups of 128, f16 activations, N x K, {result['device']}", fontsize=11)
    handles, labels = flat[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON of gemm.py")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .svg")
    options = parser.parse_args()
    result = json.loads(options.results.read_text())
    if not result.get("suites", {}).get("int4", {}).get("rows"):
        raise SystemExit(f"{options.results} has no rows of the suite int4")
    pyplot.rcParams["svg.hashsalt"] = "tilus"  # the same picture for the same results
    figure(result).savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
