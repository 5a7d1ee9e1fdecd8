"""Weights as float16, activations and arithmetic in float32.

A Cast follows each stored weight, which engines compute once at load. Graphs that compute in float16 are slow or
refused on CPUs. Tensors that are small, or hold values beyond float16's largest, stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from pocketdiffusion_export.component import Feeds
from pocketdiffusion_export.quant import Recipe
from pocketdiffusion_export.quant.report import QuantReport
from pocketdiffusion_export.quant.weights import Form, half, replace_weights, sqnr_db, why_float


def quantize(model: onnx.ModelProto, recipe: Recipe, samples: Sequence[Feeds] = ()) -> QuantReport:
    """Store float initializers as float16, in place. `samples` are not needed."""
    report = QuantReport()

    def form(tensor: onnx.TensorProto) -> Form | None:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            return None
        weight = numpy_helper.to_array(tensor)
        if reason := why_float(weight, recipe.min_elements):
            report.kept_float[tensor.name] = reason
            return None
        report.quantized[tensor.name] = sqnr_db(weight, weight.astype(np.float16))
        return half(tensor)

    replace_weights(model.graph, form)
    return report
