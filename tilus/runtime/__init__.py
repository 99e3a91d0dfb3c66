"""Where kernels run: CUDA devices, the PTX emulator, the numpy reference; compiled-kernel cache and launch path."""
