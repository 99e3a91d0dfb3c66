"""The CPU as a device: finding a C compiler, building kernels with it, and running their blocks on all cores."""
