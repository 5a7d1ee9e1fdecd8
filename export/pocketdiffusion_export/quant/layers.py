"""Layers whose activations can be quantized, and a graph's nodes with such layers rewritten.

Quantized are Conv (input and output: onnxruntime has no integer Conv with a float output) and MatMul by a weight
(input only). Gemm stays float: diffusion models use it on one vector per image, where it takes no time. Attention's own
products stay float, because quantized ones break the fused attention of OpenVINO, which costs more than it saves. So
does a Conv of few channels, such as the first one of latents or of a picture: it is a thousandth of the work, what it
loses is lost to the whole graph, and OpenVINO 2026.4 was seen to drop its bias in a whole UNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion_export.quant.calibrate import Range

Pair = tuple[NDArray[np.int8], Array]
"""A weight's int8 codes and scales."""

Codes = Mapping[str, Pair]

MIN_CHANNELS = 16
"""Of a Conv's input, in each of its groups."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One Conv or MatMul."""

    op: str
    source: str
    """Tensor that goes in."""
    weight: str
    bias: str | None
    result: str
    """Tensor that comes out."""

    @property
    def axis(self) -> int:
        """Axis of the weight's output channels."""
        return 0 if self.op == "Conv" else 1

    @property
    def observed(self) -> tuple[str, ...]:
        """Tensors whose ranges it needs."""
        return (self.source, self.result) if self.op == "Conv" else (self.source,)


Stand = Callable[[int, str, str, str], list[onnx.NodeProto]]
"""(index of a layer, tensor whose range counts, source, output) -> nodes that make the output of the source."""


def find_layers(graph: onnx.GraphProto, weights: Iterable[str]) -> list[Layer]:
    """Conv nodes, not those of few channels, and MatMul nodes with one of these weights and a constant bias or none."""
    known, shapes = set(weights), {tensor.name: tensor.dims for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul") and len(node.input) > 1 and node.input[1] in known:
            bias = node.input[2] if len(node.input) > 2 else None
            few = node.op_type == "Conv" and shapes[node.input[1]][1] < MIN_CHANNELS
            if (bias is None or bias in shapes) and not few:
                found.append(Layer(node.op_type, node.input[0], node.input[1], bias, node.output[0]))
    return found


def float_copy(model: onnx.ModelProto, layers: Sequence[Layer], codes: Codes, store: Path) -> onnx.ModelProto:
    """A copy with int8 weights in these layers, float activations and no outputs; it belongs beside `store`.

    The codes are written to that file, from which engines map them. Each weight is dequantized where it is used first:
    run in the order of the nodes, few are held as float together.
    """
    made = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    made.graph.name = model.graph.name
    made.graph.input.extend(model.graph.input)
    made.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in codes)
    waiting = {layer.weight: layer for layer in layers}
    with store.open("wb") as stream:
        for node in model.graph.node:
            for name in node.input:
                if name in waiting:
                    made.graph.node.append(_int8_weight(made.graph, waiting.pop(name), codes[name], stream))
            made.graph.node.append(node)
    return made


def add_switches(graph: onnx.GraphProto, layers: Sequence[Layer], ranges: Mapping[str, Range], vector: str) -> None:
    """Quantize each layer's activations in float arithmetic as far as a new input says: 0 not at all, 1 fully."""
    graph.input.append(onnx.helper.make_tensor_value_info(vector, onnx.TensorProto.FLOAT, [len(layers)]))
    places = [_constant(graph, f"{vector}_{index}", np.array(index, np.int64)) for index in range(len(layers))]

    def mix(layer: int, observed: str, source: str, output: str) -> list[onnx.NodeProto]:
        back, error, switch, part = (f"{output}_{what}" for what in ("back", "error", "switch", "part"))
        return [
            *_quantize(graph, ranges[observed], source, back),
            onnx.helper.make_node("Sub", [back, source], [error]),
            onnx.helper.make_node("Gather", [vector, places[layer]], [switch]),
            onnx.helper.make_node("Mul", [error, switch], [part]),
            onnx.helper.make_node("Add", [source, part], [output]),
        ]

    _rewrite(graph, layers, mix, shared=False)


def make_integer(
    graph: onnx.GraphProto, layers: Sequence[Layer], ranges: Mapping[str, Range], codes: dict[str, Pair]
) -> None:
    """Quantize these layers in place: QuantizeLinear and DequantizeLinear around them, int8 weights, int32 biases.

    Their codes are taken out of `codes`, so that both never fill the memory together.
    """

    def pair(layer: int, observed: str, source: str, output: str) -> list[onnx.NodeProto]:
        return _quantize(graph, ranges[observed], source, output)

    _rewrite(graph, layers, pair, shared=True)
    scales = {layer.weight: codes[layer.weight][1] for layer in layers}
    first = [_int8_weight(graph, layer, codes.pop(layer.weight)) for layer in {x.weight: x for x in layers}.values()]
    by_result = {f"{layer.result}_float": layer for layer in layers if layer.bias is not None}
    for node in graph.node:
        if node.output[0] in by_result:
            layer = by_result[node.output[0]]
            first.append(_int32_bias(graph, layer, ranges[layer.source].scale * scales[layer.weight]))
            node.input[2] = first[-1].output[0]
    first += graph.node
    _drop_unused(graph, first)


def _rewrite(graph: onnx.GraphProto, layers: Sequence[Layer], stand: Stand, *, shared: bool) -> None:
    """Put `stand` in front of each layer and behind each Conv; `shared`: once for all layers that read a tensor."""
    by_result = {layer.result: index for index, layer in enumerate(layers)}
    ready = {layer.result: layer.result for layer in layers if layer.op == "Conv"} if shared else {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        index = by_result.get(node.output[0])
        if index is None:
            nodes.append(node)
            continue
        layer = layers[index]
        if layer.source not in ready or not shared:
            ready[layer.source] = f"{layer.source}_for_{index}"
            nodes += stand(index, layer.source, layer.source, ready[layer.source])
        node.input[0] = ready[layer.source]
        nodes.append(node)
        if layer.op == "Conv":
            node.output[0] = f"{layer.result}_float"
            nodes += stand(index, layer.result, node.output[0], layer.result)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _quantize(graph: onnx.GraphProto, span: Range, source: str, output: str) -> list[onnx.NodeProto]:
    scale = _constant(graph, f"{output}_scale", np.array(span.scale, np.float32))
    zero = _constant(graph, f"{output}_zero", np.array(span.zero_point, np.uint8))
    return [
        onnx.helper.make_node("QuantizeLinear", [source, scale, zero], [f"{output}_uint8"]),
        onnx.helper.make_node("DequantizeLinear", [f"{output}_uint8", scale, zero], [output]),
    ]


def _int8_weight(graph: onnx.GraphProto, layer: Layer, pair: Pair, stream: BinaryIO | None = None) -> onnx.NodeProto:
    """The zero points are written out, as older onnxruntimes want them. The codes go to `stream` if there is one."""
    values, scale = pair
    small: dict[str, AnyArray] = {"scale": scale, "zero": np.zeros(len(scale), np.int8)}
    names = [f"{layer.weight}_int8", *(f"{layer.weight}_{what}" for what in small)]
    if stream is None:
        _constant(graph, names[0], values)
    else:
        _outside(graph, names[0], values, stream)
    for name, array in zip(names[1:], small.values(), strict=True):
        _constant(graph, name, array)
    return onnx.helper.make_node("DequantizeLinear", names, [layer.weight], axis=layer.axis)


def _outside(graph: onnx.GraphProto, name: str, values: NDArray[np.int8], stream: BinaryIO) -> None:
    tensor = graph.initializer.add(name=name, data_type=onnx.TensorProto.INT8, dims=values.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    place = {"location": Path(stream.name).name, "offset": stream.tell(), "length": values.size}
    stream.write(values.tobytes())
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))


def _int32_bias(graph: onnx.GraphProto, layer: Layer, scale: Array) -> onnx.NodeProto:
    bias = next(numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == layer.bias)
    limit = float(np.iinfo(np.int32).max)
    values = np.clip(np.rint(bias.astype(np.float64) / scale), -limit, limit).astype(np.int32)
    arrays: dict[str, AnyArray] = {
        "int32": values,
        "bias_scale": scale.astype(np.float32),
        "bias_zero": np.zeros(len(scale), np.int32),
    }
    names = [_constant(graph, f"{layer.result}_{what}", array) for what, array in arrays.items()]
    return onnx.helper.make_node("DequantizeLinear", names, [f"{layer.result}_bias"], axis=0)


def _constant(graph: onnx.GraphProto, name: str, array: AnyArray) -> str:
    graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def _drop_unused(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    used = {name for node in nodes for name in node.input} - {name for node in nodes for name in node.output}
    for index in reversed(range(len(graph.initializer))):  # a list made anew would hold copies of them all
        if graph.initializer[index].name not in used:
            del graph.initializer[index]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
