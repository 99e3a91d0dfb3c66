"""The `reference` execution: the instructions' own meanings on numpy tiles, all blocks of a grid at once.

It knows no layouts, threads or PTX, runs anywhere, and is the oracle for the front end and for algorithms. It is also
fast enough to serve small models: control flow that all blocks share costs no array operation, tiles that lie
regularly in memory are views of it, and the grid is cut so that tiles stay in the cache.
"""

from tilus.runtime.reference.launch import run_reference

__all__ = ["run_reference"]
