"""Reads, from the bytes of an OpenVINO IR's .xml, what must be known before an engine parses it.

Refused: a document type or entities (so no expansion and no external file), encodings other than UTF-8, deep or huge
XML, offsets that are no plain numbers. Limits: IR version 11, as of OpenVINO 2022.1; layers themselves are not checked.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from mmap import mmap

from pocketdiffusion.bundle.strict_json import short
from pocketdiffusion.errors import BundleCorrupt, BundleUnsafe

MAX_BYTES = 64 << 20
MAX_ELEMENTS = 1_000_000
MAX_DEPTH = 64

Port = tuple[str, tuple[int | str | None, ...] | None]
"""dtype ("" when it is not numpy's) and shape, as in `onnx_wire.GraphFacts`."""

_DTYPES = {"f16": "float16", "f32": "float32", "f64": "float64", "boolean": "bool"}
_DTYPES |= {
    f"{kind}{bits}": f"{name}{bits}" for kind, name in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
}
_PRECISIONS = {"FP16": "f16", "FP32": "f32", "FP64": "f64", "BOOL": "boolean"}
_SHARING = re.compile(r"(_[1-9]\d*x[1-9]\d*)?(_part[1-9]\d*)?$")
_LAYER = ["net", "layers", "layer"]
_EDGE = ["net", "edges", "edge"]


@dataclass(frozen=True, slots=True)
class IrFacts:
    """What an IR declares."""

    constants: tuple[tuple[int, int], ...]
    """(offset, size) of each constant in the .bin file, in bytes."""
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


def read_ir(data: bytes | mmap, file: str) -> IrFacts:
    """Constants, inputs and outputs of an IR. Raises BundleCorrupt, BundleUnsafe."""
    if len(data) > MAX_BYTES:
        raise BundleCorrupt(file, f"{len(data)} bytes of XML, at most {MAX_BYTES} are read")
    text = data[:]
    if b"\0" in text or b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise BundleUnsafe(file, "XML with a document type or entities, or not in UTF-8")
    reader = _Reader(file)
    reader.parse(text)
    return IrFacts(tuple(reader.constants), dict(reader.inputs()), dict(reader.outputs()))


def weights_name(file: str) -> str:
    """The name of the weights file that stands beside an IR's .xml file.

    Graphs for further image sizes and parts of graphs, `openvino_model_768x768_part2.xml`, read that of the first:
    `openvino_model.bin`.
    """
    return _SHARING.sub("", posixpath.basename(file).removesuffix(".xml")) + ".bin"


def port_name(names: list[str]) -> str:
    """Of a port's names the one that a person wrote: converters add numbers and paths. `names` is not empty."""
    return min(names, key=lambda name: (name.isdigit(), len(name), name))


@dataclass(slots=True)
class _Layer:
    kind: str
    attributes: Mapping[str, str]
    data: Mapping[str, str] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    """Output port -> its tensors' names."""
    precision: str = ""
    shape: list[int | None] = field(default_factory=list)
    """Of the first port."""


class _Reader:
    """Events of a streaming parser, gathered. Bodies of loops and branches lie deeper and count for constants only."""

    def __init__(self, file: str) -> None:
        self.constants: list[tuple[int, int]] = []
        self._file = file
        self._path: list[str] = []
        self._elements = 0
        self._layers: dict[str, _Layer] = {}
        self._open: _Layer | None = None
        self._edges: dict[str, tuple[str, str]] = {}
        self._dimension: str | None = None

    def parse(self, text: bytes) -> None:
        from xml.parsers import expat

        parser = expat.ParserCreate()
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler, parser.XmlDeclHandler = self._text, self._declaration
        try:
            parser.Parse(text, True)
        except expat.ExpatError as error:
            raise BundleCorrupt(self._file, f"not valid XML: {error}") from None

    def inputs(self) -> Iterator[tuple[str, Port]]:
        for layer in self._layers.values():
            if layer.kind == "Parameter" and (names := [name for listed in layer.names.values() for name in listed]):
                yield port_name(names), (_DTYPES.get(layer.data.get("element_type", ""), ""), self._shape(layer))

    def outputs(self) -> Iterator[tuple[str, Port]]:
        for identity, layer in self._layers.items():
            if layer.kind != "Result":
                continue
            names = _names(layer.attributes.get("output_names", "")) or self._source_names(identity)
            if names:
                dtype = _DTYPES.get(_PRECISIONS.get(layer.precision, layer.precision.lower()), "")
                yield port_name(names), (dtype, tuple(layer.shape))

    def _source_names(self, result: str) -> list[str]:
        source, port = self._edges.get(result, ("", ""))
        return self._layers[source].names.get(port, []) if source in self._layers else []

    def _shape(self, layer: _Layer) -> tuple[int | None, ...] | None:
        text = layer.data.get("shape", "")
        if text == "...":
            return None
        axes = [axis.strip() for axis in text.split(",")] if text.strip() else []
        return tuple(_whole(axis, self._file) if axis.isdigit() else None for axis in axes)

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        self._elements += 1
        if len(self._path) > MAX_DEPTH or self._elements > MAX_ELEMENTS:
            raise BundleCorrupt(self._file, f"XML of more than {MAX_DEPTH} levels or {MAX_ELEMENTS} elements")
        if name == "data" and "offset" in attributes and "size" in attributes:
            self.constants.append((_whole(attributes["offset"], self._file), _whole(attributes["size"], self._file)))
        if self._path == _LAYER:
            self._open = self._layers[attributes.get("id", "")] = _Layer(attributes.get("type", ""), attributes)
        elif self._path == _EDGE:
            source = attributes.get("from-layer", ""), attributes.get("from-port", "")
            self._edges[attributes.get("to-layer", "")] = source
        elif self._open is not None and self._path[:3] == _LAYER:
            self._inside(self._open, self._path[3:], attributes)

    def _inside(self, layer: _Layer, below: list[str], attributes: dict[str, str]) -> None:
        if below == ["data"]:
            layer.data = attributes
        elif below == ["output", "port"] and "names" in attributes:
            layer.names[attributes.get("id", "")] = _names(attributes["names"])
        elif below == ["input", "port"]:
            layer.precision = attributes.get("precision", "")
        elif below == ["input", "port", "dim"] and layer.kind == "Result":
            self._dimension = ""

    def _text(self, text: str) -> None:
        if self._dimension is not None:
            self._dimension += text

    def _end(self, _: str) -> None:
        if self._dimension is not None and self._open is not None:
            axis, self._dimension = self._dimension.strip(), None
            self._open.shape.append(None if axis == "-1" else _whole(axis, self._file))
        self._path.pop()

    def _declaration(self, _version: str, encoding: str | None, _standalone: int) -> None:
        if encoding is not None and encoding.lower() not in ("utf-8", "us-ascii"):
            raise BundleUnsafe(self._file, f"XML in the encoding {short(encoding)}, allowed: utf-8")


def _names(text: str) -> list[str]:
    """A list of names, in which a comma that belongs to a name stands after a backslash."""
    return [name.replace("\0", ",") for name in text.replace("\\,", "\0").split(",") if name]


def _whole(text: str, file: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise BundleCorrupt(file, f"offset, size or axis {short(text)}")
    return int(text)
