"""An OpenVINO IR cut into a chain of IRs, which read the .bin file of the whole.

The .xml says all: layers, the edges between their ports, and where in the .bin each constant lies. A part holds some of
the layers; what it is handed becomes a Parameter, what it hands on a Result. Handed on are float tensors; whole numbers
and FakeQuantize are repeated in each part that needs them, as in `onnx_parts`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from pocketdiffusion.bundle.manifest import GraphPart
from pocketdiffusion.bundle.openvino_xml import port_name, read_ir
from pocketdiffusion.tensors import TensorSpec
from pocketdiffusion_export.cutting import Flow, Op, Piece, cut

FLOATS = {"FP32": ("f32", 4), "FP16": ("f16", 2)}
"""Precision of a port -> element type of a Parameter, bytes."""
FREE_LENGTH = 64
"""Stands for free lengths where sizes of tensors are compared."""

ENDS = ("Const", "Parameter", "Result")
"""Layers that compute nothing."""

Xml = ElementTree.Element
Port = tuple[str, str]
"""Layer and port."""


def cut_file(file: Path, limit: int) -> tuple[GraphPart, ...]:
    """Write the parts of an IR beside it, each of at most `limit` bytes of weights where its layers allow that.

    Nothing is written, and () returned, where one part holds them all.
    """
    whole = _Ir(ElementTree.parse(file).getroot())
    pieces = cut(whole.flow(), limit)
    if len(pieces) < 2:
        return ()
    return tuple(_write(whole, piece, file, number) for number, piece in enumerate(pieces, 1))


class _Ir:
    """An IR's layers, and what flows between them. A tensor is named after its first name, or its port."""

    def __init__(self, root: Xml) -> None:
        self.root = root
        self.layers = {layer.attrib["id"]: layer for layer in root.iterfind("layers/layer")}
        self.edges = [edge.attrib for edge in root.iterfind("edges/edge")]
        self.sources = {(e["to-layer"], e["to-port"]): (e["from-layer"], e["from-port"]) for e in self.edges}
        self.ports = {
            (number, port.attrib["id"]): port
            for number, layer in self.layers.items()
            for port in layer.iterfind("output/port")
        }
        self.names = {place: _name(place, port) for place, port in self.ports.items()}
        self.places = {name: place for place, name in self.names.items()}
        self.working = [n for n, layer in self.layers.items() if layer.attrib["type"] not in ENDS]
        self.added = {name: str(len(self.layers) + index) for index, name in enumerate(self.places)}
        """Ids of the layers that a part has in the place of another's."""
        self.results = {self.read(n)[0]: n for n, layer in self.layers.items() if layer.attrib["type"] == "Result"}

    def read(self, layer: str) -> list[str]:
        """Names of the tensors that a layer reads."""
        ports = [port.attrib["id"] for port in self.layers[layer].iterfind("input/port")]
        return [self.names[self.sources[layer, port]] for port in ports]

    def made(self, layer: str) -> list[str]:
        """Names of the tensors that a layer makes."""
        return [self.names[layer, port.attrib["id"]] for port in self.layers[layer].iterfind("output/port")]

    def flow(self) -> Flow:
        """The whole, as far as cutting goes."""
        ops = []
        for number in self.working:
            kind, made = self.layers[number].attrib["type"], self.made(number)
            floats = any(self.ports[self.places[name]].attrib["precision"] in FLOATS for name in made)
            ops.append(Op(tuple(self.read(number)), tuple(made), kind == "FakeQuantize" or not floats))
        constants = [number for number, layer in self.layers.items() if layer.attrib["type"] == "Const"]
        crossing = {name: _bytes(self.ports[place]) for name, place in self.places.items()}
        return Flow(
            ops=ops,
            outputs=tuple(self.results),
            weights={self.made(n)[0]: int(_data(self.layers[n]).attrib["size"]) for n in constants},
            crossing={name: size for name, size in crossing.items() if size is not None},
        )

    def part(self, piece: Piece) -> Xml:
        """The IR of a part."""
        taken = {self.working[index] for index in piece.ops}
        read = {name for number in taken for name in self.read(number)}
        taken |= {place[0] for name in read if self._stays(place := self.places[name])}
        taken |= {self.results[name] for name in piece.outputs if name in self.results}
        given = [name for name in piece.inputs if self.places[name][0] not in taken]
        handed = [name for name in piece.outputs if name not in self.results]
        root = ElementTree.Element(self.root.tag, self.root.attrib)
        layers, edges = ElementTree.SubElement(root, "layers"), ElementTree.SubElement(root, "edges")
        layers.extend(_parameter(self.added[name], name, self.ports[self.places[name]]) for name in given)
        for number, layer in self.layers.items():
            if number in taken:
                layers.append(self._named(number, layer, handed))
        layers.extend(_result(self.added[name], name, self.ports[self.places[name]]) for name in handed)
        edges.extend(self._edges(taken, given, handed))
        root.extend(self.root.iterfind("rt_info"))
        return root

    def _stays(self, place: Port) -> bool:
        """Whether a tensor is a constant, or an input of the whole."""
        return self.layers[place[0]].attrib["type"] in ("Const", "Parameter")

    def _named(self, number: str, layer: Xml, handed: list[str]) -> Xml:
        """A layer, whose outputs that are handed on have one name, for the Result."""
        if not set(self.made(number)).intersection(handed):
            return layer
        layer = copy.deepcopy(layer)
        for port in layer.iterfind("output/port"):
            port.attrib["names"] = self.names[number, port.attrib["id"]]
        return layer

    def _edges(self, taken: set[str], given: list[str], handed: list[str]) -> Iterator[Xml]:
        replaced = {self.places[name]: (self.added[name], "0") for name in given}
        for edge in self.edges:
            source = edge["from-layer"], edge["from-port"]
            if edge["to-layer"] in taken:
                yield _edge(replaced.get(source, source), (edge["to-layer"], edge["to-port"]))
        for name in handed:
            yield _edge(self.places[name], (self.added[name], "0"))


def _name(place: Port, port: Xml) -> str:
    names = [name for name in port.attrib.get("names", "").split(",") if name]
    return port_name(names) if names else "t{}_{}".format(*place)


def _data(layer: Xml) -> Xml:
    (data,) = layer.iterfind("data")
    return data


def _shape(port: Xml) -> list[int]:
    """Lengths of a port's axes, -1 for free ones."""
    return [int(dim.text or "") for dim in port.iterfind("dim")]


def _bytes(port: Xml) -> int | None:
    """Of a float tensor of one row; None of others."""
    if port.attrib["precision"] not in FLOATS:
        return None
    lengths = _shape(port)
    rows = [1 if length < 0 else length for length in lengths[:1]]
    rest = [FREE_LENGTH if length < 0 else length for length in lengths[1:]]
    return math.prod((*rows, *rest)) * FLOATS[port.attrib["precision"]][1]


def _parameter(number: str, name: str, source: Xml) -> Xml:
    layer = ElementTree.Element("layer", id=number, name=name, type="Parameter", version="opset1")
    shape = ",".join("?" if length < 0 else str(length) for length in _shape(source))
    kind = FLOATS[source.attrib["precision"]][0]
    ElementTree.SubElement(layer, "data", shape=shape, element_type=kind)
    port = ElementTree.SubElement(
        ElementTree.SubElement(layer, "output"), "port", id="0", precision=source.attrib["precision"], names=name
    )
    port.extend(source.iterfind("dim"))
    return layer


def _result(number: str, name: str, source: Xml) -> Xml:
    layer = ElementTree.Element("layer", id=number, name=f"{name}/out", type="Result", version="opset1")
    layer.attrib["output_names"] = name
    port = ElementTree.SubElement(
        ElementTree.SubElement(layer, "input"), "port", id="0", precision=source.attrib["precision"]
    )
    port.extend(source.iterfind("dim"))
    return layer


def _edge(source: Port, target: Port) -> Xml:
    ends = {"from-layer": source[0], "from-port": source[1], "to-layer": target[0], "to-port": target[1]}
    return ElementTree.Element("edge", ends)


def _write(whole: _Ir, piece: Piece, file: Path, number: int) -> GraphPart:
    place = file.with_name(f"{file.stem}_part{number}{file.suffix}")
    root = whole.part(piece)
    ElementTree.indent(root, "\t")
    place.write_bytes(ElementTree.tostring(root, xml_declaration=True, encoding="utf-8") + b"\n")
    facts = read_ir(place.read_bytes(), place.name)
    inputs, outputs = (
        {name: TensorSpec(dtype, shape or ()) for name, (dtype, shape) in ports.items()}
        for ports in (facts.inputs, facts.outputs)
    )
    return GraphPart(f"{file.parent.name}/{place.name}", inputs, outputs, piece.weight_bytes)
