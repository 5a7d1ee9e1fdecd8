"""ONNX files of matrix products in a row, as bytes, so that no other library is needed to measure an engine.

Field numbers are those of onnx.proto. Products follow one another, because a single one would also time the copies of
its input and output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocketdiffusion.tensors import AnyArray

IR_VERSION, OPSET = 9, 19
TYPES = {"float32": 1, "uint8": 2, "int8": 3, "float16": 10}
QUANTUM = 0.05
"""Step of the quantized activations, which are about normal."""


def matmul_graph(size: int, products: int, dtype: str) -> bytes:
    """A model from "x" to "y", both (size, size): x times the same weights, `products` times.

    `dtype` is "float32", "float16", or "int8" for weights in int8 and activations quantized to uint8 before each
    product (float32 "x" and "y"), which engines make integer kernels of.
    """
    random = np.random.default_rng(0)
    weights = random.standard_normal((size, size)) / np.sqrt(size)  # keeps the magnitude from product to product
    build = _quantized if dtype == "int8" else _plain
    return build(weights, products, dtype)


def _plain(weights: AnyArray, products: int, dtype: str) -> bytes:
    names = ["x", *(f"y{index}" for index in range(1, products)), "y"]
    nodes = [_node("MatMul", [names[index], "w"], names[index + 1]) for index in range(products)]
    return _model(nodes, len(weights), dtype, [_tensor("w", weights.astype(dtype))])


def _quantized(weights: AnyArray, products: int, dtype: str) -> bytes:
    scale = np.float32(np.abs(weights).max() / 127)
    tensors = [
        _tensor("w", np.round(weights / scale).astype(dtype)),
        _tensor("w_scale", np.array(scale)),
        _tensor("w_zero", np.array(0, np.int8)),
        _tensor("x_scale", np.array(QUANTUM, np.float32)),
        _tensor("x_zero", np.array(128, np.uint8)),
    ]
    nodes = [_node("DequantizeLinear", ["w", "w_scale", "w_zero"], "w_float")]
    value = "x"
    for index in range(products):
        result = "y" if index == products - 1 else f"y{index}"
        nodes += [
            _node("QuantizeLinear", [value, "x_scale", "x_zero"], f"q{index}"),
            _node("DequantizeLinear", [f"q{index}", "x_scale", "x_zero"], f"d{index}"),
            _node("MatMul", [f"d{index}", "w_float"], result),
        ]
        value = result
    return _model(nodes, len(weights), "float32", tensors)


def _model(nodes: Sequence[bytes], size: int, dtype: str, tensors: Sequence[bytes]) -> bytes:
    parts = ((1, nodes), (5, tensors), (11, [_value("x", dtype, size)]), (12, [_value("y", dtype, size)]))
    graph = _field(2, "matmul") + b"".join(_field(number, item) for number, items in parts for item in items)
    return _field(1, IR_VERSION) + _field(7, graph) + _field(8, _field(1, "") + _field(2, OPSET))


def _node(kind: str, inputs: Sequence[str], output: str) -> bytes:
    return b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, kind)


def _value(name: str, dtype: str, size: int) -> bytes:
    shape = 2 * _field(1, _field(1, size))
    return _field(1, name) + _field(2, _field(1, _field(1, TYPES[dtype]) + _field(2, shape)))


def _tensor(name: str, array: AnyArray) -> bytes:
    dims = b"".join(_field(1, size) for size in array.shape)
    return dims + _field(2, TYPES[array.dtype.name]) + _field(8, name) + _field(9, array.tobytes())


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
