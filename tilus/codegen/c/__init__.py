"""C for CPUs from the tile IR: one function runs the blocks of a grid, tiles are local arrays, barriers have no meaning."""
