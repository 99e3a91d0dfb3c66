"""Arrays as kernel arguments: numpy staged to the device and back, DLPack, `__cuda_array_interface__`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from libcuda_stub import Stub, failure

import tilus
from tilus import Tensor
from tilus.dtypes import DTYPES
from tilus.errors import TilusError
from tilus.runtime import arrays, cuda, staging

Run = Callable[..., Any]


def views() -> list[tuple[str, Any]]:
    base = np.arange(60, dtype=np.uint8)
    return [
        ("contiguous", base),
        ("strided", base[3:50:7]),
        ("reversed", base[::-1]),
        ("reversed and strided", base[55:2:-5]),
        ("one element", base[9:10]),
        ("empty", base[5:5]),
    ]


def in_stub_staging() -> None:
    stub = Stub()
    increment = stub.launcher(("ptr", "i32", "i32"), name="increment")
    for name, array in views():
        expected = array.base.copy() if array.base is not None else array.copy()
        whole = array if array.base is None else array.base
        first = (array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) if array.size else 0
        for n in range(array.size):
            expected[first + n * array.strides[0]] += 1
        with staging.staged([array]) as (address,):
            increment.launch(1, 1, 1, address, array.strides[0], array.size)
            syncs = stub.counter("stub_syncs")
        assert stub.counter("stub_syncs") == syncs + 1  # copies are asynchronous: the host must wait for them
        assert np.array_equal(whole, expected), name
    assert stub.counter("stub_live_allocations") == 0


def test_numpy_views_go_to_the_device_and_back(in_stub: Run) -> None:
    in_stub(in_stub_staging)


def in_stub_aliases() -> None:
    stub = Stub()
    increment = stub.launcher(("ptr", "i32", "i32"), name="increment")
    base = np.zeros(20, np.uint8)
    with staging.staged([base[0:12], base[8:20], base[0::2], base[1::2], np.zeros(4, np.uint8)]) as addresses:
        low, high, even, odd, other = addresses
        assert (high - low, even - low, odd - low) == (8, 0, 1)  # one allocation
        assert stub.counter("stub_live_allocations") == 2
        increment.launch(1, 1, 1, low, 1, 12)
        increment.launch(1, 1, 1, high, 1, 12)
        increment.launch(1, 1, 1, odd, 2, 10)
        assert other
    assert base.tolist() == [1, 2] * 4 + [2, 3] * 2 + [1, 2] * 4
    read_only = np.zeros(4, np.uint8)
    read_only.flags.writeable = False
    with staging.staged([read_only]) as (address,):
        increment.launch(1, 1, 1, address, 1, 4)
    assert read_only.tolist() == [0] * 4


def test_arrays_that_share_memory_share_it_on_the_device(in_stub: Run) -> None:
    in_stub(in_stub_aliases)


def in_stub_staging_errors() -> None:
    stub = Stub()
    increment = stub.launcher(("ptr", "i32", "i32"), name="increment")
    array = np.zeros(4, np.uint8)
    try:
        with staging.staged([array]) as (address,):
            increment.launch(1, 1, 1, address, 1, 4)
            raise KeyError
    except KeyError:
        pass
    assert array.tolist() == [0] * 4
    stub.fail("cuMemcpyHtoDAsync_v2", 2)
    assert "cuMemcpyHtoDAsync" in failure(lambda: staging.staged([array]).__enter__())
    assert stub.counter("stub_live_allocations") == 0


def test_staging_frees_its_memory_when_something_fails(in_stub: Run) -> None:
    in_stub(in_stub_staging_errors)


def fake_cuda_array(**interface: Any) -> Any:
    defaults = {"shape": (4, 3), "typestr": "<f4", "data": (4096, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__={**defaults, **interface})


def in_stub_cuda_array_interface() -> None:
    stub = Stub()
    cuda.device().make_current()
    plain = arrays.array_argument(fake_cuda_array())
    assert (plain.address, plain.shape, plain.strides, plain.dtype) == (4096, (4, 3), (3, 1), "f32")
    assert (plain.device, plain.device_index, plain.writeable) == ("cuda", 0, True)
    other = arrays.array_argument(fake_cuda_array(typestr="|b1", strides=(1, 4), data=(0, True)))
    assert (other.dtype, other.strides, other.writeable) == ("boolean", (1, 4), False)
    assert arrays.array_argument(fake_cuda_array(typestr="<f2", strides=(-8, 2))).strides == (-4, 1)
    waits = stub.counter("stub_waits")
    arrays.array_argument(fake_cuda_array(stream=5))
    assert stub.counter("stub_waits") == waits + 1  # our stream waits for the producer's
    assert "strides (5, 1) in bytes" in failure(lambda: arrays.array_argument(fake_cuda_array(strides=(5, 1))))
    assert "'<c8' is not supported" in failure(lambda: arrays.array_argument(fake_cuda_array(typestr="<c8")))
    assert "'>f4' is not supported" in failure(lambda: arrays.array_argument(fake_cuda_array(typestr=">f4")))


def test_cuda_array_interface(in_stub: Run) -> None:
    in_stub(in_stub_cuda_array_interface)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.float16, "f16"), (np.float32, "f32"), (np.int8, "int8"), (np.int64, "int64"), (np.uint32, "uint32")],
)
@pytest.mark.parametrize("index", [np.s_[:, :], np.s_[::2, 1:], np.s_[::-1, ::-2], np.s_[1, :], np.s_[2:2, :]])
def test_dlpack_agrees_with_numpy(dtype: Any, name: str, index: Any) -> None:
    array = np.arange(24).astype(dtype).reshape(6, 4)[index]
    view = arrays.array_argument(array)
    assert (view.dtype, view.shape, view.device, view.device_index) == (name, array.shape, "cpu", 0)
    assert name in DTYPES
    assert view.address == array.__array_interface__["data"][0]
    assert view.strides == tuple(stride // array.itemsize for stride in array.strides)


def test_dlpack_of_torch() -> None:
    import torch

    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).t()
    view = arrays.array_argument(tensor)
    assert (view.dtype, view.shape, view.strides, view.address) == ("bf16", (4, 3), (1, 4), tensor.data_ptr())
    assert arrays.array_argument(torch.zeros(2, dtype=torch.bool)).dtype == "boolean"


def test_dlpack_keeps_the_memory_alive_and_then_lets_go() -> None:
    released: list[int] = []

    class Owner(np.ndarray):  # pyright: ignore[reportMissingTypeArgument]
        def __del__(self) -> None:
            released.append(1)

    view = arrays.array_argument(np.zeros(5, np.uint8).view(Owner))
    assert released == []
    del view
    assert released == [1]


def test_what_cannot_be_shared_is_refused_with_the_owners_reason() -> None:
    import torch

    with pytest.raises(TilusError, match=r"Tensor refuses to share its memory by DLPack: .*gradient"):
        arrays.array_argument(torch.zeros(2, requires_grad=True))
    array = np.zeros(2)
    array.flags.writeable = False
    with pytest.raises(TilusError, match=r"ndarray refuses to share its memory by DLPack: .*readonly"):
        arrays.array_argument(array)


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(TilusError, match="str is not an array: expected a torch tensor"):
        arrays.array_argument("abc")
    with pytest.raises(TilusError, match=r"code 5, 64 bits, 1 lanes"):
        arrays.array_argument(np.zeros(2, np.complex64))


class Shared:
    """An array of a library that tilus does not know: it can only be shared."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


@tilus.kernel
def doubled(x: Tensor["t", "m", "n"], y: Tensor["t", "m", "n"]):
    tilus.grid(1, warps=1)
    tile = tilus.load(x, [0, 0], shape=[8, 16])
    tilus.store(y, [0, 0], tile + tile)


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_any_array_that_shares_its_memory_is_an_argument(device: str, dtype: str) -> None:
    import torch

    x = torch.arange(35).reshape(7, 5).to(getattr(torch, dtype)).t()  # strides that are not row-major
    y = torch.zeros(5, 7, dtype=getattr(torch, dtype))
    x, y = (x.cuda(), y.cuda()) if device == "cuda" else (x, y)
    doubled.on(device)(Shared(x), Shared(y))
    assert torch.equal(y, x + x)


def test_an_array_that_cannot_be_shared_names_the_parameter() -> None:
    import torch

    grad = Shared(torch.zeros(2, 2, requires_grad=True))
    with pytest.raises(TilusError, match=r"parameter x: Shared refuses to share its memory by DLPack"):
        doubled.on("reference")(grad, grad)
