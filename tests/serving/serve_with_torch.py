"""`python -m serving` on the oracle kernels, for tests of the real process: same arguments."""

from __future__ import annotations

import sys

import torch
from torch_kernels import TorchKernels

from serving.__main__ import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(kernels=lambda: TorchKernels(torch.float32)))
