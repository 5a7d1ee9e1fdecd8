"""Small graphs for the backends' tests, as ONNX files built from bytes, so that no other library is needed.

Field numbers are those of onnx.proto; `test_graphs.py` holds the files against onnx's own checker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion.backends import available, load
from pocketdiffusion.backends.base import Backend, SessionOptions
from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.tensors import AnyArray, TensorSpec

FLOAT, UINT8, INT8, INT64 = 1, 2, 3, 7
TYPES = {"float32": FLOAT, "uint8": UINT8, "int8": INT8, "int64": INT64}


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def tensor(name: str, array: AnyArray) -> bytes:
    dims = b"".join(_field(1, size) for size in array.shape)
    return dims + _field(2, TYPES[array.dtype.name]) + _field(8, name) + _field(9, array.tobytes())


def value_info(name: str, dtype: int, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(_field(1, _field(1 if isinstance(axis, int) else 2, axis)) for axis in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, dtype) + _field(2, dims)))


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int) -> bytes:
    named = b"".join(_field(1, name) for name in inputs) + b"".join(_field(2, name) for name in outputs)
    given = (_field(1, name) + _field(3, value) + _field(20, 2) for name, value in attributes.items())
    return named + _field(4, op) + b"".join(_field(5, attribute) for attribute in given)


def model(nodes: list[bytes], inputs: list[bytes], outputs: list[bytes], tensors: list[bytes]) -> bytes:
    parts = ((1, nodes), (5, tensors), (11, inputs), (12, outputs))
    graph = _field(2, "g") + b"".join(_field(number, item) for number, items in parts for item in items)
    return _field(1, 9) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 19))


SHIFT_INPUTS = {"sample": TensorSpec("float32", ("batch", 4, "h", "w")), "timestep": TensorSpec("int64", ())}
SHIFT_OUTPUTS = {"out": TensorSpec("float32", ("batch", 4, "h", "w"))}
HALF = np.float32(0.5)


def shift(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    """What the "shift" graph computes."""
    return {"out": feeds["sample"] * HALF + feeds["timestep"].astype(np.float32)}


def _shift_model() -> bytes:
    nodes = [
        node("Cast", ["timestep"], ["t"], to=FLOAT),
        node("Mul", ["sample", "half"], ["scaled"]),
        node("Add", ["scaled", "t"], ["out"]),
    ]
    inputs = [value_info("sample", FLOAT, ("batch", 4, "h", "w")), value_info("timestep", INT64, ())]
    return model(nodes, inputs, [value_info("out", FLOAT, ("batch", 4, "h", "w"))], [tensor("half", np.array(HALF))])


@dataclass(frozen=True)
class Quantized:
    """Weights of a MatMul, a Conv and an embedding, as int8 with one scale for each output channel."""

    matmul: AnyArray
    conv: AnyArray
    embedding: AnyArray
    scales: dict[str, AnyArray]

    def floats(self, name: str, axis: int) -> AnyArray:
        weights = getattr(self, name)
        shape = [1] * weights.ndim
        shape[axis] = -1
        return weights.astype(np.float32) * self.scales[name].reshape(shape)

    def expected(self, feeds: dict[str, AnyArray]) -> AnyArray:
        """Embedded tokens plus the sample through the 1x1 Conv and the MatMul, in float64."""
        conv = np.einsum("oi,bihw->bohw", self.floats("conv", 0)[:, :, 0, 0].astype(np.float64), feeds["sample"])
        return conv @ self.floats("matmul", 1) + self.floats("embedding", 1)[feeds["ids"]]


def make_quantized() -> Quantized:
    rng = np.random.default_rng(0)
    shapes = {"matmul": (64, 64), "conv": (32, 32, 1, 1), "embedding": (50, 64)}
    weights = {name: rng.integers(-127, 128, shape, np.int8) for name, shape in shapes.items()}
    channels = {"matmul": 64, "conv": 32, "embedding": 64}
    scales = {name: rng.uniform(1e-3, 2e-3, size).astype(np.float32) for name, size in channels.items()}
    return Quantized(**weights, scales=scales)


def _quantized_model(weights: Quantized, *, activations: bool) -> bytes:
    tensors, nodes = [], []
    for name, axis in (("conv", 0), ("matmul", 1), ("embedding", 1)):
        scale = weights.scales[name]
        tensors += [tensor(f"{name}_q", getattr(weights, name)), tensor(f"{name}_scale", scale)]
        tensors += [tensor(f"{name}_zero", np.zeros(scale.shape, np.int8))]
        nodes += [node("DequantizeLinear", [f"{name}_q", f"{name}_scale", f"{name}_zero"], [name], axis=axis)]
    tensors += [tensor("a_scale", np.array(0.04, np.float32)), tensor("a_zero", np.array(128, np.uint8))]

    def quantized(name: str) -> str:
        if not activations:
            return name
        nodes.append(node("QuantizeLinear", [name, "a_scale", "a_zero"], [f"{name}_u8"]))
        nodes.append(node("DequantizeLinear", [f"{name}_u8", "a_scale", "a_zero"], [f"{name}_dq"]))
        return f"{name}_dq"

    nodes.append(node("Conv", [quantized("sample"), "conv"], ["c"]))
    nodes.append(node("MatMul", [quantized("c"), "matmul"], ["m"]))
    nodes.append(node("Gather", ["embedding", "ids"], ["e"]))
    nodes.append(node("Add", [quantized("m"), "e"], ["out"]))
    inputs = [value_info("sample", FLOAT, ("batch", 32, "h", 64)), value_info("ids", INT64, ("h",))]
    return model(nodes, inputs, [value_info("out", FLOAT, ("batch", 32, "h", 64))], tensors)


def quantized_feeds() -> dict[str, AnyArray]:
    rng = np.random.default_rng(1)
    return {"sample": rng.standard_normal((2, 32, 8, 64)).astype(np.float32), "ids": rng.integers(0, 50, 8)}


@pytest.fixture(scope="session")
def quantized() -> Quantized:
    return make_quantized()


@pytest.fixture
def feeds_for_quantized() -> dict[str, AnyArray]:
    return quantized_feeds()


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory, quantized: Quantized) -> dict[str, Path]:
    """shift: sample * 0.5 + timestep; weights: int8 weights, float arithmetic; qdq: int8 weights and activations."""
    folder = tmp_path_factory.mktemp("unet")
    contents = {
        "shift": _shift_model(),
        "weights": _quantized_model(quantized, activations=False),
        "qdq": _quantized_model(quantized, activations=True),
    }
    for name, content in contents.items():
        (folder / f"{name}.onnx").write_bytes(content)
    return {name: folder / f"{name}.onnx" for name in contents}


@pytest.fixture
def shift_feeds() -> dict[str, AnyArray]:
    sample = np.random.default_rng(2).standard_normal((2, 4, 3, 5)).astype(np.float32)
    return {"sample": sample, "timestep": np.array(7, np.int64)}


@dataclass(frozen=True)
class Engine:
    """A backend and one of its devices."""

    backend: Backend
    device: str

    def open(self, graph: Path, options: SessionOptions | None = None):
        return self.backend.open(graph, self.device, options or SessionOptions())


def _fake() -> Engine:
    return Engine(FakeBackend({"shift.onnx": FakeGraph(SHIFT_INPUTS, SHIFT_OUTPUTS, shift)}), "cpu")


REAL: dict[str, Callable[[], Engine]] = {
    f"{info.backend}:{info.device}": (lambda info=info: Engine(load(info.backend), info.device))
    for info in available()
    if "onnx" in info.formats
}


@pytest.fixture(params=[*REAL, "fake:cpu"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every device of every installed engine, and the fake one."""
    return {**REAL, "fake:cpu": _fake}[request.param]()


@pytest.fixture(params=list(REAL) or [pytest.param("", marks=pytest.mark.skip("no engine is installed"))])
def real_engine(request: pytest.FixtureRequest) -> Engine:
    return REAL[request.param]()
