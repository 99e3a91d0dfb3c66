"""Every example runs as a user runs it, and checks itself."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tilus import TilusError

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
KERNELS = [
    "attention", "matmul_v0", "matmul_v1", "matmul_v2", "matmul_v3", "matmul_v4", "matmul_types", "quantized_linear",
    "softmax", "vector_add",
]  # fmt: skip
HOPPER = ["matmul_v5"]  # there is no C of them
SERVERS = ["serve"]


def test_all_examples_are_listed_here() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.suffix) == sorted(
        f"{n}.py" for n in KERNELS + HOPPER + SERVERS
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", KERNELS)
def test_example(device: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TILUS_DEVICE", device)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", HOPPER)
def test_example_for_hopper(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With sizes below a tile, of whole tiles and beyond; a single step of k, and more than there are stages."""
    monkeypatch.setenv("TILUS_DEVICE", device)
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    if device == "cpu":
        with pytest.raises(TilusError, match="which needs a GPU: there is no code of it for CPUs"):
            main()
        return
    for size in [(1, 8, 8), (128, 128, 64), (200, 136, 320)]:
        main(*size)
    assert capsys.readouterr().out.strip()


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vector_add", [(1,), (1024,), (1025,)]),
        ("softmax", [(1, 1), (3, 128), (2, 129)]),
        ("attention", [(1, 1), (1, 64), (2, 65)]),
        ("matmul_types", [(1, 8, 16), (64, 64, 64), (65, 72, 80)]),
        *((f"matmul_v{v}", [(1, 8, 8), (128, 128, 32), (129, 136, 40)]) for v in range(5)),
    ],
)
def test_sizes(device: str, name: str, sizes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest, exactly a tile, and just more than a tile. (Copies of 16 bytes need rows of whole 16 bytes.)"""
    monkeypatch.setenv("TILUS_DEVICE", device)
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    for size in sizes:
        main(*size)


@pytest.mark.slow
def test_server(capfd: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "serve.py"), run_name="__main__")
    assert "answer: The capital of France is Paris." in capfd.readouterr().out
