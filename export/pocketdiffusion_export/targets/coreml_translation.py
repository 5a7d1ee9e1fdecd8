"""A component's ONNX graph as an ML program, operator by operator.

coremltools reads no ONNX. A cleaned graph holds some thirty kinds of operators, all of fixed shape here, so that they
are translated rather than the source traced a second time: names of weights and the recipe's integers survive. What
depends on shapes alone is computed now. Quantized weights become the `constexpr` operations that Core ML reads.

In a float16 program inputs stay float32 up to the first layer that has weights: a timestep of 999 times a frequency
has no digits left in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from coremltools.converters.mil.mil import Builder as mb
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.targets.coreml_ops import ELEMENTWISE, KNOWN, OPERATORS, UNARY, WEIGHTED
from pocketdiffusion_export.targets.coreml_values import Values
from pocketdiffusion_export.targets.coreml_weights import STORED, Weight


class Translation:
    """The values of one graph, by ONNX name: arrays while they are constant, then variables of the ML program.

    Core ML has no inputs without axes: such an input comes with one axis of length 1, which a first Unsqueeze keeps.
    """

    def __init__(self, model: onnx.ModelProto, inputs: Mapping[str, Any], *, half: bool) -> None:
        self._graph, self._typed = model.graph, Values(self._name_of, half=half)
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._values: dict[str, Any] = dict(inputs)
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._scalars = {value.name for value in model.graph.input if not value.type.tensor_type.shape.dim}

    def run(self) -> dict[str, Any]:
        """Output name -> variable. Raises ExportError for an operator that is not known."""
        for node in self._graph.node:
            if node.output[0] not in self._values:
                self._values[node.output[0]] = self._node(node)
        return {value.name: self._values[value.name] for value in self._graph.output}

    def _node(self, node: onnx.NodeProto) -> Any:
        given: list[Any] = [self._value(name) if name else None for name in node.input]
        facts = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Unsqueeze" and node.input[0] in self._scalars:
            return given[0]
        if node.op_type == "Shape":
            return np.array(given[0].shape[facts.get("start", 0) : facts.get("end")], np.int64)
        if node.op_type in STORED and all(isinstance(value, np.ndarray) for value in given):
            weight = STORED[node.op_type](node.output[0], given, facts)
            if weight is not None:
                return weight
        if node.op_type not in WEIGHTED:
            given = [self._typed.layer(value) if isinstance(value, Weight) else value for value in given]
        if all(value is None or isinstance(value, np.ndarray) for value in given):
            feeds = {name: value for name, value in zip(node.input, given, strict=True) if value is not None}
            return np.asarray(ReferenceEvaluator(node, opsets=self._opsets).run(None, feeds)[0])
        if node.op_type in ELEMENTWISE:
            return ELEMENTWISE[node.op_type](**dict(zip("xy", self._typed.alike(given), strict=True)))
        if node.op_type in UNARY:
            return UNARY[node.op_type](x=given[0])
        if node.op_type == "MatMul" and given[0].rank <= 3 and len(_shape(given[1])) == 2:
            return self._linear(node, *given)
        if node.op_type not in OPERATORS:
            raise ExportError(f"the operator {node.op_type} can't be written for Core ML; known: {', '.join(KNOWN)}")
        return OPERATORS[node.op_type](self._typed, given, facts)

    def _linear(self, node: onnx.NodeProto, x: Any, weight: Any) -> Any:
        """A MatMul by a weight, with the bias that is added to nothing but its result."""
        users, bias = self._users.get(node.output[0], []), {}
        if len(users) == 1 and users[0].op_type == "Add":
            other = next(name for name in users[0].input if name != node.output[0])
            if other in self._constants and len(self._constants[other].dims) == 1:
                bias = {"bias": self._typed.constant(self._value(other))}
        made = mb.linear(x=self._typed.layer(x), weight=self._typed.layer(weight, transposed=True), **bias)
        if bias:
            self._values[users[0].output[0]] = made
        return made

    def _value(self, name: str) -> Any:
        if name not in self._values:
            array = numpy_helper.to_array(self._constants[name])
            small = array.dtype.itemsize == 1 and array.dtype.kind not in "biu"  # int4 comes in a type of its own
            self._values[name] = array.astype(np.int8) if small else array
        return self._values[name]

    def _name_of(self, array: AnyArray) -> str:
        """The ONNX name of a constant, for the program."""
        return next((name for name, value in self._values.items() if value is array), "constant")


def _shape(value: Any) -> tuple[int, ...]:
    """Of a constant; () of variables."""
    found = value.stored if isinstance(value, Weight) else value
    return found.shape if isinstance(found, np.ndarray) else ()
