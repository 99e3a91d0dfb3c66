"""Arguments: what they are specialised for, what is passed, and the whole message for each mistake."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from written import write

import tilus
from tilus import Tensor
from tilus.ir.expr import Const as IrConst
from tilus.ir.expr import Var, evaluate
from tilus.ir.function import TensorParam
from tilus.ir.ranges import divisor
from tilus.lang.arguments import CPU, describe_argument
from tilus.lang.binding import checked
from tilus.lang.facts import facts_of, largest_divisor, power_of_two_part
from tilus.runtime import arrays
from tilus.runtime.execute import sizes_of

TEXT = """\
@tilus.kernel
def k(x: Tensor[f32, "m", "n"], w: Tensor["wt", "n", "c"], a: f32, i: int = 3, bias: Tensor[f32, "n"] = None, *, c: Const = 64):
    tilus.grid(1)
"""


def make(text: str = TEXT) -> tilus.Kernel:
    names = {"tilus": tilus, "Tensor": tilus.Tensor, "Const": tilus.Const, "f32": tilus.f32, "bf16": tilus.bf16}
    return write(text, names, "binding.py")["k"]


class Executions:
    """Stands for tilus.runtime.execute: keeps the calls that were prepared and the launches that were made."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.launches: list[tuple[Any, Any, Any]] = []

    def prepare(self, call: Any) -> Any:
        self.calls.append(call)
        return lambda *values: self.launches.append(values)


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> Executions:
    module, result = ModuleType("tilus.runtime.execute"), Executions()
    module.prepare = result.prepare  # type: ignore[attr-defined]
    module.place = lambda asked, on_gpu: asked or "reference"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tilus.runtime.execute", module)
    return result


X, W = np.zeros((4, 32), np.float32), np.zeros((32, 64), np.int8)

SIGNATURE = (
    "\n  at binding.py:2:1\n"
    '    2 | def k(x: Tensor[f32, "m", "n"], w: Tensor["wt", "n", "c"], a: f32, i: int = 3, '
    'bias: Tensor[f32, "n"] = None, *, c: Const = 64):\n        ' + "^" * 5
)
USAGE = "\n  hint: its parameters are x, w, a, i, bias, c"

MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "missing": ((X, W), {}, "k: missing a required argument: 'a'" + SIGNATURE + USAGE),
    "unknown": ((X, W, 1.0), {"d": 1}, "k: got an unexpected keyword argument 'd'" + SIGNATURE + USAGE),
    "too many": ((X, W, 1.0, 1, None, 1), {}, "k: too many positional arguments" + SIGNATURE + USAGE),
    "no array": ((3, W, 1.0), {}, 'k: parameter x: found a int, expected an array for Tensor[f32, m, n]' + SIGNATURE),
    "dtype": ((X.astype(np.float16), W, 1.0), {}, "k: parameter x: found dtype f16, expected f32" + SIGNATURE),
    "bytes": (
        (np.zeros((4, 32), np.uint8), W, 1.0), {},
        "k: parameter x: found dtype uint8, expected f32" + SIGNATURE
        + "\n  hint: wrap the bytes: tilus.packed(array, tilus.f32, shape)",
    ),
    "numpy dtype": (
        (X.astype(np.complex64), W, 1.0), {},
        "k: parameter x: an array of dtype complex64, which kernels do not have" + SIGNATURE
        + "\n  hint: convert it, for example to float32; known: boolean, integers, f16, bf16, f32 and small floats",
    ),
    "rank": (
        (X[0], W, 1.0), {}, "k: parameter x: found rank 1 (shape [32]), expected rank 2 for Tensor[f32, m, n]" + SIGNATURE
    ),
    "dim": ((X, W[:16], 1.0), {}, "k: parameter w: found n = 16, expected 32 ('n' bound by parameter x)" + SIGNATURE),
    "const dim": ((X, W, 1.0), {"c": 32}, "k: parameter w: found c = 64, expected 32 ('c' bound by Const c)" + SIGNATURE),
    "scalar": ((X, W, "1"), {}, "k: parameter a: found '1' (str), expected a number for f32" + SIGNATURE),
    "float for int": ((X, W, 1.0, 2.5), {}, "k: parameter i: found 2.5 (float), expected a number for int32" + SIGNATURE),
    "bool for int": ((X, W, 1.0, True), {}, "k: parameter i: found True (bool), expected a number for int32" + SIGNATURE),
    "range": (
        (X, W, 1.0, 2**31), {},
        "k: parameter i: found 2147483648, expected -2147483648 to 2147483647 for int32" + SIGNATURE,
    ),
    "array for const": (
        (X, W, 1.0), {"c": X},
        "k: parameter c: found a ndarray, expected a compile-time value" + SIGNATURE
        + '\n  hint: annotate it with Tensor[dtype, "n", ...] to pass an array',
    ),
    "unhashable": (
        (X, W, 1.0), {"c": [64]},
        "k: parameter c: found an unhashable list, expected a hashable compile-time value" + SIGNATURE
        + "\n  hint: pass a tuple instead of a list",
    ),
    "negative stride": (
        (X[::-1], W, 1.0), {},
        "k: parameter x: shape [4, 32] and strides [-32, 1], expected extents and strides from 0 to 2147483647" + SIGNATURE
        + "\n  hint: pass a contiguous copy, or a part of the tensor",
    ),
    "byte strides": (
        (np.zeros((4, 130), np.int8)[:, :128].view(np.float32), W, 1.0), {},
        "k: parameter x: strides of [130, 4] bytes are not multiples of the element size 4" + SIGNATURE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_have_the_whole_message(name: str, executions: Executions) -> None:
    args, kwargs, message = MISTAKES[name]
    with pytest.raises(tilus.TilusError) as caught:
        make()(*args, **kwargs)
    assert str(caught.value) == message
    assert not executions.launches


def test_mixed_devices_are_refused(monkeypatch: pytest.MonkeyPatch, executions: Executions) -> None:
    # Only a driver knows where an address is: here it says that all are on GPU 0.
    class OnGpu:
        __cuda_array_interface__: ClassVar = {"shape": (32, 64), "typestr": "|i1", "data": (256, False), "version": 3}

    monkeypatch.setattr(arrays, "_device_of", lambda _: 0)
    with pytest.raises(tilus.TilusError) as caught:
        make()(X, OnGpu(), 1.0)
    assert caught.value.message == "k: parameter w: found on cuda:0, expected the CPU like parameter x"


def test_a_mistake_after_good_calls_is_found_too(executions: Executions) -> None:
    kernel, x, w = make(), torch.zeros(4, 32), torch.zeros(32, 64, dtype=torch.int8)
    kernel(x, w, 1.0, 5)
    for bad in (2**31, 2.5, True, None):
        with pytest.raises(tilus.TilusError):
            kernel(x, w, 1.0, bad)
    with pytest.raises(tilus.TilusError):
        kernel(x, w[:16], 1.0, 5)
    with pytest.raises(tilus.TilusError):
        kernel(x.double(), w, 1.0, 5)
    assert len(executions.launches) == 1


def test_equal_calls_are_prepared_once_and_pass_pointers_scalars_and_tensors(executions: Executions) -> None:
    kernel, w = make(), torch.zeros(32, 64, dtype=torch.int8)
    for value in (1.0, 2.0):
        x = torch.zeros(4, 32)
        kernel(x, w, value)
        pointers, scalars, tensors = executions.launches[-1]
        assert tuple(pointers) == (x.data_ptr(), w.data_ptr(), 0)
        assert tuple(scalars) == (value, 3)
        assert tensors[0] is x and tensors[1] is w and tensors[2] is None
    assert len(executions.calls) == 1
    kernel(torch.zeros(5, 32), w, 1.0)
    assert len(executions.calls) == 2  # other sizes, the same specialisation
    assert executions.calls[0].specialization is not executions.calls[1].specialization  # m: multiple of 4, of 1
    kernel(torch.zeros(7, 32), w, 1.0)
    assert executions.calls[2].specialization is executions.calls[1].specialization


def test_consts_of_equal_value_and_other_type_are_other_specialisations() -> None:
    kernel = make("@tilus.kernel\ndef k(x: Tensor[f32, 'n'], *, c: Const):\n    tilus.grid(1)\n")
    values: list[Any] = [1, 1.0, True, (1, 2), (1.0, 2), (True, 2)]
    found = [kernel.specialize(c=value) for value in values]
    assert len({id(s) for s in found}) == len(values)
    assert all(kernel.specialize(c=value) is s for value, s in zip(values, found))


extents = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 48, 64]), min_size=0, max_size=3)


@given(shape=extents, order=st.randoms(), step=st.sampled_from([1, 2, 3]), skip=st.integers(0, 5))
def test_facts_hold_and_strides_are_reproduced(shape: list[int], order: Any, step: int, skip: int) -> None:
    """Every stride and extent of the IR's view evaluates to the argument's own; every fact is true of it."""
    axes = list(range(len(shape)))
    order.shuffle(axes)
    data = np.zeros([4 * s + 8 for s in shape], np.float32).transpose(axes)
    array = data[tuple(slice(skip, skip + step * shape[a], step) for a in axes)]
    dims = ", ".join(f"'d{i}'" for i in range(len(shape)))
    kernel = make(f"@tilus.kernel\ndef k(x: Tensor[f32, {dims}]):\n    tilus.grid(1)\n")
    call, _ = checked(kernel, {"x": array}, None)
    tensor = call.specialization.function.params[0].tensor  # type: ignore[union-attr]
    strides, values = tuple(s // 4 for s in array.strides), sizes_of(call.specialization.function, call.arrays)
    for expr, value in values.items():
        assert value % expr.multiple_of == 0 and expr.lower is not None and expr.lower <= value <= (expr.upper or 0)
    assert tuple(evaluate(e, values) for e in tensor.shape) == array.shape
    for expr, extent, stride in zip(tensor.strides, array.shape, strides, strict=True):
        assert extent == 1 or evaluate(expr, values) == stride
    assert describe_argument(array).pointer % tensor.alignment == 0  # type: ignore[union-attr]
    if array.flags.c_contiguous and array.size:
        assert not any(isinstance(e, Var) and "stride" in e.name for e in tensor.strides)
    assert all(isinstance(e, IrConst) == (s == 1) for e, s in zip(tensor.shape, array.shape, strict=True))


@tilus.kernel
def product_of_packed(x: Tensor[tilus.f16, "m", "k"], w: Tensor[tilus.uint4, "n", "k"]):
    tilus.grid(1, warps=1)


@given(value=st.integers(0, 2**31 - 1), largest=st.sampled_from([16, 32, 64, 128]))
def test_power_of_two_part(value: int, largest: int) -> None:
    part = power_of_two_part(value, largest)
    assert part == max(d for d in (1, 2, 4, 8, 16, 32, 64, 128) if value % d == 0 and d <= largest)


def test_small_types_are_looked_at_for_whole_vectors() -> None:
    """16 bytes of 4-bit elements are 32 of them; and what one tensor says of a dim, all know that have it."""
    assert [largest_divisor(t) for t in (tilus.uint1, tilus.uint3, tilus.uint4, tilus.int6)] == [128, 128, 32, 64]
    assert {largest_divisor(t) for t in (tilus.int8, tilus.f16, tilus.boolean, tilus.int64)} == {16}
    for k, known in ((64, 32), (96, 32), (48, 16), (40, 8)):
        dims = facts_of(tilus.uint4, (5, k), (k, 1), 0).dims
        assert [size.multiple_of for size in dims] == [1, known]
        function = product_of_packed.specialize(
            np.zeros((4, k), np.float16), tilus.packed(np.zeros(4 * k, np.uint8), tilus.uint4, [8, k])
        ).function
        assert [divisor(p.tensor.shape[1]) for p in function.params if isinstance(p, TensorParam)] == [known, known]


def test_numpy_and_torch_are_described_alike() -> None:
    for array in (X, X.T, X[1:, ::2], np.zeros((3, 5), np.float16), W[:, 5:]):
        ours, theirs = describe_argument(array), describe_argument(torch.from_numpy(array))
        assert ours == theirs and ours is not None and ours.device == CPU
    bf16 = describe_argument(torch.zeros(3, dtype=torch.bfloat16))
    assert bf16 is not None and bf16.dtype == tilus.bf16
    f8 = describe_argument(torch.zeros(3, dtype=torch.float8_e4m3fn))
    assert f8 is not None and f8.dtype == tilus.float8_e4m3


def test_packed_tensors_have_their_logical_shape(executions: Executions) -> None:
    kernel = make()
    for storage in (np.zeros(32 * 64 // 2, np.uint8), torch.zeros(32 * 64 // 2, dtype=torch.uint8)):
        w = tilus.packed(storage, tilus.uint4, [32, 64])
        kernel(torch.zeros(4, 32), w, 1.0)
        assert executions.launches[-1][2][1] is w
    assert executions.calls[0].arrays[1].dtype == tilus.uint4
    with pytest.raises(tilus.TilusError) as caught:
        tilus.packed(np.zeros(10, np.uint8), tilus.uint3, [3, 9])
    assert (
        caught.value.message
        == "80 bits in a contiguous array for [3, 9] elements of uint3, expected at least 81 contiguous bits"
    )
    with pytest.raises(tilus.TilusError):
        tilus.packed(np.zeros(100, np.uint8)[::2], tilus.uint3, [3, 9])


def test_facts_of_size_one_dims_ignore_strides() -> None:
    assert facts_of(tilus.f32, (1, 8), (12345, 1), 0) == facts_of(tilus.f32, (1, 8), (8, 1), 0)


def test_annotations_are_checked_at_the_definition() -> None:
    wrong = {
        "x": (
            "kernel parameter x has no type, expected Tensor[...], a dtype, int, float, bool or Const",
            "binding.py:2:7",
        ),
        "x: str": (
            "kernel parameter x has type <class 'str'>, expected Tensor[...], a dtype, int, float, bool or Const",
            "2:7",
        ),
        "*x: f32": ("kernel parameter *x takes any number of arguments, which is not supported", "2:8"),
        "x: Tensor[3]": ("Tensor[3, ...]: the first item is a int, expected a dtype or a name", None),
        "x: Tensor[f32, 0]": ("dimension 0 of a Tensor annotation, expected a name or a positive int", None),
        "x: Tensor[f32, 'a'], a: int": (
            "Tensor[f32, a] of parameter x: 'a' is also the name of a scalar parameter",
            "2:7",
        ),
    }
    for parameters, (message, place) in wrong.items():
        with pytest.raises(tilus.TilusError) as caught:
            make(f"@tilus.kernel\ndef k({parameters}):\n    tilus.grid(1)\n")
        assert caught.value.message == message
        assert place is None or str(caught.value.loc).endswith(place)


def test_dtype_variables_without_arguments_are_given_by_name() -> None:
    kernel = make()
    function = kernel.ir(wt=tilus.uint3)
    assert [p.tensor.dtype.name for p in function.params[:2]] == ["f32", "uint3"]  # type: ignore[union-attr]
    with pytest.raises(tilus.TilusError) as caught:
        kernel.ir()
    assert caught.value.message == "the dtype 'wt' of parameter w is not known without arguments"
    assert caught.value.hint == "give it by name: wt=tilus.uint4"


def test_other_buffers_of_the_same_kind_take_the_prepared_launch(executions: Executions) -> None:
    kernel, w = make(), np.zeros((32, 64), np.int8)
    buffers = [np.zeros((4, 32), np.float32) for _ in range(5)]
    assert len({buffer.ctypes.data for buffer in buffers}) == 5
    for buffer in buffers:
        kernel(buffer, w, 1.0)
    assert len(executions.calls) == 1
    assert len(executions.launches) == 5


def test_devices_have_launchers_of_their_own(executions: Executions) -> None:
    kernel, w = make(), torch.zeros(32, 64, dtype=torch.int8)
    kernel.on("emulator")(torch.zeros(4, 32), w, 1.0)
    kernel.on("reference")(torch.zeros(4, 32), w, 1.0)
    assert [call.device for call in executions.calls] == ["emulator", "reference"]
    with pytest.raises(tilus.TilusError) as caught:
        kernel.on("tpu")
    assert caught.value.message == "unknown device 'tpu'"


VARYING = """
@tilus.kernel(varying=("m",))
def k(x: Tensor[f32, "m", "n"], y: Tensor[f32, "m", "n"]):
    tilus.grid(tilus.cdiv(x.shape[0], 4), warps=1)
    i = tilus.block_id(0) * 4
    tilus.store(y, [i, 0], tilus.load(x, [i, 0], [4, 32]) + 1.0)
"""


def test_one_specialisation_serves_every_extent_of_a_varying_dim() -> None:
    kernel = make(VARYING)
    arrays = [np.arange(m * 32, dtype=np.float32).reshape(m, 32) for m in (1, 2, 3, 16, 64)]
    assert len({kernel.specification(x, x.copy()) for x in arrays}) == 1
    assert len({make(VARYING.replace('m",)', 'n",)')).specification(x, x) for x in arrays}) == len({1, 2, 3, 16})
    for x in arrays:
        y = np.zeros_like(x)
        kernel.on("reference")(x, y)
        assert (y == x + 1).all()
    strided = np.zeros((1, 64), np.float32)[:, :32]  # where there is one row, its stride does not matter
    assert kernel.specification(strided, strided) == kernel.specification(arrays[1], arrays[1])


def test_only_named_dims_can_vary() -> None:
    for name in ("k", "x", "32"):
        with pytest.raises(tilus.TilusError, match=f"k: varying='{name}', expected names of dims: m, n"):
            make(VARYING.replace('m",)', f'{name}",)'))


def test_launches_are_called_like_their_kernel_in_errors_of_python() -> None:
    with pytest.raises(TypeError, match=r"k\(\) missing 2 required positional arguments: 'w' and 'a'"):
        make().on("reference")(np.zeros((2, 3), np.float32))
