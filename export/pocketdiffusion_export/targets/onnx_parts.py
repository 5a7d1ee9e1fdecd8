"""An ONNX graph cut into a chain of graphs, which read the weights' file of the whole.

Handed on are float tensors whose channels are known. What is cheap, or must not be torn from what follows, is repeated
instead: everything of whole numbers (shapes, indices), attention masks, and QuantizeLinear with DequantizeLinear, so
that engines find the same integer layers in a part as in the whole. A layer whose output is quantized has that in its
own part, since onnxruntime has no integer Conv with a float output, and hands on what is dequantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from pocketdiffusion.bundle.manifest import GraphPart
from pocketdiffusion_export.cutting import Flow, Op, Piece, cut
from pocketdiffusion_export.targets.onnx import OPSET, describe_value, with_external_data

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
QDQ = ("QuantizeLinear", "DequantizeLinear")
LAYERS = ("Conv", "MatMul", "Gemm")
MASKS = ("Slice", "Expand", "Where", "ConstantOfShape")
"""What of constants and whole numbers makes a small constant."""
FREE_LENGTH = 64
"""Stands for free lengths where sizes of tensors are compared."""

Values = Mapping[str, onnx.ValueInfoProto]


def cut_file(file: Path, limit: int) -> tuple[GraphPart, ...]:
    """Write the parts of a graph beside it, each of at most `limit` bytes of weights where its layers allow that.

    Nothing is written, and () returned, where one part holds them all. A graph that holds its weights itself gets
    them in a file beside it, for all to read.
    """
    model = onnx.load(file, load_external_data=False)
    types = Types(model.graph)
    pieces = cut(flow_of(model.graph, types), limit)
    if len(pieces) < 2:
        return ()
    if not any(_outside(tensor) for tensor in model.graph.initializer):
        model = with_external_data(model, file.with_name(f"{file.name}_data"))
        file.write_bytes(model.SerializeToString(deterministic=True))
    return tuple(_write(model, types, piece, file, number) for number, piece in enumerate(pieces, 1))


@dataclass
class Types:
    """Types and shapes of all tensors: as far as the graph tells them, and with lengths for free axes."""

    declared: Values
    sized: Values

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.declared = _inferred(graph, {})
        names = {dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim}
        self.sized = _inferred(graph, {name: 2 if name == "batch" else FREE_LENGTH for name in names if name})

    def is_float(self, name: str) -> bool:
        """Whether a tensor is known to be of floats."""
        return name in self.declared and self.declared[name].type.tensor_type.elem_type in FLOATS

    def bytes(self, name: str) -> int | None:
        """Of a float tensor at those lengths; None where its rank is not known, or an axis behind the first."""
        if not self.is_float(name) or not self.declared[name].type.tensor_type.HasField("shape"):
            return None
        kind = self.sized[name].type.tensor_type
        if not all(dim.HasField("dim_value") for dim in kind.shape.dim[1:]):
            return None
        size = math.prod(dim.dim_value or 1 for dim in kind.shape.dim) * (2 if kind.elem_type == FLOATS[1] else 4)
        return int(size)


def _inferred(graph: onnx.GraphProto, lengths: Mapping[str, int]) -> Values:
    """Every tensor of a graph as ONNX infers it, with these lengths for free axes of inputs."""
    plain = onnx.GraphProto.FromString(graph.SerializeToString())
    for node in plain.node:
        if node.op_type == "MultiHeadAttention":  # unknown to ONNX itself; its output is shaped as its queries
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]
    for value in plain.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in lengths:
                dim.dim_value = lengths[dim.dim_param]
    named = {dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim}
    if lengths:
        for value in plain.output:
            value.type.tensor_type.ClearField("shape")
    imports = [onnx.helper.make_opsetid("", OPSET)]
    found = onnx.shape_inference.infer_shapes(onnx.helper.make_model(plain, opset_imports=imports), data_prop=True)
    values = [*found.graph.input, *found.graph.value_info, *found.graph.output]
    for dim in (dim for value in values for dim in value.type.tensor_type.shape.dim):
        if dim.dim_param not in named:
            dim.ClearField("dim_param")  # numbers that inference gave out
    return {value.name: value for value in values}


def flow_of(graph: onnx.GraphProto, types: Types) -> Flow:
    """What of a graph counts for cutting it. Its weights may be outside of it, but for small ones."""
    makers = {name: node for node in graph.node for name in node.output}
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    small = {tensor.name for tensor in graph.initializer}
    ops, crossing = [], dict[str, int]()
    for node in graph.node:
        rounds = _rounds_layer(node, makers)
        whole = not any(map(types.is_float, node.output))
        if whole or (node.op_type in MASKS and all(name in small for name in node.input)):
            small.update(node.output)
        repeated = (node.op_type in QDQ or node.output[0] in small) and not rounds
        ops.append(Op(_read(node, makers), _made(node, rounded=rounds), repeated))
        if node.op_type not in LAYERS or node.output[0] not in quantized:
            crossing |= {name: size for name in node.output if (size := types.bytes(name)) is not None}
    return Flow(
        ops=ops,
        outputs=tuple(value.name for value in graph.output),
        weights={tensor.name: _stored(tensor) for tensor in graph.initializer},
        crossing=crossing,
    )


def _made(node: onnx.NodeProto, *, rounded: bool) -> tuple[str, ...]:
    """A node's outputs; rounded ones also under a name for layers, which is not handed on."""
    names = tuple(filter(None, node.output))
    return (*names, *(f"{name} for layers" for name in names if rounded))


def _read(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> tuple[str, ...]:
    """A node's inputs. A layer takes what is rounded behind another layer from its own part."""
    names = tuple(filter(None, node.input))
    if node.op_type not in LAYERS:
        return names
    return tuple(
        f"{name} for layers" if name in makers and _rounds_layer(makers[name], makers) else name for name in names
    )


def _rounds_layer(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether this is the QuantizeLinear behind a layer, or its DequantizeLinear."""
    while node.op_type in QDQ and node.input[0] in makers:
        node = makers[node.input[0]]
        if node.op_type in LAYERS:
            return True
    return False


def _outside(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _stored(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor, wherever they lie."""
    places = {entry.key: entry.value for entry in tensor.external_data}
    return int(places["length"]) if places else int(tensor.ByteSize())


def part_of(model: onnx.ModelProto, types: Types, piece: Piece) -> onnx.ModelProto:
    """A piece of a graph as a model, with its weights."""
    graph = model.graph
    nodes = [graph.node[index] for index in piece.ops]
    used = {name for node in nodes for name in node.input}
    inputs, outputs = ([types.declared[name] for name in names] for names in (piece.inputs, piece.outputs))
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, graph.name, inputs, outputs, constants),
        opset_imports=list(model.opset_import),
        producer_name=model.producer_name,
        ir_version=model.ir_version,
    )


def _write(model: onnx.ModelProto, types: Types, piece: Piece, file: Path, number: int) -> GraphPart:
    place = file.with_name(f"{file.stem}_part{number}{file.suffix}")
    made = part_of(model, types, piece)
    place.write_bytes(made.SerializeToString(deterministic=True))
    onnx.checker.check_model(place)
    return GraphPart(
        graph=f"{file.parent.name}/{place.name}",
        inputs={value.name: describe_value(value) for value in made.graph.input},
        outputs={value.name: describe_value(value) for value in made.graph.output},
        weight_bytes=piece.weight_bytes,
    )
