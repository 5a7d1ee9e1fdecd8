"""A component's ONNX graph as an ML program, operator by operator.

coremltools reads no ONNX. A cleaned graph holds some thirty kinds of operators, all of fixed shape here, so that they
are translated rather than the source traced a second time: names of weights and the recipe's integers survive. What
depends on shapes alone is computed now. Quantized weights become the `constexpr` operations that Core ML reads.

In a float16 program inputs stay float32 up to the first layer that has weights: a timestep of 999 times a frequency
has no digits left in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.targets.coreml_vision import VISION
from pocketdiffusion_export.targets.coreml_weights import STORED, Weight, linear_name

MASK = np.float32(-1e4)
"""Stands in float16 for the lowest float32, which attention masks are made of; Apple's converter takes the same."""
HALF_MAX = float(np.finfo(np.float16).max)

ELEMENTWISE = {"Add": mb.add, "Sub": mb.sub, "Mul": mb.mul, "Div": mb.real_div, "Pow": mb.pow}
UNARY = {
    "Cos": mb.cos,
    "Erf": mb.erf,
    "Exp": mb.exp,
    "Relu": mb.relu,
    "Sigmoid": mb.sigmoid,
    "Sin": mb.sin,
    "Sqrt": mb.sqrt,
    "Tanh": mb.tanh,
}
KINDS = {onnx.TensorProto.BOOL: "bool", onnx.TensorProto.INT32: "int32", onnx.TensorProto.INT64: "int32"}
"""What a Cast makes, other than floating numbers."""


class Translation:
    """The values of one graph, by ONNX name: arrays while they are constant, then variables of the ML program.

    Core ML has no inputs without axes: such an input comes with one axis of length 1, which a first Unsqueeze keeps.
    """

    def __init__(self, model: onnx.ModelProto, inputs: Mapping[str, Any], *, half: bool) -> None:
        self._graph, self._half = model.graph, half
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._values: dict[str, Any] = dict(inputs)
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._made: dict[tuple[int, bool], Any] = {}
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
            return np.array(given[0].shape, np.int64)
        if node.op_type in STORED and all(isinstance(value, np.ndarray) for value in given):
            weight = STORED[node.op_type](node.output[0], given, facts)
            if weight is not None:
                return weight
        if node.op_type not in WEIGHTED:
            given = [self.layer(value) if isinstance(value, Weight) else value for value in given]
        if all(value is None or isinstance(value, np.ndarray) for value in given):
            feeds = {name: value for name, value in zip(node.input, given, strict=True) if value is not None}
            return np.asarray(ReferenceEvaluator(node, opsets=self._opsets).run(None, feeds)[0])
        if node.op_type in ELEMENTWISE:
            return ELEMENTWISE[node.op_type](**dict(zip("xy", self._alike(given), strict=True)))
        if node.op_type in UNARY:
            return UNARY[node.op_type](x=given[0])
        if node.op_type == "MatMul" and given[0].rank <= 3 and len(_shape(given[1])) == 2:
            return self._linear(node, *given)
        if node.op_type not in OPERATORS:
            raise ExportError(f"the operator {node.op_type} can't be written for Core ML; known: {', '.join(KNOWN)}")
        return OPERATORS[node.op_type](self, given, facts)

    def _linear(self, node: onnx.NodeProto, x: Any, weight: Any) -> Any:
        """A MatMul by a weight, with the bias that is added to nothing but its result."""
        users, bias = self._users.get(node.output[0], []), {}
        if len(users) == 1 and users[0].op_type == "Add":
            other = next(name for name in users[0].input if name != node.output[0])
            if other in self._constants and len(self._constants[other].dims) == 1:
                bias = {"bias": self.constant(self._value(other), self.kind)}
        made = mb.linear(x=self.layer(x), weight=self.layer(weight, transposed=True), **bias)
        if bias:
            self._values[users[0].output[0]] = made
        return made

    def _value(self, name: str) -> Any:
        if name not in self._values:
            array = numpy_helper.to_array(self._constants[name])
            small = array.dtype.itemsize == 1 and array.dtype.kind not in "biu"  # int4 comes in a type of its own
            self._values[name] = array.astype(np.int8) if small else array
        return self._values[name]

    def name_of(self, array: AnyArray) -> str:
        """The ONNX name of a constant, for the program."""
        return next((name for name, value in self._values.items() if value is array), "constant")

    @property
    def kind(self) -> str:
        """The type that layers compute in."""
        return "fp16" if self._half else "fp32"

    def constant(self, array: AnyArray, kind: str) -> AnyArray:
        """A constant in a program's type. Raises ExportError where float16 can't hold it."""
        if array.dtype.kind in "iub":
            return array.astype(bool) if array.dtype.kind == "b" else array.astype(np.int32)
        if kind == "fp32":
            return array.astype(np.float32, copy=False)
        array = np.where(array < -1e30, MASK, array)
        if array.size and np.abs(array).max() > HALF_MAX:
            raise ExportError("a constant of the graph is too large for float16; export with --recipe fp32")
        return array.astype(np.float16)

    def layer(self, value: Any, *, transposed: bool = False) -> Any:
        """A value in the type that layers compute in; a weight is made once, under its name."""
        if not isinstance(value, np.ndarray | Weight):
            return value if kind_of(value) == self.kind else mb.cast(x=value, dtype=self.kind)
        key = (id(value), transposed)
        if key not in self._made:
            self._made[key] = self._weight(value, transposed)
        return self._made[key]

    def _weight(self, value: AnyArray | Weight, transposed: bool) -> Any:
        if isinstance(value, Weight):
            return value.make(self, transposed=transposed)
        array, name = self.constant(value, self.kind), self.name_of(value)
        return mb.const(val=array.T, name=linear_name(name)) if transposed else mb.const(val=array, name=name)

    def _alike(self, given: Sequence[Any]) -> list[Any]:
        """Values of one type: that of the variables, or of layers where these differ."""
        found = {kind_of(value) for value in given if not isinstance(value, np.ndarray)}
        kind = found.pop() if len(found) == 1 else self.kind
        return [
            self.constant(value, kind)
            if isinstance(value, np.ndarray)
            else value
            if kind_of(value) == kind
            else mb.cast(x=value, dtype=kind)
            for value in given
        ]


def kind_of(value: Any) -> str:
    """The type of a variable: "fp16", "fp32", "int32" or "bool"."""
    return str(types.builtin_to_string(value.dtype))


def _shape(value: Any) -> tuple[int, ...]:
    """Of a constant; () of variables."""
    found = value.stored if isinstance(value, Weight) else value
    return found.shape if isinstance(found, np.ndarray) else ()


def _conv(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    rank = given[0].rank - 2
    pads = facts.get("pads", [0] * 2 * rank)
    bias = {} if len(given) < 3 else {"bias": at.constant(given[2], at.kind)}
    return mb.conv(
        x=at.layer(given[0]),
        weight=at.layer(given[1]),
        strides=facts.get("strides", [1] * rank),
        pad_type="custom",
        pad=[pads[axis + side * rank] for axis in range(rank) for side in (0, 1)],
        dilations=facts.get("dilations", [1] * rank),
        groups=facts.get("group", 1),
        **bias,
    )


def _gemm(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    if facts.get("transA") or facts.get("alpha", 1.0) != 1 or facts.get("beta", 1.0) != 1:
        raise ExportError("a Gemm with factors or a transposed input can't be written for Core ML")
    x, bias = at.layer(given[0]), at.constant(given[2], at.kind) if len(given) > 2 else None
    if facts.get("transB"):
        return mb.linear(x=x, weight=at.layer(given[1]), **({} if bias is None else {"bias": bias}))
    product = mb.matmul(x=x, y=at.layer(given[1]))
    return product if bias is None else mb.add(x=product, y=bias)


def _matmul(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.matmul(x=at.layer(given[0]), y=at.layer(given[1]))


def _attention(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """onnxruntime's MultiHeadAttention of (rows, length, heads * size) tensors, without masks and caches."""
    if len(given) != 3:
        raise ExportError("attention with a mask, a bias or a cache can't be written for Core ML")
    heads = facts["num_heads"]
    size = given[0].shape[2] // heads
    q, k, v = (
        mb.transpose(x=mb.reshape(x=at.layer(x), shape=[*x.shape[:2], heads, size]), perm=[0, 2, 1, 3]) for x in given
    )
    scale = facts.get("scale") or size**-0.5
    scaled = q if scale == 1 else mb.mul(x=q, y=at.constant(np.array(scale), at.kind))
    weights = mb.softmax(x=mb.matmul(x=scaled, y=k, transpose_y=True), axis=-1)
    mixed = mb.transpose(x=mb.matmul(x=weights, y=v), perm=[0, 2, 1, 3])
    return mb.reshape(x=mixed, shape=list(given[0].shape))


def _softmax(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.softmax(x=at.layer(given[0]), axis=facts.get("axis", -1))


def _layer_norm(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    axes = list(range(facts.get("axis", -1) % given[0].rank, given[0].rank))
    return mb.layer_norm(x=at.layer(given[0]), axes=axes, **_scaled(at, given, facts))


def _instance_norm(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.instance_norm(x=at.layer(given[0]), **_scaled(at, given, facts))


def _scaled(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    dtype = np.float16 if at.kind == "fp16" else np.float32
    gamma, beta = (at.constant(value, at.kind) for value in given[1:3])
    return {"gamma": gamma, "beta": beta, "epsilon": dtype(facts.get("epsilon", 1e-5))}


def _reshape(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, wanted = given[0], [int(size) for size in given[1]]
    shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    if -1 in shape:
        shape[shape.index(-1)] = int(np.prod(x.shape)) // -int(np.prod(shape))
    return mb.reshape(x=x, shape=shape)


def _transpose(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.transpose(x=given[0], perm=list(facts["perm"]))


def _unsqueeze(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.expand_dims(x=given[0], axes=[int(axis) for axis in given[1]])


def _squeeze(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.squeeze(x=given[0], axes=[int(axis) for axis in given[1]])


def _concat(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.concat(values=at._alike(given), axis=facts["axis"])


def _slice(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, starts, ends = given[:3]
    axes = given[3] if len(given) > 3 else range(len(starts))
    steps = given[4] if len(given) > 4 else [1] * len(starts)
    begin, end, stride = [0] * x.rank, list(x.shape), [1] * x.rank
    for start, stop, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise ExportError("a slice that runs backwards can't be written for Core ML")
        begin[axis], end[axis], stride[axis] = *slice(int(start), int(stop)).indices(x.shape[axis])[:2], int(step)
    return mb.slice_by_index(x=x, begin=begin, end=end, stride=stride)


def _gather(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, indices = given
    chosen = at.constant(indices, "int32") if isinstance(indices, np.ndarray) else indices
    table = at.layer(x) if isinstance(x, np.ndarray | Weight) else x
    return mb.gather(x=table, indices=chosen, axis=facts.get("axis", 0))


def _gather_elements(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.gather_along_axis(x=given[0], indices=given[1], axis=facts.get("axis", 0))


def _argmax(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.reduce_argmax(x=given[0], axis=facts.get("axis", 0), keep_dims=bool(facts.get("keepdims", 1)))


def _reduce_l2(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """Opset 17 has its axes among the attributes."""
    return mb.reduce_l2_norm(x=given[0], axes=list(facts["axes"]), keep_dims=bool(facts.get("keepdims", 1)))


def _clip(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x = given[0]
    for bound, limit in zip(given[1:], (mb.maximum, mb.minimum), strict=False):
        if bound is not None:
            x = limit(x=x, y=at.constant(bound, kind_of(x)))
    return x


def _cast(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """Floating numbers stay in the type they have: that is this program's choice and not the source's."""
    kind = KINDS.get(facts["to"])
    if kind is None:
        return given[0] if kind_of(given[0]).startswith("fp") else mb.cast(x=given[0], dtype="fp32")
    return given[0] if kind_of(given[0]) == kind else mb.cast(x=given[0], dtype=kind)


def _equal(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, y = at._alike(given)
    return mb.equal(x=x, y=y)


def _expand(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, shape = given[0], [int(size) for size in given[1]]
    new = len(shape) - x.rank
    x = mb.expand_dims(x=x, axes=list(range(new))) if new > 0 else x
    shape = [1] * (x.rank - len(shape)) + shape
    repeats = [size if own == 1 else 1 for own, size in zip(x.shape, shape, strict=True)]
    return x if set(repeats) == {1} else mb.tile(x=x, reps=repeats)


def _pad(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, pads = at.layer(given[0]), [int(size) for size in given[1]]
    if facts.get("mode", b"constant") != b"constant" or (len(given) > 2 and given[2] is not None and given[2] != 0):
        raise ExportError("padding with anything but zeros can't be written for Core ML")
    zero = np.float16(0) if at.kind == "fp16" else np.float32(0)
    return mb.pad(x=x, pad=[pads[axis + side * x.rank] for axis in range(x.rank) for side in (0, 1)], constant_val=zero)


def _resize(at: Translation, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x = given[0]
    wanted = given[3] if len(given) > 3 else np.array(x.shape) * given[2]
    factors = [int(size) // own for size, own in zip(wanted, x.shape, strict=True)]
    whole = all(factor * own == size for factor, own, size in zip(factors, x.shape, wanted, strict=True))
    modes = [facts.get(key) for key in ("mode", "coordinate_transformation_mode", "nearest_mode")]
    if modes != [b"nearest", b"asymmetric", b"floor"] or not whole or factors[:2] != [1, 1]:
        raise ExportError("resizing by anything but repeated pixels can't be written for Core ML")
    return mb.upsample_nearest_neighbor(x=x, scale_factor_height=factors[2], scale_factor_width=factors[3])


Operator = Callable[[Translation, Sequence[Any], Mapping[str, Any]], Any]

OPERATORS: Mapping[str, Operator] = {
    "ArgMax": _argmax,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Equal": _equal,
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gemm": _gemm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MultiHeadAttention": _attention,
    "Pad": _pad,
    "ReduceL2": _reduce_l2,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "Softmax": _softmax,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    **VISION,
}
WEIGHTED = ("Conv", "Gather", "Gemm", "MatMul")
"""Operators that take weights in any form; for others they are made first."""
KNOWN = sorted({*OPERATORS, *ELEMENTWISE, *UNARY, "Shape", "DequantizeLinear"})
