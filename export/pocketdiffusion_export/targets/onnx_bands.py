"""A convolutional decoder's graph, cut so that pictures can be computed in bands of rows, exactly.

A group norm needs the mean and variance of the whole picture, and nothing else after the first upsampling needs more
than the rows around its own. So the graph is cut in front of each norm and each upsampling there: the runtime computes
one piece band after band, sums what comes out, and feeds the next piece the sums (`pocketdiffusion.bands`). What stands
before the first upsampling is one piece, which computes the whole at the latents' resolution: attention is in it.

Pieces are the graph's own nodes, so they hold whatever form a recipe gave the weights. Convolutions keep their padding:
a band is fed with `halo` rows of its neighbours, and what it computes of those is cut off. At the picture's edges there
are none, and the padding is what it was. Maps are wired by the names of the graph's tensors; a piece that normalizes
the map NAME takes the inputs NAME_mean and NAME_variance, (1, groups, 1, 1).

Limit: activations that are quantized (recipe w8a8) turn the last bit's difference of a sum into a whole step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from pocketdiffusion.bands import MEAN, VARIANCE
from pocketdiffusion.bundle.manifest import BandGraph
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.targets.onnx import describe_value, with_external_data

POINTWISE = frozenset({"Add", "Cast", "DequantizeLinear", "Div", "Mul", "Sigmoid", "Sub"})
"""Operators of which each row of the answer depends on the same row only."""


@dataclass(frozen=True)
class Piece:
    """One graph of a cut decoder. Its initializers are the whole graph's by name."""

    model: onnx.ModelProto
    halo: int | None
    """Rows of its neighbours that a band of the input needs on each side; None: the input must be whole."""
    scale: int
    """Rows that it makes of each row."""


@dataclass(frozen=True)
class _Norm:
    """A group norm in the form that tracing gives it: Reshape, InstanceNormalization, Reshape, Mul, Add."""

    source: str
    """The map that is normalized."""
    groups: int
    epsilon: float
    gamma: str
    beta: str
    result: str
    nodes: frozenset[int]
    """Places of its nodes in the graph."""


def cut_file(file: Path) -> tuple[BandGraph, ...]:
    """Write the pieces of a decoder's graph beside it, from where they read its weights.

    A graph that holds its weights itself gets them in a file beside it. Raises ExportError as `cut` does.
    """
    model = onnx.load(file, load_external_data=False)
    if not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        model = with_external_data(model, file.with_name(f"{file.name}_data"))
        file.write_bytes(model.SerializeToString(deterministic=True))
    return tuple(_write(piece, file, number) for number, piece in enumerate(cut(model), 1))


def _write(piece: Piece, file: Path, number: int) -> BandGraph:
    place = file.with_name(f"{file.stem}_band{number}{file.suffix}")
    place.write_bytes(piece.model.SerializeToString(deterministic=True))
    onnx.checker.check_model(place)
    graph = piece.model.graph
    return BandGraph(
        graph=f"{file.parent.name}/{place.name}",
        inputs={value.name: describe_value(value) for value in graph.input},
        outputs={value.name: describe_value(value) for value in graph.output},
        halo=piece.halo,
        scale=piece.scale,
    )


def cut(model: onnx.ModelProto) -> list[Piece]:
    """The pieces of a decoder in the order of use. Weights may lie outside of `model`, which stays as it is.

    Raises ExportError for a graph without upsampling or without group norms after it, and for one of another form.
    """
    graph = _Graph(model.graph)
    head, stages = graph.stages()
    if not any(isinstance(first, _Norm) for first, _ in stages):
        raise ExportError("there is no group norm after an upsampling, as in tiny decoders; use tiles at run time")
    parts = [head, *(_nodes(graph, first, places) for first, places in stages)]
    scales = [math.prod(_enlarged(node, graph) for node in part if node.op_type == "Resize") for part in parts]
    halos = [None, *(_halo(part, graph) for part in parts[1:])]
    wanted = {value.name for value in graph.outputs} | {name for part in parts for name in _read(part, graph)}
    pieces, rows = [], 1
    for part, halo, scale in zip(parts, halos, scales, strict=True):
        pieces.append(Piece(_model(model, graph, part, wanted, (rows, rows * scale)), halo, scale))
        rows *= scale
    return pieces


class _Graph:
    """A graph's nodes with what is known of its tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs, self.outputs = list(graph.input), list(graph.output)
        self.norms: list[_Norm] = []
        """Those after the first upsampling, once `stages` found them."""
        self.constant = set(self.tensors)
        for node in self.nodes:
            if all(name in self.constant for name in node.input if name):
                self.constant.update(node.output)
        self.maker = {name: place for place, node in enumerate(self.nodes) for name in node.output}
        self.readers: dict[str, list[int]] = {}
        for place, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(place)

    def before(self, names: Iterable[str]) -> set[int]:
        """The places of all nodes that these tensors depend on."""
        found: set[int] = set()
        waiting = [self.maker[name] for name in names if name in self.maker]
        while waiting:
            place = waiting.pop()
            if place not in found:
                found.add(place)
                waiting += [self.maker[name] for name in self.nodes[place].input if name in self.maker]
        return found

    def stages(self) -> tuple[list[onnx.NodeProto], list[tuple[_Norm | onnx.NodeProto, set[int]]]]:
        """Nodes up to the first upsampling; then for each norm or upsampling it, and the places of what follows it.

        A node stands in the latest stage that it depends on, and nothing reads a map before the stage that normalizes
        or upsamples it: a shortcut's convolution goes with the norm of the same map, after which that map can go.
        """
        resizes = [place for place, node in enumerate(self.nodes) if node.op_type == "Resize"]
        if not resizes:
            raise ExportError("there is no upsampling, so nothing is gained by bands")
        head = self.before([self.nodes[resizes[0]].input[0]])
        norms = {place: self._norm(place) for place, node in enumerate(self.nodes) if _normalizes(node, place, head)}
        self.norms = list(norms.values())
        inside = {place for norm in norms.values() for place in norm.nodes}
        starts = sorted([*norms, *resizes])
        first: dict[str, int] = {}
        stage_of: dict[str, int] = {}
        for index, place in enumerate(starts):
            norm = norms.get(place)
            first.setdefault(norm.source if norm else self.nodes[place].input[0], index)
            if norm:
                stage_of[norm.result] = index
        members: list[set[int]] = [set() for _ in starts]
        for place, node in enumerate(self.nodes):
            if place in head or place in inside or all(name in self.constant for name in node.output):
                continue
            own = [starts.index(place)] if place in resizes else []
            stage = max([0, *own, *(max(stage_of.get(name, 0), first.get(name, 0)) for name in node.input)])
            members[stage].add(place)
            stage_of.update(dict.fromkeys(node.output, stage))
        stages = [(norms.get(start, self.nodes[start]), members[index]) for index, start in enumerate(starts)]
        return [self.nodes[place] for place in sorted(head) if not self._is_constant(place)], stages

    def constants(self, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """The nodes that make what these read of constants alone."""
        places = self.before(name for node in nodes for name in node.input if name in self.constant)
        return [self.nodes[place] for place in sorted(places)]

    def array(self, name: str) -> Any:
        """A small initializer's value."""
        return numpy_helper.to_array(self.tensors[name])

    def channels(self, name: str) -> int:
        """Of a map: those of the convolution that it comes from, by its bias."""
        waiting = [name]
        while waiting:
            place = self.maker.get(waiting.pop())
            if place is None:
                continue
            node = self.nodes[place]
            if node.op_type == "Conv" and len(node.input) > 2:
                return self._length(node.input[2])
            waiting += node.input
        raise ExportError(f"'{name}' comes from no convolution with a bias, so its channels are not known")

    def _length(self, vector: str) -> int:
        """Of a constant with one axis, whatever form it is stored in."""
        while vector not in self.tensors:
            vector = self.nodes[self.maker[vector]].input[0]
        return int(self.tensors[vector].dims[0])

    def _is_constant(self, place: int) -> bool:
        return all(name in self.constant for name in self.nodes[place].output)

    def _norm(self, place: int) -> _Norm:
        node = self.nodes[place]
        before = self.nodes[self.maker[node.input[0]]]
        after = self._only_reader(node.output[0], "Reshape")
        scaled = self._only_reader(self.nodes[after].output[0], "Mul")
        shifted = self._only_reader(self.nodes[scaled].output[0], "Add")
        shape = self.maker.get(self.nodes[after].input[1])
        others = frozenset() if shape is None else frozenset({shape})
        return _Norm(
            source=before.input[0],
            groups=int(self.tensors[node.input[1]].dims[0]),
            epsilon=float(onnx.helper.get_node_attr_value(node, "epsilon")),
            gamma=self._parameter(scaled),
            beta=self._parameter(shifted),
            result=self.nodes[shifted].output[0],
            nodes=frozenset({place, self.maker[node.input[0]], after, scaled, shifted}) | others,
        )

    def _only_reader(self, name: str, kind: str) -> int:
        places = self.readers.get(name, [])
        if len(places) != 1 or self.nodes[places[0]].op_type != kind:
            found = ", ".join(self.nodes[place].op_type for place in places) or "nothing"
            raise ExportError(f"a group norm is followed by {found}, not {kind}; it can't be cut there")
        return places[0]

    def _parameter(self, place: int) -> str:
        found: list[str] = [name for name in self.nodes[place].input if name in self.constant]
        return found[0]


def _normalizes(node: onnx.NodeProto, place: int, head: set[int]) -> bool:
    return node.op_type == "InstanceNormalization" and place not in head


def _scaled(norm: _Norm, graph: _Graph) -> list[onnx.NodeProto]:
    """Nodes that normalize a map with given mean and variance: result = source * scale + shift, by channel.

    scale = gamma / sqrt(variance + epsilon) and shift = beta - mean * scale are small: (1, channels, 1, 1).
    """
    channels, name = graph.channels(norm.source), norm.source
    inner = {key: f"{norm.result}_{key}" for key in ("epsilon", "grouped", "all", "safe", "root", "gamma", "beta")}
    inner |= {key: f"{norm.result}_{key}" for key in ("by_group", "scale", "moved", "offset", "shift", "product")}
    node = onnx.helper.make_node
    constants = (
        ("epsilon", np.array(norm.epsilon, np.float32)),
        ("grouped", np.array([1, norm.groups, channels // norm.groups, 1], np.int64)),
        ("all", np.array([1, channels, 1, 1], np.int64)),
    )
    return [
        *(node("Constant", [], [inner[key]], value=numpy_helper.from_array(array)) for key, array in constants),
        node("Add", [f"{name}{VARIANCE}", inner["epsilon"]], [inner["safe"]]),
        node("Sqrt", [inner["safe"]], [inner["root"]]),
        node("Reshape", [norm.gamma, inner["grouped"]], [inner["gamma"]]),
        node("Reshape", [norm.beta, inner["grouped"]], [inner["beta"]]),
        node("Div", [inner["gamma"], inner["root"]], [inner["by_group"]]),
        node("Mul", [f"{name}{MEAN}", inner["by_group"]], [inner["moved"]]),
        node("Sub", [inner["beta"], inner["moved"]], [inner["offset"]]),
        node("Reshape", [inner["by_group"], inner["all"]], [inner["scale"]]),
        node("Reshape", [inner["offset"], inner["all"]], [inner["shift"]]),
        node("Mul", [name, inner["scale"]], [inner["product"]]),
        node("Add", [inner["product"], inner["shift"]], [norm.result]),
    ]


def _nodes(graph: _Graph, first: _Norm | onnx.NodeProto, places: set[int]) -> list[onnx.NodeProto]:
    """A stage's nodes; an upsampling is among those of `places`."""
    nodes = [graph.nodes[place] for place in sorted(places)]
    return [*_scaled(first, graph), *nodes] if isinstance(first, _Norm) else nodes


def _read(nodes: Sequence[onnx.NodeProto], graph: _Graph) -> list[str]:
    """What nodes read that neither they nor constants make, in the order of use."""
    made = {name for node in nodes for name in node.output}
    read = dict.fromkeys(name for node in nodes for name in node.input if name)
    return [name for name in read if name not in made and name not in graph.constant]


def _halo(nodes: Sequence[onnx.NodeProto], graph: _Graph) -> int:
    """Rows of its input on each side that the answer's rows depend on. Raises ExportError where they are not a few."""
    reach: dict[str, Fraction] = {}
    rows: dict[str, int] = {}  # of a tensor to each row of the input; only maps are in it
    for name in _read(nodes, graph):
        if not name.endswith((MEAN, VARIANCE)):
            reach[name], rows[name] = Fraction(0), 1
    for node in nodes:
        known = [name for name in node.input if name in rows]
        if not known:
            continue  # what makes a norm's scale and shift
        scale, seen = rows[known[0]], max(reach[name] for name in known)
        if node.op_type == "Resize":
            scale *= _enlarged(node, graph)
        elif node.op_type == "Conv":
            seen += Fraction(_radius(node), scale)
        elif node.op_type not in POINTWISE:
            raise ExportError(f"{node.op_type} is not computed row by row; the decoder can't be cut into bands")
        for name in node.output:
            reach[name], rows[name] = seen, scale
    return math.ceil(max(reach.values()))


def _enlarged(node: onnx.NodeProto, graph: _Graph) -> int:
    """By how much a nearest-neighbour Resize enlarges."""
    mode = onnx.helper.get_node_attr_value(node, "mode")
    scales = graph.array(node.input[2]).tolist() if len(node.input) == 3 else []
    if mode != b"nearest" or len(scales) != 4 or scales[2] != int(scales[2]):
        raise ExportError("an upsampling that is not nearest-neighbour, by a whole number, can't be cut into bands")
    return int(scales[2])


def _radius(node: onnx.NodeProto) -> int:
    """Rows that a convolution sees above and below its own."""
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    radius = given["kernel_shape"][0] // 2
    plain = set(given.get("strides", [1])) | set(given.get("dilations", [1])) == {1}
    if not plain or given["pads"][0] != radius or given["pads"][2] != radius or given["kernel_shape"][0] % 2 == 0:
        raise ExportError("a convolution with steps, gaps or another padding can't be cut into bands")
    return int(radius)


def _model(
    model: onnx.ModelProto, graph: _Graph, nodes: Sequence[onnx.NodeProto], wanted: set[str], rows: tuple[int, int]
) -> onnx.ModelProto:
    """A graph of these nodes. `rows` are those of its input and its output to a row of latents; they name the axes."""
    every = [*graph.constants(nodes), *nodes]
    read = dict.fromkeys(name for node in every for name in node.input)
    made = [name for node in nodes for name in node.output if name in wanted]
    groups = {f"{norm.source}{end}": norm.groups for norm in graph.norms for end in (MEAN, VARIANCE)}
    ports = [
        [_port(name, rows[side], graph, groups.get(name)) for name in names]
        for side, names in enumerate((_read(nodes, graph), made))
    ]
    tensors = [graph.tensors[name] for name in read if name in graph.tensors]
    return onnx.helper.make_model(
        onnx.helper.make_graph(every, "piece", *ports, tensors),
        opset_imports=list(model.opset_import),
        producer_name=model.producer_name,
        ir_version=model.ir_version,
    )


def _port(name: str, rows: int, graph: _Graph, groups: int | None) -> onnx.ValueInfoProto:
    """An input or output: of the whole graph, a norm's figure, or a map in between. All are about one picture."""
    whole = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    known = whole[name].type.tensor_type.shape.dim[1].dim_value if name in whole else groups
    channels = known or graph.channels(name)
    axes: list[int | str] = [1, 1] if groups else [f"{rows}*height", f"{rows}*width"]
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, *axes])
