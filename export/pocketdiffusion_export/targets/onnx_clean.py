"""Make a traced ONNX graph small and plain: the same arithmetic, fewer nodes, nothing of the machine that made it.

Passes, repeated until nothing changes: constants become initializers, nodes of constants are computed, identities and
repeated nodes (same operator, inputs and attributes) go, equal initializers are stored once, dead nodes go. Names,
documentation and metadata from tracing are replaced, so that the same model gives the same bytes.

Weights stay arrays outside of the graph until the end, since a protobuf neither shares nor frees memory: they are held
once, as views of their source, and copied one after another into the result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.errors import ExportError

MAX_FOLDED_GROWTH = 1 << 16
"""Bytes by which a computed constant may be larger than what it is computed from."""

SHARED_PROBES = 16
"""Values by which arrays of one shape are told apart before they are compared as a whole."""

Constants = dict[str, AnyArray]


def clean(model: onnx.ModelProto, weights: Constants | None = None) -> onnx.ModelProto:
    """A cleaned copy. `weights` are inputs of the graph that become initializers.

    They are taken over: the dict is empty afterwards, and each array is let go once it is copied. Raises ExportError
    for graphs with branches or loops, which no known component has.
    """
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    for node in nodes:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ExportError(f"the traced graph holds control flow ({node.op_type}), which is not exported")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    if weights is not None:
        constants |= weights
        weights.clear()
    opset = model.opset_import[0].version
    outputs = [value.name for value in model.graph.output]
    before = -1
    while len(nodes) != before:
        before = len(nodes)
        nodes = _fold(nodes, constants, opset)
        _share_constants(nodes, constants)
        nodes = _merge(nodes, outputs)
        nodes = _drop_dead(nodes, outputs)
    return _rebuild(model, nodes, constants, opset)


def _fold(nodes: list[onnx.NodeProto], constants: Constants, opset: int) -> list[onnx.NodeProto]:
    kept = []
    for node in nodes:
        inputs = [name for name in node.input if name]
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant(node)
            continue
        if inputs and len(node.output) == 1 and all(name in constants for name in inputs):
            result = _evaluate(node, {name: constants[name] for name in inputs}, opset)
            if result.nbytes <= sum(constants[name].nbytes for name in set(inputs)) + MAX_FOLDED_GROWTH:
                constants[node.output[0]] = result
                continue
        kept.append(node)
    return kept


def _constant(node: onnx.NodeProto) -> AnyArray:
    (attribute,) = node.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        array: AnyArray = numpy_helper.to_array(value)
        return array
    return np.array(value, np.float32 if "float" in attribute.name else np.int64)


def _evaluate(node: onnx.NodeProto, feeds: Constants, opset: int) -> AnyArray:
    inputs = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in feeds.items()
    ]
    output = onnx.ValueInfoProto(name=node.output[0])
    graph = onnx.helper.make_graph([node], "fold", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])


def _share_constants(nodes: list[onnx.NodeProto], constants: Constants) -> None:
    alike: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
    rename: dict[str, str] = {}
    for name in sorted({name for node in nodes for name in node.input if name in constants}):
        array = constants[name]
        probes = array.flat[:: max(1, array.size // SHARED_PROBES)].tobytes()
        candidates = alike.setdefault((array.dtype.str, array.shape, probes), [])
        same = [other for other in candidates if _same_bits(array, constants[other])]
        candidates += [] if same else [name]
        rename[name] = same[0] if same else name
    _rename_inputs(nodes, rename.get)


def _same_bits(one: AnyArray, other: AnyArray) -> bool:
    """Equal to the sign of zero and with NaN equal to itself, unlike `==`."""
    return one is other or one.tobytes() == other.tobytes()


def _merge(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    kept, first, rename = [], dict[tuple[object, ...], str](), dict[str, str]()
    for node in nodes:
        _rename_inputs([node], rename.get)
        fixed = len(node.output) != 1 or node.output[0] in outputs
        if node.op_type == "Identity" and not fixed:
            rename[node.output[0]] = node.input[0]
            continue
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        key = (node.op_type, node.domain, tuple(node.input), attributes)
        if key in first and not fixed:
            rename[node.output[0]] = first[key]
            continue
        if len(node.output) == 1:
            first.setdefault(key, node.output[0])
        kept.append(node)
    return kept


def _drop_dead(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _rename_inputs(nodes: list[onnx.NodeProto], rename: Callable[[str, str], str | None]) -> None:
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = rename(name, name) or name


def _rebuild(model: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: Constants, opset: int) -> onnx.ModelProto:
    fixed = {value.name for value in (*model.graph.input, *model.graph.output)}
    names = {name: name for name in fixed}
    for index, node in enumerate(nodes):
        node.name, node.doc_string = f"{node.op_type}_{index}", ""
        del node.metadata_props[:]
        for output in node.output:
            names.setdefault(output, f"t{index}_{node.op_type}")
    used = list(dict.fromkeys(name for node in nodes for name in node.input if name in constants))
    for index, name in enumerate(used):
        names.setdefault(name, _constant_name(name, index, constants[name]))
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    inputs = [value for value in model.graph.input if value.name not in constants]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, list(model.graph.output))
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
    domains = {node.domain for node in nodes} - {""}
    imports = [onnx.helper.make_opsetid("", opset), *(onnx.helper.make_opsetid(name, 1) for name in sorted(domains))]
    made = onnx.helper.make_model(graph, opset_imports=imports, producer_name="pocketdiffusion", ir_version=8)
    for name in set(constants).difference(used):
        del constants[name]
    for name in used:
        _add_initializer(made.graph, names[name], constants.pop(name))
    return made


def _add_initializer(graph: onnx.GraphProto, name: str, array: AnyArray) -> None:
    """In place, because adding a finished tensor would copy it."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    graph.initializer.add(name=name, data_type=kind, dims=array.shape).raw_data = array.tobytes()


def _constant_name(name: str, index: int, array: AnyArray) -> str:
    """A parameter keeps its name in the source; what tracing made gets a number."""
    made = name.startswith(("/", "onnx::")) or "::" in name
    return f"c{index}" if made or array.ndim == 0 else name
