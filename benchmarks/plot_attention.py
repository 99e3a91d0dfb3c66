"""The results of `attention.py` as a picture: a panel for each suite of decoding and prefill in the files, a bar for each case.

    python benchmarks/plot_attention.py RESULTS.json ... --out FILE.svg

Decoding: TB/s of cached bytes beside a pure read of them. Prefill: TFLOP/s. Marks show the fastest peer and what is wanted. Needs
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

Row = Mapping[str, Any]

UNITS = {"decode": ("tbps", "TB/s"), "quantised": ("tbps", "TB/s"), "prefill": ("tflops", "TFLOP/s")}
"""Suites that are drawn: the key of a row, and its unit."""


def case_of(row: Row) -> str:
    """What tells a row from the others of its suite."""
    queries = "" if row["q_len"] == 1 else f"{row['q_len']} of "
    parts = [f"{row['batch']} x {queries}{row['context']}{' skewed' if row.get('skewed') else ''}"]
    if (row["heads"], row["kv_heads"], row["head_dim"]) != (32, 8, 128):
        parts.append(f"{row['heads']}/{row['kv_heads']} of {row['head_dim']}")
    parts += [f"page {row['page']}"] if row["page"] != 16 else []
    parts += [row["kv_dtype"]] if row["kv_dtype"] != "bfloat16" else []
    return ", ".join(parts)


def best_peer(row: Row, key: str) -> float | None:
    """The fastest peer, in the unit of the row."""
    times = [us for us in row["peers"].values() if us is not None]
    return row[key] * row["us"] / min(times) if times else None


def draw(axes: Axes, suite: str, rows: Sequence[Row]) -> None:
    """The first row on top."""
    key, unit = UNITS[suite]
    places = range(len(rows), 0, -1)
    axes.barh(places, [row[key] for row in rows], color="#0b5fa5", height=0.62, label="tilus")
    if key == "tbps":
        reads = [row[key] * row["us"] / row["read_us"] for row in rows]
        axes.plot(reads, places, "|", color="#888888", markersize=13, label="pure read")
    for values, mark, color, label in (
        ([best_peer(row, key) for row in rows], "s", "#d95f02", "fastest peer"),
        ([row["bar"] for row in rows], "|", "#b2182b", "asked for"),
    ):
        known = [(value, place) for value, place in zip(values, places) if value is not None]
        if known:
            axes.plot(
                *zip(*known), mark, color=color, markersize=5 if mark == "s" else 13, markeredgewidth=2, label=label
            )
    axes.set_yticks(list(places), [case_of(row) for row in rows], fontsize=8)
    axes.set_xlabel(unit)
    axes.set_title(suite, fontsize=10)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def figure(result: Mapping[str, Any]) -> Any:
    """Raises: SystemExit where there is nothing to draw."""
    suites = {name: part["rows"] for name, part in result.get("suites", {}).items() if name in UNITS and part["rows"]}
    if not suites:
        raise SystemExit(f"no rows of a suite among {', '.join(UNITS)}")
    lines = max(len(rows) for rows in suites.values())
    picture, panels = pyplot.subplots(
        1, len(suites), figsize=(6.5 * len(suites), 0.3 * lines + 1.6), squeeze=False, layout="constrained"
    )  # fmt: skip
    for axes, (name, rows) in zip(panels.flat, suites.items(), strict=True):
        draw(axes, name, rows)
    labels = {label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    picture.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    picture.suptitle(f"attention over paged caches, {result['device']}", fontsize=11)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="+", help="JSON of attention.py; suites of several files are drawn together"
    )
    parser.add_argument("--out", type=Path, required=True, help="the picture, .svg")
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in options.results]
    suites = {name: part for result in results for name, part in result.get("suites", {}).items()}
    pyplot.rcParams["svg.hashsalt"] = "tilus"  # the same picture for the same results
    figure({**results[0], "suites": suites}).savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
