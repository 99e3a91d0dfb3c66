"""Quantised weights: as plain arrays (`QuantizedMatrix`), and packed for the kernels (`QuantizedWeight`).

Torch is not imported.
"""

from tilus.kernels.quantize.header import WeightHeader as WeightHeader
from tilus.kernels.quantize.matrix import QuantizedMatrix as QuantizedMatrix
from tilus.kernels.quantize.packed import QuantizedWeight as QuantizedWeight
from tilus.kernels.quantize.packed import pack as pack
from tilus.kernels.quantize.packed import quantize as quantize
from tilus.kernels.quantize.packed import unpack as unpack
