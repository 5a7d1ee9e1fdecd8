"""Weights int8 per output channel, activations uint8 per tensor with ranges measured on samples.

One file is meant to be fast on both engines; `layers.py` says what is quantized and why. Which layers keep float
activations is decided by measured error: all are tried first, and if a component then misses the recipe's target, the
layers that disturb its outputs most, each measured alone, go back, as few as needed. In a large component, where a run
takes seconds, they are measured on a part of the picture, and only in the groups of neighbours that disturb most. What
is not quantized is stored as float16, which engines convert once at load, whereas an int8 weight would be converted in
every run.

Limits: integer products of uint8 and int8 saturate on x86 processors without VNNI, which costs accuracy there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion_export.component import Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.quant import Recipe
from pocketdiffusion_export.quant.calibrate import measure_ranges, part_of, runner
from pocketdiffusion_export.quant.layers import Layer, Pair, add_switches, find_layers, float_copy, make_integer
from pocketdiffusion_export.quant.report import QuantReport
from pocketdiffusion_export.quant.weight_only import checked_pair
from pocketdiffusion_export.quant.weights import Form, half, replace_weights, weight_axes, why_float

Group = NDArray[np.intp]
"""Places in the list of layers."""

MAX_CALIBRATION, MAX_TRIALS = 32, 3
"""Samples to measure ranges with, and to decide with which layers go back."""
SWITCHES, STORE = "quantize_layer", "codes"
LARGE, GROUPS = 100_000_000, 32
"""From this many quantized weights on, so many groups of neighbours are tried first, each on one sample."""


def quantize(model: onnx.ModelProto, recipe: Recipe, samples: Sequence[Feeds]) -> QuantReport:
    """Quantize a component in place. Raises ExportError without samples."""
    if not samples:
        raise ExportError(f"recipe {recipe.name} measures activations and got no samples; give at least one prompt")
    report = QuantReport()
    layers = find_layers(model.graph, weight_axes(model.graph))
    codes = _codes(model.graph, layers, recipe, report)
    layers = [layer for layer in layers if layer.weight in codes]
    if layers:
        _quantize_layers(model, layers, codes, recipe, samples, report)
    _halve_rest(model.graph, recipe)
    return report


def _quantize_layers(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    codes: dict[str, Pair],
    recipe: Recipe,
    samples: Sequence[Feeds],
    report: QuantReport,
) -> None:
    """Measure, choose and rewrite. Samples are shuffled, as a stride over trajectories would meet the same steps."""
    shuffled = [samples[index] for index in np.random.default_rng(0).permutation(len(samples))]
    names = list(dict.fromkeys(name for layer in layers for name in layer.observed))
    size = sum(codes[layer.weight][0].size for layer in layers)
    trials = [part_of(model.graph, feeds, size) for feeds in shuffled[:MAX_TRIALS]]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copy = float_copy(model, layers, codes, folder / STORE)
        ranges = measure_ranges(copy, names, shuffled[:MAX_CALIBRATION], folder)
        copy = float_copy(model, layers, codes, folder / STORE)
        add_switches(copy.graph, layers, ranges, SWITCHES)
        run = runner(copy, [value.name for value in model.graph.output], folder)
        large = size > LARGE
        whole = _disturbance(run, len(layers), trials)
        each = _disturbance(run, len(layers), trials[:1]) if large else whole
        groups = np.array_split(np.arange(len(layers)), min(GROUPS, len(layers)) if large else len(layers))
        active = _choose(layers, groups, recipe, whole, each, report)
    make_integer(model.graph, active, ranges, codes)
    weights = {layer.weight for layer in active}
    report.quantized = {name: sqnr for name, sqnr in report.quantized.items() if name in weights}
    report.ranges = {name: (ranges[name].low, ranges[name].high) for layer in active for name in layer.observed}


def _codes(graph: onnx.GraphProto, layers: Sequence[Layer], recipe: Recipe, report: QuantReport) -> dict[str, Pair]:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    axes = {layer.weight: layer.axis for layer in layers}
    pairs = {name: checked_pair(tensors[name], axis, recipe, report) for name, axis in axes.items()}
    return {name: pair for name, pair in pairs.items() if pair is not None}


def _choose(
    layers: Sequence[Layer],
    groups: Sequence[Group],
    recipe: Recipe,
    whole: Callable[[Array], float],
    each: Callable[[Array], float],
    report: QuantReport,
) -> list[Layer]:
    """Layers to quantize. Others are in the report with the SQNR that each alone leaves.

    `whole` and `each` give the SQNR that switches leave: the first decides, the second puts groups in order.
    """
    count, target = len(layers), recipe.target_sqnr_db
    report.notes["sqnr_db_all_quantized"] = round(whole(_without(count, [])), 1)
    if report.notes["sqnr_db_all_quantized"] >= target:
        return list(layers)
    kept = _fewest(groups, count, target, whole, each)
    if max(map(len, groups)) > 1:  # of the groups that must go back, few layers need to
        kept = _fewest([np.array([layer]) for group, _ in kept for layer in group], count, target, whole, each)
    quantized = _without(count, [group for group, _ in kept])
    report.notes["sqnr_db_as_chosen"] = round(whole(quantized), 1)
    for group, alone in kept:
        for index in group:
            report.kept_float[layers[index].weight] = f"{alone:.1f} dB if only it had uint8 activations"
    return [layer for layer, on in zip(layers, quantized, strict=True) if on]


def _fewest(
    groups: Sequence[Group],
    count: int,
    target: float,
    whole: Callable[[Array], float],
    each: Callable[[Array], float],
) -> list[tuple[Group, float]]:
    """The fewest groups, the worst first, without which the others reach the target; each with its own SQNR in dB."""
    alone = [each(1 - _without(count, [group])) for group in groups]
    worst_first = np.argsort(alone)
    few, many = 0, len(groups)
    while many - few > 1:
        middle = (few + many) // 2
        enough = whole(_without(count, [groups[index] for index in worst_first[:middle]])) >= target
        few, many = (few, middle) if enough else (middle, many)
    return [(groups[index], alone[index]) for index in worst_first[:many]]


def _without(count: int, groups: Sequence[Group]) -> Array:
    """Switches that are on for all layers but those of these groups."""
    switches = np.ones(count, np.float32)
    for group in groups:
        switches[group] = 0
    return switches


def _disturbance(run: Any, count: int, trials: Sequence[Feeds]) -> Callable[[Array], float]:
    """A function from switches to the SQNR in dB that they leave of the worst output."""

    def outputs(vector: Array) -> list[list[Array]]:
        return [run({**feeds, SWITCHES: vector}) for feeds in trials]

    expected = outputs(np.zeros(count, np.float32))
    signal = _energy(expected)

    def sqnr(vector: Array) -> float:
        found = outputs(vector)
        errors = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(expected, found, strict=True)]
        return float(np.min(10 * np.log10(signal / np.maximum(_energy(errors), 1e-20 * signal))))

    return sqnr


def _energy(runs: Sequence[Sequence[Array]]) -> AnyArray:
    """Sum of squares of each output over all runs."""
    total: AnyArray = np.sum([[np.square(output, dtype=np.float64).sum() for output in run] for run in runs], axis=0)
    return total


def _halve_rest(graph: onnx.GraphProto, recipe: Recipe) -> None:
    def form(tensor: onnx.TensorProto) -> Form | None:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            return None
        weight = numpy_helper.to_array(tensor)
        scales = tensor.name.endswith("_scale")
        return None if scales or why_float(weight, recipe.min_elements) else half(tensor)

    replace_weights(graph, form)
