"""A linear layer with weights of 1 to 8 bits, from the library: quantise once, then multiply.

`quantize` rounds a matrix to codes of any small type, with a scale (and, for unsigned integers, a minimum) per group of 32
columns; `pack` brings it into the order in which the kernel's threads read it. The same packed weight serves every batch size.

The kernel multiplies by exactly these rounded weights (`unpack` gives them back) and rounds only y. What is printed as the error
of y is what rounding the weights to so few bits did.
"""

import numpy as np

import tilus
from tilus.kernels import linear, quantize

TYPES = (tilus.int8, tilus.float8_e4m3, tilus.float6_e3m2, tilus.uint4, tilus.int4, tilus.uint3)


def main(tokens: int = 5, n: int = 192, k: int = 256) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, k)).astype(np.float16)
    w = rng.standard_normal((n, k)).astype(np.float32)
    exact = x @ w.T
    for dtype in TYPES:
        weight = quantize.pack(quantize.quantize(w, dtype, group=32))
        y = linear(x, weight)
        rounded = np.float64(quantize.unpack(weight).dequantize())
        bound = 2.0**-10 * (np.abs(np.float64(x)) @ np.abs(rounded).T)  # y is rounded to f16, what was added up to f32
        assert np.all(np.abs(y - np.float64(x) @ rounded.T) <= bound)
        error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
        bits = 8 * weight.nbytes / w.size
        print(f"{dtype.name:12} {bits:5.2f} bits a weight with scales, error of y {100 * error:6.2f} %")


if __name__ == "__main__":
    main()
