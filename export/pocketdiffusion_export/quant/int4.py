"""Weights of MatMul and Gemm as int4 with one float16 scale per output channel and group of inputs; the rest as int8.

Symmetric, codes in [-7, 7], in ONNX's own blocked form: an int4 initializer and DequantizeLinear with `block_size`
along the input axis, which opset 21 (IR version 10) brought. onnxruntime from 1.20 and OpenVINO open it; onnxruntime's
own MatMulNBits operator does not open on OpenVINO. Weights whose input axis is no multiple of a group, or whose
error as int4 is too large, are stored as int8 per channel, as Conv and embeddings always are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pocketdiffusion.tensors import Array
from pocketdiffusion_export.component import Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.quant import Recipe
from pocketdiffusion_export.quant.report import QuantReport
from pocketdiffusion_export.quant.weight_only import best_scale, int8_form
from pocketdiffusion_export.quant.weights import Form, replace_weights, sqnr_db, weight_axes

LEVELS = 7
OPSET, IR_VERSION = 21, 10


def quantize(model: onnx.ModelProto, recipe: Recipe, samples: Sequence[Feeds] = ()) -> QuantReport:
    """Replace weights in place and raise the model's opset. Raises ExportError when its nodes don't exist in that."""
    report = QuantReport()
    axes = weight_axes(model.graph)
    linear = {name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input}

    def form(tensor: onnx.TensorProto) -> Form | None:
        if tensor.name not in axes:
            return None
        blocks = _int4_form(tensor, 1 - axes[tensor.name], recipe, report) if tensor.name in linear else None
        return blocks or int8_form(tensor, axes[tensor.name], recipe, report)

    replace_weights(model.graph, form)
    raise_opset(model)
    return report


def raise_opset(model: onnx.ModelProto) -> None:
    """To the one that int4 needs, in place. Raises ExportError when the model's nodes don't exist in it."""
    model.opset_import[0].version, model.ir_version = OPSET, IR_VERSION
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the graph can't be raised to opset {OPSET}, which int4 needs: {error}") from None


def quantize_blocks(weight: Array, axis: int, group: int) -> tuple[NDArray[np.int8], Array]:
    """(codes, float32 scales that float16 holds exactly, with one entry for each `group` indices of `axis`)."""
    rows = np.moveaxis(weight, axis, -1)
    blocks = rows.reshape(-1, group)
    limits = np.finfo(np.float16)
    halves = np.clip(best_scale(blocks, LEVELS), limits.smallest_subnormal, limits.max).astype(np.float16)
    scale: Array = halves.astype(np.float32)
    codes = np.clip(np.rint(blocks / scale[:, None]), -LEVELS, LEVELS).astype(np.int8)
    scales = scale.reshape(*rows.shape[:-1], -1)
    return np.moveaxis(codes.reshape(rows.shape), -1, axis), np.moveaxis(scales, -1, axis)


def blocks_form(name: str, codes: NDArray[np.int8], scale: Array, axis: int) -> Form:
    """A weight stored as what `quantize_blocks` gave; engines compute the Cast of the scales once, at load."""
    names = [f"{name}_int4", f"{name}_scale"]
    packed = onnx.helper.make_tensor(names[0], onnx.TensorProto.INT4, codes.shape, _pack(codes), raw=True)
    halves = numpy_helper.from_array(np.asarray(scale, np.float16, order="C"), f"{name}_scale_half")
    cast = onnx.helper.make_node("Cast", [halves.name], [names[1]], to=onnx.TensorProto.FLOAT)
    group = codes.shape[axis] // scale.shape[axis]
    node = onnx.helper.make_node("DequantizeLinear", names, [name], axis=axis, block_size=group)
    return [packed, halves], [cast, node]


def _int4_form(tensor: onnx.TensorProto, axis: int, recipe: Recipe, report: QuantReport) -> Form | None:
    weight = numpy_helper.to_array(tensor)
    if weight.size < recipe.min_elements or weight.shape[axis] % recipe.group:
        return None
    codes, scale = quantize_blocks(weight, axis, recipe.group)
    sqnr = sqnr_db(weight, codes * scale.repeat(recipe.group, axis))
    if sqnr < recipe.min_int4_sqnr_db:
        return None
    report.quantized[tensor.name] = sqnr
    return blocks_form(tensor.name, codes, scale, axis)


def _pack(codes: NDArray[np.int8]) -> bytes:
    """Two codes a byte, the first in the lower half; an odd last one has an empty partner."""
    flat = codes.ravel()
    pairs = np.append(flat, np.zeros(flat.size % 2, np.int8)).reshape(-1, 2).astype(np.uint8) & 15
    return (pairs[:, 0] | pairs[:, 1] << 4).tobytes()
