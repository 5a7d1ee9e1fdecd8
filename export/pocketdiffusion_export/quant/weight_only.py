"""Weights as int8 with one float32 scale per output channel; activations stay float32.

Symmetric round-to-nearest: w ≈ q * scale, q in [-127, 127], stored as an int8 initializer and DequantizeLinear. The
scale of each channel is the one of a small grid of clip ratios with the least squared error, which for the bell-shaped
weights of a trained layer lies below max |w| / 127. It saves memory, not time. Tensors that are small, or whose error
is measured to be too large, stay float32; `QuantReport` says which and why.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pocketdiffusion.tensors import Array
from pocketdiffusion_export.component import Feeds
from pocketdiffusion_export.quant import Recipe
from pocketdiffusion_export.quant.report import QuantReport
from pocketdiffusion_export.quant.weights import Form, along, replace_weights, sqnr_db, weight_axes

LEVELS = 127
CLIP_RATIOS = np.linspace(1.0, 0.5, 26, dtype=np.float32)
"""Coarse on purpose: a grid in steps of 0.5 % lowered the weights' error by 0.2 dB and raised the outputs'."""
CACHED = 1 << 16
"""Values that are searched at a time: with what is computed of them they fit a core's own cache."""


def quantize(model: onnx.ModelProto, recipe: Recipe, samples: Sequence[Feeds] = ()) -> QuantReport:
    """Replace the weights of Conv, Gemm, MatMul and Gather in place. `samples` are not needed to look at weights."""
    report = QuantReport()
    axes = weight_axes(model.graph)

    def form(tensor: onnx.TensorProto) -> Form | None:
        return int8_form(tensor, axes[tensor.name], recipe, report) if tensor.name in axes else None

    replace_weights(model.graph, form)
    return report


def int8_form(tensor: onnx.TensorProto, axis: int, recipe: Recipe, report: QuantReport) -> Form | None:
    """One weight in this form, or None with the reason in the report."""
    pair = checked_pair(tensor, axis, recipe, report)
    return None if pair is None else channels_form(tensor.name, *pair, axis)


def channels_form(name: str, codes: NDArray[np.int8], scale: Array, axis: int) -> Form:
    """A weight stored as what `quantize_array` gave."""
    names = [f"{name}_int8", f"{name}_scale"]
    node = onnx.helper.make_node("DequantizeLinear", names, [name], axis=axis)
    return [numpy_helper.from_array(array, name) for array, name in zip((codes, scale), names, strict=True)], [node]


def checked_pair(
    tensor: onnx.TensorProto, axis: int, recipe: Recipe, report: QuantReport
) -> tuple[NDArray[np.int8], Array] | None:
    """Codes and scales of one weight, or None with the reason in the report."""
    weight = numpy_helper.to_array(tensor)
    if weight.size < recipe.min_elements:
        report.kept_float[tensor.name] = f"{weight.size} elements, fewer than {recipe.min_elements}"
        return None
    codes, scale = quantize_array(weight, axis)
    sqnr = sqnr_db(weight, codes * along(scale, axis, weight.ndim))
    if sqnr < recipe.min_weight_sqnr_db:
        report.kept_float[tensor.name] = f"{sqnr} dB, less than {recipe.min_weight_sqnr_db}"
        return None
    report.quantized[tensor.name] = sqnr
    return codes, scale


def quantize_array(weight: Array, axis: int) -> tuple[NDArray[np.int8], Array]:
    """(int8 array of the same shape, float32 scale per index of `axis`) with the least squared error of the grid."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    scale = best_scale(rows, LEVELS)
    codes = np.clip(np.rint(weight / along(scale, axis, weight.ndim)), -LEVELS, LEVELS).astype(np.int8)
    return codes, scale


def best_scale(rows: Array, levels: int) -> Array:
    """The float32 scale of each row for codes in [-levels, levels] with the least squared error of the grid."""
    scale, step = np.empty(len(rows), np.float32), max(1, CACHED // rows.shape[1])
    for start in range(0, len(rows), step):
        scale[start : start + step] = _best_scale(rows[start : start + step], levels)
    return scale


def _best_scale(rows: Array, levels: int) -> Array:
    peak = np.abs(rows).max(1)
    peak[peak == 0] = 1.0
    best, error = peak / levels, np.full(len(rows), np.inf, np.float32)
    for ratio in CLIP_RATIOS:
        scale = peak * ratio / levels
        back = np.clip(np.rint(rows / scale[:, None]), -levels, levels) * scale[:, None]
        found = np.square(rows - back).sum(1)
        best, error = np.where(found < error, scale, best), np.minimum(found, error)
    return np.asarray(best, np.float32)
