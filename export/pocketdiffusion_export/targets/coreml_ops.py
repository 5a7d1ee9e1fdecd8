"""Operators of ONNX as operations of an ML program; see `coreml_translation`, which applies them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from coremltools.converters.mil.mil import Builder as mb

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.targets.coreml_values import Values, kind_of
from pocketdiffusion_export.targets.coreml_vision import VISION
from pocketdiffusion_export.targets.coreml_weights import Weight, constant

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


def _conv(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    rank = given[0].rank - 2
    pads = facts.get("pads", [0] * 2 * rank)
    bias = {} if len(given) < 3 else {"bias": at.constant(given[2])}
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


def _gemm(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    if facts.get("transA") or facts.get("alpha", 1.0) != 1 or facts.get("beta", 1.0) != 1:
        raise ExportError("a Gemm with factors or a transposed input can't be written for Core ML")
    x, bias = at.layer(given[0]), at.constant(given[2]) if len(given) > 2 else None
    if facts.get("transB"):
        return mb.linear(x=x, weight=at.layer(given[1]), **({} if bias is None else {"bias": bias}))
    product = mb.matmul(x=x, y=at.layer(given[1]))
    return product if bias is None else mb.add(x=product, y=bias)


def _matmul(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.matmul(x=at.layer(given[0]), y=at.layer(given[1]))


def _attention(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """onnxruntime's MultiHeadAttention of (rows, length, heads * size) tensors, without masks and caches."""
    if len(given) != 3:
        raise ExportError("attention with a mask, a bias or a cache can't be written for Core ML")
    heads = facts["num_heads"]
    size = given[0].shape[2] // heads
    q, k, v = (
        mb.transpose(x=mb.reshape(x=at.layer(x), shape=[*x.shape[:2], heads, size]), perm=[0, 2, 1, 3]) for x in given
    )
    scale = facts.get("scale") or size**-0.5
    scaled = q if scale == 1 else mb.mul(x=q, y=at.constant(np.array(scale)))
    weights = mb.softmax(x=mb.matmul(x=scaled, y=k, transpose_y=True), axis=-1)
    mixed = mb.transpose(x=mb.matmul(x=weights, y=v), perm=[0, 2, 1, 3])
    return mb.reshape(x=mixed, shape=list(given[0].shape))


def _softmax(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.softmax(x=at.layer(given[0]), axis=facts.get("axis", -1))


def _layer_norm(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    axes = list(range(facts.get("axis", -1) % given[0].rank, given[0].rank))
    return mb.layer_norm(x=at.layer(given[0]), axes=axes, **_scaled(at, given, facts))


def _instance_norm(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.instance_norm(x=at.layer(given[0]), **_scaled(at, given, facts))


def _scaled(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    dtype = np.float16 if at.kind == "fp16" else np.float32
    gamma, beta = (at.constant(value) for value in given[1:3])
    return {"gamma": gamma, "beta": beta, "epsilon": dtype(facts.get("epsilon", 1e-5))}


def _reshape(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, wanted = given[0], [int(size) for size in given[1]]
    shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    if -1 in shape:
        shape[shape.index(-1)] = int(np.prod(x.shape)) // -int(np.prod(shape))
    return mb.reshape(x=x, shape=shape)


def _transpose(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.transpose(x=given[0], perm=list(facts["perm"]))


def _unsqueeze(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.expand_dims(x=given[0], axes=[int(axis) for axis in given[1]])


def _squeeze(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.squeeze(x=given[0], axes=[int(axis) for axis in given[1]])


def _concat(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.concat(values=at.alike(given), axis=facts["axis"])


def _slice(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, starts, ends = given[:3]
    axes = given[3] if len(given) > 3 else range(len(starts))
    steps = given[4] if len(given) > 4 else [1] * len(starts)
    begin, end, stride = [0] * x.rank, list(x.shape), [1] * x.rank
    for start, stop, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise ExportError("a slice that runs backwards can't be written for Core ML")
        begin[axis], end[axis], stride[axis] = *slice(int(start), int(stop)).indices(x.shape[axis])[:2], int(step)
    return mb.slice_by_index(x=x, begin=begin, end=end, stride=stride)


def _gather(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, indices = given
    chosen = constant(indices, "int32") if isinstance(indices, np.ndarray) else indices
    table = at.layer(x) if isinstance(x, np.ndarray | Weight) else x
    return mb.gather(x=table, indices=chosen, axis=facts.get("axis", 0))


def _gather_elements(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.gather_along_axis(x=given[0], indices=given[1], axis=facts.get("axis", 0))


def _argmax(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    return mb.reduce_argmax(x=given[0], axis=facts.get("axis", 0), keep_dims=bool(facts.get("keepdims", 1)))


def _reduce_l2(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """Opset 17 has its axes among the attributes."""
    return mb.reduce_l2_norm(x=given[0], axes=list(facts["axes"]), keep_dims=bool(facts.get("keepdims", 1)))


def _clip(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x = given[0]
    for bound, limit in zip(given[1:], (mb.maximum, mb.minimum), strict=False):
        if bound is not None:
            x = limit(x=x, y=constant(bound, kind_of(x)))
    return x


def _cast(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """Floating numbers stay in the type they have: that is this program's choice and not the source's."""
    kind = KINDS.get(facts["to"])
    if kind is None:
        return given[0] if kind_of(given[0]).startswith("fp") else mb.cast(x=given[0], dtype="fp32")
    return given[0] if kind_of(given[0]) == kind else mb.cast(x=given[0], dtype=kind)


def _equal(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, y = at.alike(given)
    return mb.equal(x=x, y=y)


def _expand(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, shape = given[0], [int(size) for size in given[1]]
    new = len(shape) - x.rank
    x = mb.expand_dims(x=x, axes=list(range(new))) if new > 0 else x
    shape = [1] * (x.rank - len(shape)) + shape
    repeats = [size if own == 1 else 1 for own, size in zip(x.shape, shape, strict=True)]
    return x if set(repeats) == {1} else mb.tile(x=x, reps=repeats)


def _pad(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x, pads = at.layer(given[0]), [int(size) for size in given[1]]
    if facts.get("mode", b"constant") != b"constant" or (len(given) > 2 and given[2] is not None and given[2] != 0):
        raise ExportError("padding with anything but zeros can't be written for Core ML")
    zero = np.float16(0) if at.kind == "fp16" else np.float32(0)
    return mb.pad(x=x, pad=[pads[axis + side * x.rank] for axis in range(x.rank) for side in (0, 1)], constant_val=zero)


def _resize(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    x = given[0]
    wanted = given[3] if len(given) > 3 else np.array(x.shape) * given[2]
    factors = [int(size) // own for size, own in zip(wanted, x.shape, strict=True)]
    whole = all(factor * own == size for factor, own, size in zip(factors, x.shape, wanted, strict=True))
    modes = [facts.get(key) for key in ("mode", "coordinate_transformation_mode", "nearest_mode")]
    if modes != [b"nearest", b"asymmetric", b"floor"] or not whole or factors[:2] != [1, 1]:
        raise ExportError("resizing by anything but repeated pixels can't be written for Core ML")
    return mb.upsample_nearest_neighbor(x=x, scale_factor_height=factors[2], scale_factor_width=factors[3])


Operator = Callable[[Values, Sequence[Any], Mapping[str, Any]], Any]

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
