"""Bits per weight by measured sensitivity: each weight of Conv, Gemm, MatMul and Gather as float16, int8 or int4.

A recipe with palettes has float16 and palettes of several sizes instead, and embeddings stay float16.

The noise that one layer's error brings to a component's outputs differs by a factor of a million between the layers of
a UNet and has little to do with the error of the weight itself, so it is measured: every weight (in a large component
every group of neighbours) alone in its smallest form. Noises of layers add up, and that of a layer's other forms is in
proportion to the weight's own error. That makes the choice a knapsack, of bytes or of noise. Then the whole choice is
measured on other samples, and the noise allowed to the prediction corrected until the measurement meets the target.

Tried and left out, as they brought nothing on the embedded UNet: errors of weights counted by the energy of the
activations that they meet, for ranking layers and for choosing scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

import numpy as np
import onnx
from onnx import numpy_helper

from pocketdiffusion_export.component import Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.quant import Recipe
from pocketdiffusion_export.quant.bits import FLOAT_BITS, Option, options, palettes, restored, stored
from pocketdiffusion_export.quant.calibrate import is_costly, part_of
from pocketdiffusion_export.quant.int4 import raise_opset
from pocketdiffusion_export.quant.knapsack import choose
from pocketdiffusion_export.quant.palette import embeddings
from pocketdiffusion_export.quant.report import QuantReport
from pocketdiffusion_export.quant.sensitivity import Trial, relative_noise
from pocketdiffusion_export.quant.weights import MAX_SQNR_DB, Form, replace_weights, sqnr_db, weight_axes, why_float

SMALL = (3, 16)
"""Samples to measure single weights on, and others to measure the whole choice on."""
GROUPS, FEW = 32, (1, 2)
"""Where a run takes seconds, weights are measured in so many groups and on fewer samples: at most 45 runs in all, of
which those of the groups are on a part of the picture if the graph takes any size."""
CORRECTIONS = 5
"""Choices that are measured as a whole on the way to a target."""
CLOSE = 10 ** (-0.25 / 10)
"""A noise of this part of the target or more is near enough: a quarter of a decibel."""
LITTLE = 1_000_000
"""A component of fewer weights, such as a tiny decoder, takes its smallest forms where they exceed an average."""
TINY = 1e-30
"""Stands for a noise of zero in a divisor."""

Forms = Mapping[str, Sequence[Option]]
"""Weight -> its forms, the largest first."""
Choice = Mapping[str, Option]


def quantize(model: onnx.ModelProto, recipe: Recipe, samples: Sequence[Feeds]) -> QuantReport:
    """Quantize a component in place: with `recipe.bits` to that average of bits, else to `recipe.target_sqnr_db`.

    Raises ExportError without samples, for an average that can't be had, and when the graph can't be raised to the
    opset of int4.
    """
    if not samples:
        raise ExportError(f"recipe {recipe.name} measures layers and got no samples; give at least one prompt")
    report = QuantReport()
    axes = _candidates(model.graph, recipe, report)
    if axes:
        chosen = _decide(model, axes, recipe, samples, report)

        def form(tensor: onnx.TensorProto) -> Form | None:
            return stored(tensor, axes[tensor.name], chosen[tensor.name]) if tensor.name in axes else None

        replace_weights(model.graph, form)
        if any(option.bits == 4 and option.scale is not None for option in chosen.values()):
            raise_opset(model)
    return report


def _candidates(graph: onnx.GraphProto, recipe: Recipe, report: QuantReport) -> dict[str, int]:
    """Weights to decide on, with the axis of their output channels; the others are in the report."""
    axes = weight_axes(graph)
    for tensor in graph.initializer:
        reason = why_float(numpy_helper.to_array(tensor), recipe.min_elements) if tensor.name in axes else None
        if reason:
            report.kept_float[tensor.name] = reason
    return {name: axis for name, axis in axes.items() if name not in report.kept_float}


def _decide(
    model: onnx.ModelProto, axes: Mapping[str, int], recipe: Recipe, samples: Sequence[Feeds], report: QuantReport
) -> Choice:
    """Samples are shuffled, as neighbours come from one trajectory."""
    trial = Trial(model, axes)
    forms = _forms(trial, axes, recipe, embeddings(model.graph))
    weights = 8 * sum(of_one[0].size for of_one in forms.values()) // FLOAT_BITS
    shuffled = [samples[index] for index in np.random.default_rng(0).permutation(len(samples))]
    large = is_costly(shuffled[0], weights)
    few, more = FEW if large else SMALL
    tried = [part_of(model.graph, feeds, weights) for feeds in shuffled[:few]]
    alone, whole = _measurer(trial, axes, tried), _measurer(trial, axes, shuffled[few : few + more] or shuffled)
    forms = _measured(forms, min(GROUPS, len(axes)) if large else len(axes), alone, report)
    if recipe.bits:
        chosen = _of_size(forms, recipe, weights)
        noise = whole(chosen)
    else:
        chosen, noise = _of_error(forms, recipe.target_sqnr_db, whole)
    for name, option in chosen.items():
        report.bits[name] = option.bits
        if option.bits < FLOAT_BITS:
            weight = trial.weight(name)
            report.quantized[name] = sqnr_db(weight, restored(weight, axes[name], option))
    report.notes["bits_per_weight"] = round(8 * _size(chosen) / weights, 3)
    report.notes["sqnr_db_predicted"] = _db(_noise(chosen))
    report.notes["sqnr_db_measured"] = _db(noise)
    return chosen


def _forms(trial: Trial, axes: Mapping[str, int], recipe: Recipe, tables: Set[str]) -> Forms:
    if not recipe.palette:
        return {name: options(trial.weight(name), axis, recipe.group) for name, axis in axes.items()}
    return {name: palettes(trial.weight(name), FLOAT_BITS if name in tables else recipe.palette) for name in axes}


def _measurer(trial: Trial, axes: Mapping[str, int], samples: Sequence[Feeds]) -> Callable[[Choice], float]:
    """A function from a choice to the noise of the outputs on these samples; it leaves the weights as they were."""
    expected = trial.outputs(samples)

    def measure(choice: Choice) -> float:
        for name, option in choice.items():
            trial.put(name, restored(trial.weight(name), axes[name], option))
        found = trial.outputs(samples)
        for name in choice:
            trial.put(name, trial.weight(name))
        return relative_noise(expected, found)

    return measure


def _measured(forms: Forms, groups: int, measure: Callable[[Choice], float], report: QuantReport) -> Forms:
    """The forms with the noise that they bring to the outputs, by what the smallest ones of their group bring."""
    found: dict[str, Sequence[Option]] = {}
    names = list(forms)
    for group in np.array_split(np.arange(len(names)), groups):
        smallest = {names[index]: forms[names[index]][-1] for index in group}
        noise = measure(smallest)
        gain = noise / max(_noise(smallest), TINY)
        for name in smallest:
            found[name] = [replace(option, noise=gain * option.noise) for option in forms[name]]
            report.sensitivity[name] = _db(noise)
    return found


def _of_size(forms: Forms, recipe: Recipe, weights: int) -> Choice:
    """The choice with the least predicted noise among those of the recipe's average of bits."""
    chosen = choose(_each(forms, _bytes), _each(forms, _error), recipe.bits * weights / 8)
    if chosen is None and weights < LITTLE:
        return {name: of_one[-1] for name, of_one in forms.items()}
    if chosen is None:
        least = 8 * sum(of_one[-1].size for of_one in forms.values()) / weights
        raise ExportError(
            f"recipe {recipe.name} asks for {recipe.bits:g} bits a weight, the smallest forms of these weights take "
            f"{least:.2f}; choose a recipe with more bits, or mixed"
        )
    return _pick(forms, chosen)


def _of_error(forms: Forms, target_db: float, measure: Callable[[Choice], float]) -> tuple[Choice, float]:
    """The smallest choice tried whose measured noise is within the target, and that noise; float16 is within any."""
    target = 10 ** (-target_db / 10)
    best, least = {name: of_one[0] for name, of_one in forms.items()}, 0.0
    allowed, low, high = target, 0.0, math.inf
    for _ in range(CORRECTIONS):
        chosen = choose(_each(forms, _error), _each(forms, _bytes), allowed)
        assert chosen is not None, "float16 counts as free of noise"
        choice = _pick(forms, chosen)
        noise = measure(choice)
        if noise <= target and _size(choice) < _size(best):
            best, least = choice, noise
        if target * CLOSE <= noise <= target:
            break
        low, high = (max(low, allowed), high) if noise <= target else (low, min(high, allowed))
        allowed *= target * math.sqrt(CLOSE) / max(noise, TINY)
        if not low < allowed < high:
            allowed = math.sqrt(low * high)
    return best, least


def _each(forms: Forms, figure: Callable[[Option], float]) -> list[list[float]]:
    return [[figure(form) for form in of_one] for of_one in forms.values()]


def _pick(forms: Forms, chosen: Sequence[int]) -> dict[str, Option]:
    return {name: of_one[index] for (name, of_one), index in zip(forms.items(), chosen, strict=True)}


def _bytes(option: Option) -> float:
    return option.size


def _error(option: Option) -> float:
    return option.noise


def _size(choice: Choice) -> float:
    return sum(map(_bytes, choice.values()))


def _noise(choice: Choice) -> float:
    return sum(map(_error, choice.values()))


def _db(noise: float) -> float:
    return round(-10 * math.log10(noise), 1) if noise > 0 else MAX_SQNR_DB
