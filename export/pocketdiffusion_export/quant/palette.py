"""Weights as indices of a palette: 2**bits values a weight, found by k-means, one palette a tensor. Core ML only.

In the ONNX graph a palette is a Gather of the values by uint8 indices, which the Core ML target turns into
`constexpr_lut_to_dense` with packed indices. Weights that come back too badly get the next larger palette, so that one
export holds palettes of several sizes; embeddings, which are read row by row, stay float16, as do small tensors.
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
from pocketdiffusion_export.quant.weights import Form, half, replace_weights, sqnr_db, weight_axes, why_float

BITS = (1, 2, 4, 6, 8)
"""Sizes that Core ML has."""
ROUNDS = 300
BINS = 256
CLOSE = 1e-5
"""Means that move by less, relative to the largest weight, have settled."""


def quantize(model: onnx.ModelProto, recipe: Recipe, samples: Sequence[Feeds] = ()) -> QuantReport:
    """Replace the weights of Conv, Gemm and MatMul in place. `samples` are not needed to look at weights."""
    report = QuantReport()
    tables = embeddings(model.graph)
    axes = weight_axes(model.graph)

    def form(tensor: onnx.TensorProto) -> Form | None:
        if tensor.name not in axes:
            return None
        weight = numpy_helper.to_array(tensor)
        if reason := why_float(weight, recipe.min_elements):
            report.kept_float[tensor.name] = reason
            return None
        if tensor.name in tables:
            report.kept_float[tensor.name] = "an embedding, stored as float16"
            return half(tensor)
        return _form(tensor.name, weight, recipe, report)

    replace_weights(model.graph, form)
    return report


def embeddings(graph: onnx.GraphProto) -> set[str]:
    """Weights that are read row by row."""
    return {node.input[0] for node in graph.node if node.op_type == "Gather"}


def find_palette(weight: Array, bits: int) -> tuple[Array, NDArray[np.uint8]]:
    """(2**bits rising float32 values that float16 holds, uint8 indices in the weight's shape), by k-means.

    It starts with values as dense as the cube root of the weights' density, which is best for many values (Panter and
    Dite, 1951), and alternates as Lloyd's algorithm does, on sorted weights, whose running sums make each mean one
    difference. Nothing is random.
    """
    if bits not in BITS:
        raise ExportError(f"palettes of {bits} bits can't be made; Core ML has {', '.join(map(str, BITS))}")
    values = np.sort(weight, axis=None).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    palette = _start(values, 1 << bits)
    close = CLOSE * max(float(np.abs(values[[0, -1]]).max()), 1e-30)
    for _ in range(ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(values, (palette[1:] + palette[:-1]) / 2), [values.size]])
        sizes = np.diff(edges)
        found = np.where(sizes > 0, np.diff(sums[edges]) / np.maximum(sizes, 1), palette)
        moved, palette = float(np.abs(found - palette).max()), found
        if moved < close:
            break
    stored = palette.astype(np.float16).astype(np.float32)
    return stored, indices_of(weight, stored)


def indices_of(weight: Array, palette: Array) -> NDArray[np.uint8]:
    """For each value the index of the nearest in a rising palette, in the weight's shape."""
    return np.searchsorted((palette[1:] + palette[:-1]) / 2, weight).astype(np.uint8)


def _start(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Rising values in equal shares of the cube root of the density."""
    density, edges = np.histogram(values, max(BINS, 4 * count))
    shares = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    places: NDArray[np.float64] = np.interp((np.arange(count) + 0.5) / count * shares[-1], shares, edges)
    return places


def _form(name: str, weight: Array, recipe: Recipe, report: QuantReport) -> Form:
    """The smallest palette of the recipe's or more bits that is good enough; the largest in any case."""
    for bits in BITS[BITS.index(recipe.palette) :]:
        palette, indices = find_palette(weight, bits)
        sqnr = sqnr_db(weight, palette[indices])
        if sqnr >= recipe.min_weight_sqnr_db:
            break
    report.quantized[name] = sqnr
    report.bits[name] = bits
    return palette_form(name, palette, indices)


def palette_form(name: str, palette: Array, indices: NDArray[np.uint8]) -> Form:
    """The initializers and nodes of a weight with a palette."""
    names = [f"{name}_palette", f"{name}_indices"]
    tensors = [numpy_helper.from_array(array, key) for array, key in zip((palette, indices), names, strict=True)]
    wide = f"{name}_wide"
    return tensors, [
        onnx.helper.make_node("Cast", [names[1]], [wide], to=onnx.TensorProto.INT32),
        onnx.helper.make_node("Gather", [names[0], wide], [name]),
    ]
