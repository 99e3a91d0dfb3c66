"""Tensor maps at the launch: encoded once for every argument, and found again by its address."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from tilus.codegen.tensor_map import PlacedMap, TensorMap
from tilus.ir.expr import Expr, Number, Var
from tilus.ir.function import Function, ScalarParam, TensorParam

MAX_ENCODED = 1024  # maps that are remembered per kernel, shapes and parameter

Encode = Callable[[PlacedMap], bytes]


class EncodedMaps(dict[Any, bytes]):
    """The bytes of one tensor map of a kernel, by what may differ between calls with the same shapes and strides.

    A key is the tensor's address, or a tuple of it and of the scalar arguments that the view depends on; `key` is its
    text in terms of the lists `p` of pointers and `s` of scalars. Raises: TilusError when the map cannot be encoded.
    """

    def __init__(
        self, tensor_map: TensorMap, place: int, scalars: Mapping[Var, int], sizes: Mapping[Var, int], encode: Encode
    ) -> None:
        """place: the tensor's place among the pointers. scalars: places of all scalar arguments. sizes: of this call."""
        super().__init__()
        self._map, self._sizes, self._encode = tensor_map, sizes, encode
        self._scalars = [var for var in scalars if var in tensor_map.variables()]
        places = [f"p[{place}]", *(f"s[{scalars[var]}]" for var in self._scalars)]
        self.key = ", ".join(places)

    def __missing__(self, key: Any) -> bytes:
        address, *scalars = key if isinstance(key, tuple) else (key,)
        known: dict[Expr, Number] = {**self._sizes, **dict(zip(self._scalars, scalars, strict=True))}
        if len(self) >= MAX_ENCODED:
            self.clear()
        encoded = self[key] = self._encode(self._map.at(address, known))
        return encoded


class KernelMaps:
    """The tensor maps of a kernel: calls with other sizes share those that the sizes do not change.

    A kernel of a model meets as many sizes as steps have tokens, and in each of them the weights of all layers.
    """

    def __init__(self, function: Function, maps: Sequence[TensorMap], encode: Encode) -> None:
        self._maps, self._encode = maps, encode
        self._tensors = [param.tensor.base for param in function.params if isinstance(param, TensorParam)]
        scalar_vars = [param.var for param in function.params if isinstance(param, ScalarParam)]
        self._scalars = {var: index for index, var in enumerate(scalar_vars)}
        self._shared: WeakValueDictionary[tuple[int, ...], EncodedMaps] = WeakValueDictionary()

    def of(self, places: Sequence[int], sizes: Mapping[Var, int]) -> list[EncodedMaps]:
        """Those of calls with these sizes. places: where the pointers of the function's tensors are among those of a call, the
        same in all calls."""
        pointers = dict(zip(self._tensors, places, strict=True))
        found: list[EncodedMaps] = []
        for index, tensor_map in enumerate(self._maps):
            variables = tensor_map.variables()
            key = index, *(size for var, size in sizes.items() if var in variables)
            maps = self._shared.get(key)
            if maps is None:
                maps = EncodedMaps(tensor_map, pointers[tensor_map.base], self._scalars, sizes, self._encode)
                self._shared[key] = maps
            found.append(maps)
        return found
