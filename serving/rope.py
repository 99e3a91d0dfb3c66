"""Rotary position embeddings of models: the angle that each pair of elements turns by from one position to the next.

Scaled ones stretch a model's context beyond what it was trained for: "linear" (S. Chen et al., arXiv 2306.15595), "yarn" (B. Peng
et al., arXiv 2309.00071) and "llama3" (the same idea with other bounds: A. Grattafiori et al., arXiv 2407.21783).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.errors import TilusError

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rope:
    """frequencies: radians a position, of each of a head's D / 2 pairs. magnitude: what cosines and sines are multiplied with."""

    frequencies: tuple[float, ...]
    magnitude: float = 1.0

    def table(self, num_positions: int) -> npt.NDArray[np.float32]:
        """float32 [positions, D]: cosines, then sines."""
        angles = np.outer(np.arange(num_positions), self.frequencies)
        return (np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) * self.magnitude).astype(np.float32)


def rope_of(parameters: Mapping[str, Any], head_dim: int, max_positions: int, source: str) -> Rope:
    """The embedding that `rope_parameters` of a config.json describe, each frequency divided by one of `factors` [D / 2] where
    there are some, which is how GGUF files store llama3's scaling. source: what errors call the model.

    Raises: TilusError, by name, for a type that is not supported, and for a number that is missing.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = float(parameters["rope_theta"])
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim) / np.asarray(parameters.get("factors", 1.0))
    try:
        match kind:
            case "default":
                return _rope(plain)
            case "linear":
                return _rope(plain / float(parameters["factor"]))
            case "llama3":
                return _rope(_llama3(plain, parameters, max_positions))
            case "yarn" if not {"mscale", "mscale_all_dim"} & {k for k, v in parameters.items() if v is not None}:
                return _yarn(plain, theta, parameters, max_positions)
            case _:
                raise TilusError(
                    f"{source} has a rotary embedding of {dict(parameters)}, which is not supported",
                    hint="supported types are default, linear, llama3 and yarn without mscale",
                )
    except KeyError as error:
        raise TilusError(f"{source} has a rotary embedding of type {kind!r} without {error}") from error


def _rope(frequencies: _Array, magnitude: float = 1.0) -> Rope:
    return Rope(tuple(frequencies.tolist()), magnitude)


def _llama3(plain: _Array, parameters: Mapping[str, Any], max_positions: int) -> _Array:
    """Pairs that turn fewer than `low` times within the original context are slowed down, those that turn more than `high` times
    are not, and in between the two are mixed."""
    factor, low, high = (float(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = plain * _original(parameters, max_positions) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / factor)


def _yarn(plain: _Array, theta: float, parameters: Mapping[str, Any], max_positions: int) -> Rope:
    """As llama3, but mixed in proportion to the pair's index, between those that turn beta_fast and beta_slow times."""
    factor, original, half = float(parameters["factor"]), _original(parameters, max_positions), len(plain)

    def index(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first = index(float(parameters.get("beta_fast") or 32.0))
    last = index(float(parameters.get("beta_slow") or 1.0))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    slowed = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0.0, 1.0)
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return _rope(plain * (1 - slowed + slowed / factor), float(magnitude))


def _original(parameters: Mapping[str, Any], max_positions: int) -> float:
    return float(parameters.get("original_max_position_embeddings") or max_positions)
