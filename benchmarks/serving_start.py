"""Seconds of a server's start with an empty cache directory, and of the next one:
`python benchmarks/serving_start.py [--out FILE] [--case NAME] [-- OPTIONS OF THE SERVER]`.

Output, as JSON:
    device, cpus
    rows    list of {case, metric: `first` or `later` and the name of a phase as the server calls it, or `ready`, which counts
            from the command to the printed address, value, unit}; a phase that had nothing to do is left out
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PHASE = re.compile(r"([a-z ]+): (\d+\.\d) s$")


def rows_of(case: str, which: str, lines: Iterable[tuple[float, str]]) -> Iterator[dict[str, Any]]:
    """From what the server says, and when: up to its address. Raises: SystemExit when it ends before."""
    said: list[str] = []
    for seconds, line in lines:
        said.append(line)
        phase = PHASE.match(line.rstrip())
        ready = line.startswith("ready: ")
        if phase or ready:
            metric, value = ("ready", round(seconds, 1)) if phase is None else (phase[1], float(phase[2]))
            yield {"case": case, "metric": f"{which} {metric}", "value": value, "unit": "s"}
        if ready:
            return
    raise SystemExit(f"the server ended before it was ready:\n{''.join(said)}")


def start(case: str, which: str, arguments: list[str], cache: str) -> list[dict[str, Any]]:
    began = time.monotonic()
    command = [sys.executable, "-m", "serving", "--port", "0", *arguments]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"TILUS_CACHE_DIR": cache})
    assert server.stderr is not None
    try:
        return list(rows_of(case, which, ((time.monotonic() - began, line) for line in server.stderr)))
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)


def device() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="SmolLM2-135M", help="what the rows are called")
    parser.add_argument("--out", type=Path, help="write the JSON here; other cases that it has are kept")
    parser.add_argument("arguments", nargs="*", help="behind --: options of the server")
    options = parser.parse_args()
    report: dict[str, Any] = {"device": device(), "cpus": len(os.sched_getaffinity(0)), "rows": []}
    if options.out is not None and options.out.exists():
        kept = json.loads(options.out.read_text())["rows"]
        report["rows"] = [row for row in kept if row["case"] != options.case]
    with TemporaryDirectory() as cache:
        for which in ("first", "later"):
            for row in start(options.case, which, options.arguments, cache):
                report["rows"].append(row)
                print(f"{row['case']:24} {row['metric']:28} {row['value']:6} s", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
