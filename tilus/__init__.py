"""tilus: GPU kernels as decorated Python functions, for any bit width."""
