"""The kernel library: what serving a language model needs, as functions on torch tensors (most take numpy arrays too).

`quantize` is a module: the packing of weights for `linear`. Torch is not imported.
"""

from tilus.kernels import quantize as quantize
from tilus.kernels.activation import gelu_mul as gelu_mul
from tilus.kernels.activation import silu_mul as silu_mul
from tilus.kernels.activation import soft_cap as soft_cap
from tilus.kernels.block_sparse import block_sparse_attention as block_sparse_attention
from tilus.kernels.deferred_norm import DeferredNorm as DeferredNorm
from tilus.kernels.dense_weight import DenseWeight as DenseWeight
from tilus.kernels.dense_weight import pack_dense as pack_dense
from tilus.kernels.draft_agreement import follow_drafts as follow_drafts
from tilus.kernels.embedding import embedding as embedding
from tilus.kernels.gemm import gemm as gemm
from tilus.kernels.grouped_linear import grouped_linear as grouped_linear
from tilus.kernels.kv_cache import KV_FORMATS as KV_FORMATS
from tilus.kernels.kv_cache import KvFormat as KvFormat
from tilus.kernels.kv_cache import QuantizedCache as QuantizedCache
from tilus.kernels.kv_cache import quantized_cache as quantized_cache
from tilus.kernels.kv_frame import KvFrame as KvFrame
from tilus.kernels.kv_frame import fit_kv_frame as fit_kv_frame
from tilus.kernels.kv_frame import restore_values as restore_values
from tilus.kernels.linear import linear as linear
from tilus.kernels.linear_norm import linear_add_rms_norm as linear_add_rms_norm
from tilus.kernels.logit_edits import edit_logits as edit_logits
from tilus.kernels.logprobs import token_logprobs as token_logprobs
from tilus.kernels.merge_states import merge_states as merge_states
from tilus.kernels.mixture import mixture as mixture
from tilus.kernels.mla_decode import mla_decode as mla_decode
from tilus.kernels.mla_prefill import mla_prefill as mla_prefill
from tilus.kernels.norm import add_rms_norm as add_rms_norm
from tilus.kernels.norm import rms_norm as rms_norm
from tilus.kernels.norm import start_rms_norm as start_rms_norm
from tilus.kernels.paged_attention import paged_attention as paged_attention
from tilus.kernels.paged_decode import paged_decode as paged_decode
from tilus.kernels.paged_prefill import paged_prefill as paged_prefill
from tilus.kernels.quantize import QuantizedWeight as QuantizedWeight
from tilus.kernels.quantize_tokens import quantize_tokens as quantize_tokens
from tilus.kernels.rope import rope_append as rope_append
from tilus.kernels.sampling import sample as sample
from tilus.kernels.shared_prefix import find_shared_prefixes as find_shared_prefixes
from tilus.kernels.shared_prefix import shared_prefix_decode as shared_prefix_decode
from tilus.kernels.w4a8_linear import w4a8_linear as w4a8_linear
