"""Weights of an ONNX graph as numpy arrays: which they are, how well they come back, how one is put in another form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from pocketdiffusion.tensors import Array

MAX_SQNR_DB = 200.0
"""Stands for a tensor that comes back exactly."""

Form = tuple[Sequence[onnx.TensorProto], Sequence[onnx.NodeProto]]
"""Initializers, and the nodes that make the weight of them under its own name."""


def weight_axes(graph: onnx.GraphProto) -> dict[str, int]:
    """Float initializers that are weights of Conv, Gemm, MatMul and Gather only, with the axis of their channels."""
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    found: dict[str, set[int | None]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in tensors:
                found.setdefault(name, set()).add(_output_axis(node, index, len(tensors[name].dims)))
    axes = {name: kinds.pop() for name, kinds in found.items() if len(kinds) == 1}
    return {name: axis for name, axis in axes.items() if axis is not None}


def transposed(node: onnx.NodeProto) -> bool:
    """Whether a Gemm reads its weight as [out, in]."""
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def replace_weights(graph: onnx.GraphProto, form: Callable[[onnx.TensorProto], Form | None]) -> None:
    """Put initializers in another form, in place; None leaves one as it is."""
    nodes: list[onnx.NodeProto] = []
    for tensor in list(graph.initializer):
        new = form(tensor)
        if new is not None:
            (first, *others), made = new
            tensor.CopyFrom(first)  # in place, as a list made anew would hold copies of them all
            graph.initializer.extend(others)
            nodes += made
    for index, node in enumerate(nodes):
        node.name = f"{node.op_type}_w{index}"
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def half(tensor: onnx.TensorProto) -> Form:
    """A weight stored as float16, with the Cast that engines compute once, at load."""
    stored = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}_half")
    cast = onnx.helper.make_node("Cast", [stored.name], [tensor.name], to=onnx.TensorProto.FLOAT)
    return [stored], [cast]


def why_float(weight: Array, least: int) -> str | None:
    """Why a weight stays float32 where float16 is the largest other form; None: it need not.

    Those with fewer than `least` elements do, and those with a value that float16 can't hold.
    """
    if weight.size < least:
        return f"{weight.size} elements, fewer than {least}"
    return None if np.abs(weight).max(initial=0) <= np.finfo(np.float16).max else "holds values beyond float16"


def sqnr_db(weight: Array, back: Array) -> float:
    """SQNR of a weight that was stored and read back, rounded to 0.1 dB."""
    noise = float(np.square(weight - back, dtype=np.float64).sum())
    signal = float(np.square(weight, dtype=np.float64).sum())
    return MAX_SQNR_DB if noise == 0 else round(10 * float(np.log10(max(signal, 1e-30) / noise)), 1)


def along(scale: Array, axis: int, ndim: int) -> Array:
    """A vector shaped so that it multiplies one axis."""
    return scale.reshape([-1 if index == axis else 1 for index in range(ndim)])


def _output_axis(node: onnx.NodeProto, index: int, ndim: int) -> int | None:
    if node.op_type == "Conv" and index == 1:
        return 0
    if node.op_type == "Gather" and index == 0 and ndim == 2:
        return 0
    if node.op_type == "MatMul" and index == 1 and ndim == 2:
        return 1
    if node.op_type == "Gemm" and index == 1:
        return 0 if transposed(node) else 1
    return None
