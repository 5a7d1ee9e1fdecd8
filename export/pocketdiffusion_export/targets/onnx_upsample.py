"""Enlarging a map twice and a 3x3 convolution of it, as one 2x2 convolution of the small map: 4/9 of the work, exactly.

Nearest-neighbour enlarging shows each pixel four times, so that of nine pixels under the kernel at most four differ.
An output pixel (2i + a, 2j + b) needs the small map's rows i - 1 and i where a = 0, i and i + 1 where a = 1, weighed by
sums of the kernel's rows; with columns it is the same. The four phases (a, b) are output channels of one convolution
over the map with a border of zeros, DepthToSpace puts them in their places, and a row and column at each side, which no
output pixel has, are cut off. The border of zeros is that of the large map. (Aitken et al. 2017, arXiv:1707.02937,
turn it round: they start from a sub-pixel convolution.) The weights grow to 16/9.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from pocketdiffusion.tensors import Array

FIRST = np.array([[1, 0, 0], [0, 1, 1]], np.float32)
SECOND = np.array([[1, 1, 0], [0, 0, 1]], np.float32)
"""What the two taps of phase 0, and of phase 1, are sums of: rows (or columns) of the kernel."""
LEAST_CHANNELS = 256
"""Of the small map: with fewer there is little work to save for 16/9 of the weights. Processor time in place of Resize
and Conv, one thread of a Zen 4:

============  ===========  =======  =======  ========  =======  ========
                           onnxruntime       OpenVINO
-------------------------  ----------------  ---------------------------
channels      small map    float32  w8a8     float32   bf16     w8a8
============  ===========  =======  =======  ========  =======  ========
512           32x32        0.53     0.62     0.49      0.51     0.56
256           32x32        0.59     0.74     0.53      0.58     0.59
64            128x128      0.81     1.13     0.74      0.72     1.27
============  ===========  =======  =======  ========  =======  ========

A transposed convolution, which does the same arithmetic in one node, is as fast on OpenVINO but for bfloat16 (0.89);
on onnxruntime it takes 0.72 in float32 and 2.7 in w8a8.
"""
PLAIN = {"dilations": [1, 1], "group": 1, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1]}
"""Attributes of the convolutions that are meant."""
NEAREST = {"mode": b"nearest", "coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}
TWICE = [1.0, 1.0, 2.0, 2.0]


@dataclass(frozen=True, slots=True)
class _Place:
    """One Resize and the Conv after it."""

    resize: onnx.NodeProto
    conv: onnx.NodeProto


def fold_upsampling(model: onnx.ModelProto, least: int = LEAST_CHANNELS) -> int:
    """Rewrite, in place, every such pair of nodes of constant weights and `least` channels; returns how many."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    places = [place for place in _places(graph, constants) if constants[place.conv.input[1]].dims[1] >= least]
    if not places:
        return 0
    made = {place.conv.output[0]: _nodes(graph, place, constants) for place in places}
    gone = {place.resize.output[0] for place in places}
    nodes = [new for node in graph.node if node.output[0] not in gone for new in made.get(node.output[0], [node])]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    used = {name for node in graph.node for name in node.input}
    for index in reversed(range(len(graph.initializer))):  # a list made anew would hold copies of them all
        if graph.initializer[index].name not in used:
            del graph.initializer[index]
    return len(places)


def by_phase(kernel: Array) -> Array:
    """A 3x3 kernel, (out, in, 3, 3), as a 2x2 one, (4 out, in, 2, 2): the second phase first, along both axes."""
    parts = [
        np.einsum("oiuv,pu,qv->oipq", kernel, rows, columns) for rows in (SECOND, FIRST) for columns in (SECOND, FIRST)
    ]
    found: Array = np.concatenate(parts).astype(np.float32)
    return found


def _places(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto]) -> list[_Place]:
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    resizes = {node.output[0]: node for node in graph.node if _enlarges_twice(node, constants)}
    return [
        _Place(resizes[node.input[0]], node)
        for node in graph.node
        if node.op_type == "Conv"
        and node.input[0] in resizes
        and uses[node.input[0]] == 1
        and all(name in constants for name in node.input[1:])
        and {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == PLAIN
    ]


def _enlarges_twice(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "Resize" or len(node.input) != 3 or node.input[2] not in constants:
        return False
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    factors = numpy_helper.to_array(constants[node.input[2]]).tolist()
    return bool(found.items() >= NEAREST.items() and factors == TWICE)


def _nodes(graph: onnx.GraphProto, place: _Place, constants: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
    conv, result = place.conv, place.conv.output[0]
    weight, *bias = conv.input[1:]
    names = [_add(graph, f"{weight}_by_phase", by_phase(numpy_helper.to_array(constants[weight])))]
    names += [_add(graph, f"{name}_by_phase", np.tile(numpy_helper.to_array(constants[name]), 4)) for name in bias]
    edges = [_add(graph, f"{result}_{what}", np.array(at)) for what, at in (("from", [1, 1]), ("to", [-1, -1]))]
    axes = _add(graph, f"{result}_axes", np.array([2, 3]))
    phases, large = f"{result}_phases", f"{result}_large"
    attributes = {**PLAIN, "kernel_shape": [2, 2]}
    return [
        onnx.helper.make_node("Conv", [place.resize.input[0], *names], [phases], name=conv.name, **attributes),
        _named("DepthToSpace", [phases], large, blocksize=2),
        _named("Slice", [large, *edges, axes], result),
    ]


def _named(kind: str, inputs: Sequence[str], output: str, **attributes: int) -> onnx.NodeProto:
    return onnx.helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **attributes)


def _add(graph: onnx.GraphProto, name: str, array: Array) -> str:
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return name
