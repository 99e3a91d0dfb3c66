"""The coordinates in which a layer's cache of 4 bits keeps keys and values: those in which rounding disturbs attention least.

Softmax does not change when the same vector is subtracted from all keys of a head, so that keys lose their mean, whose range
codes would have to cover. In front of the Hadamard transform a reflection (A. S. Householder, "Unitary Triangularization of a
Nonsymmetric Matrix", 1958) takes the direction in which queries are longest to the mean over a head's elements, which is the one
that a centre keeps exactly. A second one takes what is left of a sequence's first key, to which most of the attention goes
(G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453), to a vector of two values, which
codes hold exactly. Values are reflected such that their mean over tokens is what is kept, and transformed, too; attention's
results are then transformed back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, f32
from tilus.kernels.hadamard import mixed
from tilus.kernels.vectors import by_vector, power_of_two

WARPS = 4
VECTOR = 4  # neighbouring elements of a thread


@dataclass(frozen=True, eq=False)
class KvFrame:
    """Of a layer, per head: the rows of these, and what they are for, float32.

    queries: [3, Hq, D]: the two reflections of queries, and that of attention's results. keys: [4, Hkv, D]: the two of keys, that
    of values, and centres, which keys lose first. A reflection w takes x to x - w (w . x): of length sqrt(2), or zeros for none.
    """

    queries: Any
    keys: Any


def fit_kv_frame(q: Any, k: Any, v: Any, *, centred: bool = True) -> KvFrame:
    """The frame for queries, keys and values like these, torch tensors on one device.

    q: [tokens, Hq, D]; k, v: [tokens, Hkv, D], queries and keys rotated by their positions, the first those of a sequence's first
    token. centred: whether keys lose their mean: not where scores are capped before the softmax.
    Raises: TilusError for shapes that do not fit together.
    """
    import torch

    if q.ndim != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or not len(q) or q.shape[1] % k.shape[1]:
        raise TilusError(
            f"fit_kv_frame: q, k and v of shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)}, expected "
            "[tokens, q_heads, D] and twice [tokens, kv_heads, D], with q_heads a multiple of kv_heads"
        )
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    q, k, v = (x.double() for x in (q, k, v))
    # Those of the query heads of a key-value head are one after another.
    queries = q.unflatten(1, (kv_heads, group)).transpose(1, 2).flatten(0, 1)
    centres = k.mean(0) if centred else torch.zeros_like(k[0])
    longest = torch.linalg.eigh(torch.einsum("thd,the->hde", queries, queries)).eigenvectors[..., -1]
    equal, alternating = (column(k[0], index) for index in (0, 1))
    first = reflection(longest, equal)
    sink = k[0] - centres
    sink = sink - first * (first * sink).sum(-1, keepdim=True)
    second = reflection(sink - equal * (equal * sink).sum(-1, keepdim=True), alternating)
    reflections = [first, second, reflection(v.mean(0), equal)]
    by_query = torch.stack(reflections).repeat_interleave(group, dim=1)
    return KvFrame(by_query.float(), torch.stack([*reflections, centres]).float())


def column(like: Any, index: int) -> Any:
    """[H, D]: the unit vector whose Hadamard transform is the same in all elements (0), or alternates between two values (1)."""
    import torch

    head_dim = like.shape[-1]
    half = head_dim // 2
    run = half & -half
    found = torch.zeros_like(like)
    found[:, index :: head_dim if run == half else run] = 1
    return torch.nn.functional.normalize(found, dim=-1)


def reflection(directions: Any, target: Any) -> Any:
    """[H, D]: what takes each direction to plus or minus a unit vector; zeros where the direction is zero."""
    import torch

    unit = torch.nn.functional.normalize(directions, dim=-1)
    ahead = (unit * target).sum(-1, keepdim=True) > 0
    towards = torch.where(ahead, -target, target)  # the farther one: no digits are lost
    return torch.nn.functional.normalize(unit - towards, dim=-1) * 2**0.5 * (unit != 0).any(-1, keepdim=True)


def reflected(halves: Any, mirror: Any) -> Any:
    """The two halves [heads, D/2] of heads, each x - w (w . x); mirror: the halves of w."""
    low, high = halves
    along = tilus.sum(low * mirror[0], 1, keepdims=True) + tilus.sum(high * mirror[1], 1, keepdims=True)
    return low - mirror[0] * along, high - mirror[1] * along


def halves_of(rows: Any, count: int, half: int) -> Any:
    """The two halves of heads [count, 2 * half], in f32, as tiles of a power of two of heads: those beyond the last are zeros."""
    shape = [power_of_two(count), half]
    layout = by_vector(shape[0], half, VECTOR, WARPS)
    return [tilus.load(rows, [0, at], shape, layout=layout).to(f32) for at in (0, half)]


@tilus.kernel(varying=("tokens",))
def restore_values_kernel(
    out: Tensor["dtype", "tokens", "q_heads", "head_dim"],
    queries: Tensor[f32, 3, "q_heads", "head_dim"],
    *,
    q_heads: Const,
    head_dim: Const,
):
    """One token a block, in place."""
    tilus.grid(out.shape[0], warps=WARPS)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    token, half = tilus.block_id(0), head_dim // 2
    low, high = reflected(mixed(*halves_of(out[token], q_heads, half)), halves_of(queries[2], q_heads, half))
    tilus.store(out, [token, 0, 0], low.to(out.dtype))
    tilus.store(out, [token, 0, half], high.to(out.dtype))


def restore_values(out: Any, frame: KvFrame, *, device: str | None = None) -> Any:
    """What attention would give without a frame, in place.

    out: float16 or bfloat16 [M, Hq, D], of attention over a cache that `rope_append` has written with this frame; torch tensor.
    device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Returns: out. Computed in f32 and rounded once. Raises: TilusError when the shapes do not fit.
    """
    if tuple(out.shape[1:]) != tuple(frame.queries.shape[1:]):
        raise TilusError(
            f"restore_values: heads of shape {list(out.shape[1:])}, but the frame is of {list(frame.queries.shape[1:])}"
        )
    restore_values_kernel.on(device)(out, frame.queries, q_heads=out.shape[1], head_dim=out.shape[2])
    return out
