"""`python -m serving`: load a model, serve it, and finish what is running when told to stop. And `bench`, which measures,
and `simulate`, which compares policies."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from serving.config import parse_args
from tilus.errors import TilusError

if TYPE_CHECKING:
    from serving.kernels import Kernels


def main(arguments: Sequence[str] | None = None, kernels: Callable[[], Kernels] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the process's exit status. kernels: another library than `tilus.kernels`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["bench"], ["simulate"]):
        return _measure(arguments[0], arguments[1:])
    config = parse_args(arguments)
    # Importing and loading make no garbage worth a search: without it a start takes a sixth less time. `serve` ends this.
    gc.disable()
    try:
        from serving.server import serve  # after that, and not for --help: torch takes a second

        serve(config, kernels)
    except TilusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        gc.enable()
    return 0


def _measure(command: str, arguments: Sequence[str]) -> int:
    try:  # the server needs nothing of it
        if command == "bench":
            from serving.bench.command import main as run
        else:
            from serving.bench.simulate import main as run
    except ModuleNotFoundError as missing:
        error = TilusError(f"measuring needs the package {missing.name}", hint="pip install 'tilus[bench]'")
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
