"""Readers of quantised checkpoints, one file a format. `tilus.kernels.quantize.load` chooses among them."""
