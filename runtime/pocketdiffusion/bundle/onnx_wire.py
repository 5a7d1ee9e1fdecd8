"""Reads, from the bytes of an ONNX file, what must be checked before an engine parses it. No onnx import.

A walk over the protobuf wire format, with a stack of its own and bounded in depth and in work. It is stricter than a
protobuf parser where parsers differ: a singular message that appears twice, a field with the wrong wire type, groups
and over-long numbers are refused. Field numbers are those of onnx.proto (ONNX IR version 3 and later).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import NoReturn

from pocketdiffusion.bundle.strict_json import short
from pocketdiffusion.errors import BundleCorrupt, BundleUnsafe
from pocketdiffusion.tensors import TensorSpec

MAX_DEPTH = 100
"""Of nested messages, as in protobuf's own parsers."""
MAX_FIELDS = 2_000_000
MAX_BYTES = (1 << 31) - 1

_CHILDREN: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
_SINGULAR: Mapping[str, frozenset[int]] = {
    "ModelProto": frozenset({7}),
    "TrainingInfoProto": frozenset({1, 2}),
    "AttributeProto": frozenset({5, 6, 22}),
    "SparseTensorProto": frozenset({1, 2}),
}
_EXTERNAL_DATA = 13
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"}
_DTYPES |= {10: "float16", 11: "float64", 12: "uint32", 13: "uint64"}
_KEYS = frozenset(("location", "offset", "length", "checksum"))
_COUNT = re.compile(r"[0-9]{1,19}")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where a tensor's bytes lie. `length` None: as many as the tensor needs."""

    location: str
    offset: int
    length: int | None


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What an ONNX file declares. A dtype that is not numpy's is "", an undeclared shape is None."""

    external: tuple[ExternalData, ...]
    inputs: Mapping[str, tuple[str, tuple[int | str | None, ...] | None]]
    """Without those that initializers fill."""
    outputs: Mapping[str, tuple[str, tuple[int | str | None, ...] | None]]

    def mismatch(self, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> str | None:
        """The first difference from what a manifest declares, or None. Free axes match everything."""
        for what, found, declared in (("inputs", self.inputs, inputs), ("outputs", self.outputs, outputs)):
            if found.keys() != declared.keys():
                return f"{what} are {short(sorted(found))}, the manifest says {short(sorted(declared))}"
            for name, spec in declared.items():
                dtype, shape = found[name]
                if dtype != spec.dtype or not _fits(shape, spec.shape):
                    return f"{what} {short(name)} is {dtype} {shape}, the manifest says {spec.dtype} {spec.shape}"
        return None


def _fits(found: tuple[int | str | None, ...] | None, declared: tuple[int | str | None, ...]) -> bool:
    if found is None:
        return True
    pairs = zip(found, declared, strict=False)
    return len(found) == len(declared) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in pairs
    )


def read_graph(data: bytes | mmap, file: str) -> GraphFacts:
    """External data, inputs and outputs of an ONNX model. Raises BundleCorrupt, BundleUnsafe."""
    return _Walker(data, file).facts()


class _Walker:
    def __init__(self, data: bytes | mmap, file: str) -> None:
        self._data = data
        self._file = file
        self._left = MAX_FIELDS

    def facts(self) -> GraphFacts:
        if len(self._data) > MAX_BYTES:
            self._refuse(f"more than {MAX_BYTES} bytes, which no protobuf parser reads")
        graph = list(self._messages((0, len(self._data)), 7))
        if not graph:
            self._refuse("holds no graph")
        initializers = {self._text_field(span, 8) for span in self._messages(graph[0], 5)}
        inputs = dict(self._value(span) for span in self._messages(graph[0], 11))
        return GraphFacts(
            external=tuple(self._external()),
            inputs={name: spec for name, spec in inputs.items() if name not in initializers},
            outputs=dict(self._value(span) for span in self._messages(graph[0], 12)),
        )

    def _external(self) -> Iterator[ExternalData]:
        """Of all tensors: initializers, constants, sparse ones, in subgraphs, functions and training information."""
        stack = [("ModelProto", 0, len(self._data), 1)]
        while stack:
            kind, start, stop, depth = stack.pop()
            if depth > MAX_DEPTH:
                self._refuse(f"messages nested deeper than {MAX_DEPTH} levels")
            if kind == "TensorProto":
                entries = list(self._messages((start, stop), _EXTERNAL_DATA))
                if entries:
                    yield self._location(entries)
                continue
            children, once = _CHILDREN[kind], _SINGULAR.get(kind, frozenset())
            seen: set[int] = set()
            for number, wire, first, last in self._fields(start, stop):
                child = children.get(number)
                if child is None:
                    continue
                if wire != _BYTES or number in seen:
                    self._refuse(f"field {number} of {kind} is malformed or appears twice")
                if number in once:
                    seen.add(number)
                stack.append((child, first, last, depth + 1))

    def _location(self, entries: list[Span]) -> ExternalData:
        pairs = [(self._text_field(span, 1), self._text_field(span, 2)) for span in entries]
        values = dict(pairs)
        if len(values) != len(pairs):
            self._refuse("external data with a key that appears twice")
        if unknown := values.keys() - _KEYS:
            raise BundleUnsafe(self._file, f"external data with the unknown key {short(min(unknown))}")
        if "location" not in values:
            self._refuse("external data without a location")
        length = self._count(values["length"]) if "length" in values else None
        return ExternalData(values["location"], self._count(values.get("offset", "0")), length)

    def _count(self, text: str) -> int:
        if not _COUNT.fullmatch(text):
            self._refuse(f"external data with the offset or length {short(text)}")
        return int(text)

    def _value(self, span: Span) -> tuple[str, tuple[str, tuple[int | str | None, ...] | None]]:
        """Name, dtype and shape of a ValueInfoProto."""
        name, dtype, shape = self._text_field(span, 1), "", None
        for types in self._messages(span, 2):
            for tensor in self._messages(types, 1):
                for number, wire, first, _ in self._fields(*tensor):
                    if number == 1 and wire == _VARINT:
                        dtype = _DTYPES.get(first, "")
                for dims in self._messages(tensor, 2):
                    shape = tuple(self._dimension(dim) for dim in self._messages(dims, 1))
        return name, (dtype, shape)

    def _dimension(self, span: Span) -> int | str | None:
        for number, wire, first, last in self._fields(*span):
            if number == 1 and wire == _VARINT:
                return first
            if number == 2 and wire == _BYTES:
                return self._text(first, last)
        return None

    def _text_field(self, span: Span, wanted: int) -> str:
        """A singular string field, "" when absent."""
        found = list(self._messages(span, wanted))
        if len(found) > 1:
            self._refuse(f"text field {wanted} appears twice")
        return self._text(*found[0]) if found else ""

    def _text(self, start: int, stop: int) -> str:
        try:
            return self._data[start:stop].decode("utf-8")
        except UnicodeDecodeError:
            self._refuse("a text that is not UTF-8")

    def _messages(self, span: Span, wanted: int) -> Iterator[Span]:
        """Where the values of a length-delimited field lie."""
        for number, wire, first, last in self._fields(*span):
            if number == wanted:
                if wire != _BYTES:
                    self._refuse(f"field {number} has wire type {wire}")
                yield first, last

    def _fields(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(number, wire type, value, 0) of numbers; (number, wire type, start, stop) of everything else."""
        data, at = self._data, start
        while at < stop:
            self._left -= 1
            if self._left < 0:
                self._refuse(f"more than {MAX_FIELDS} fields to check")
            tag, at = data[at], at + 1
            if tag >= 0x80:
                tag, at = self._varint(at - 1, stop)
            number, wire = tag >> 3, tag & 7
            if number == 0 or tag >= 1 << 32:
                self._refuse("a field number out of range")
            if wire == _VARINT:
                value, at = self._varint(at, stop)
                yield number, wire, value, 0
                continue
            if wire == _BYTES:
                size, at = self._varint(at, stop)
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                self._refuse(f"wire type {wire}")
            if size > stop - at:
                self._refuse("a field that ends after its message")
            yield number, wire, at, at + size
            at += size

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        if at < stop and self._data[at] < 0x80:
            return self._data[at], at + 1
        value = shift = 0
        while at < stop and shift < 70:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        self._refuse("a number that is cut short or too long")

    def _refuse(self, reason: str) -> NoReturn:
        raise BundleCorrupt(self._file, f"not a sound ONNX model: {reason}")
