"""Quantised weights: as plain arrays (`QuantizedMatrix`), packed for the kernels (`QuantizedWeight`), rounded from floats
(`quantize`), and read from checkpoints (`load`).

Torch is not imported.
"""

from tilus.kernels.quantize.checkpoint.gguf import GGUFFile as GGUFFile
from tilus.kernels.quantize.checkpoint.gguf import GGUFTensor as GGUFTensor
from tilus.kernels.quantize.checkpoint.safetensors import StoredTensor as StoredTensor
from tilus.kernels.quantize.error_feedback import quantize_for as quantize_for
from tilus.kernels.quantize.header import WeightHeader as WeightHeader
from tilus.kernels.quantize.load import CheckpointTensors as CheckpointTensors
from tilus.kernels.quantize.load import load as load
from tilus.kernels.quantize.load import open_tensors as open_tensors
from tilus.kernels.quantize.matrix import DenseMatrix as DenseMatrix
from tilus.kernels.quantize.matrix import Matrix as Matrix
from tilus.kernels.quantize.matrix import QuantizedMatrix as QuantizedMatrix
from tilus.kernels.quantize.packed import QuantizedWeight as QuantizedWeight
from tilus.kernels.quantize.packed import pack as pack
from tilus.kernels.quantize.packed import stack as stack
from tilus.kernels.quantize.packed import unpack as unpack
from tilus.kernels.quantize.recipe import PRESETS as PRESETS
from tilus.kernels.quantize.recipe import RECIPE_NAMES as RECIPE_NAMES
from tilus.kernels.quantize.recipe import Recipe as Recipe
from tilus.kernels.quantize.recipe import recipe as recipe
from tilus.kernels.quantize.rounding import SCHEMES as SCHEMES
from tilus.kernels.quantize.rounding import quantize as quantize
from tilus.kernels.quantize.save import CheckpointWriter as CheckpointWriter
