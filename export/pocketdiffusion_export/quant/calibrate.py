"""Ranges of activations, measured by running the float graph on samples.

Each observed tensor is reduced inside the graph, to its least and largest value and every 61st element, so that memory
does not grow with the number of tensors. The range that is chosen is the one with the least squared error after
quantization to uint8 on those elements, of a grid that shrinks either end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from pocketdiffusion.tensors import Array
from pocketdiffusion_export.component import Feeds

STRIDE = 61
"""A prime: no shape of a network is a multiple of it, so all channels are seen."""
KEPT = 2048
"""Elements of one tensor that are kept of one run."""
RATIOS = np.linspace(1.0, 0.4, 16)
TOP = 255
MAX_TRIAL_WORK, PART, MULTIPLE = 1e11, 4, 8
"""Weights times cells of the largest input. Above it a call takes seconds, and many are made on less of a picture."""


@dataclass(frozen=True, slots=True)
class Range:
    """What the codes 0 to 255 of a tensor stand for."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """Of one code; zero is always a code, so that padding is exact."""
        return max(self.high - self.low, 1e-8) / TOP

    @property
    def zero_point(self) -> int:
        """The code of zero."""
        return round(-self.low / self.scale)


def runner(model: onnx.ModelProto, outputs: Sequence[str], folder: Path) -> Any:
    """A function from feeds to the named tensors, computed in float; the graph goes through a file in `folder`.

    Weights stay int8 in memory and are read back in every run, one layer at a time: a large UNet fits that way.
    """
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # In the nodes' own order, which frees tensors early: fused nodes would stand behind all weights that are read back.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of all weights
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    return lambda feeds: session.run(list(outputs), dict(feeds))


def is_costly(feeds: Feeds, weights: int) -> bool:
    """Whether a call of a component with so many weights takes seconds."""
    return weights * max(math.prod(array.shape[2:]) for array in feeds.values()) > MAX_TRIAL_WORK


def part_of(graph: onnx.GraphProto, feeds: Feeds, weights: int) -> Feeds:
    """Of a costly call, the last image and the middle of it, as far as the graph's axes are free."""
    if not is_costly(feeds, weights):
        return feeds
    part = {}
    for value in graph.input:
        array = feeds[value.name]
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and (axis == 0 or array.ndim == 4):
                kept = 1 if axis == 0 else max(MULTIPLE, array.shape[axis] // PART // MULTIPLE * MULTIPLE)
                start = array.shape[axis] - 1 if axis == 0 else (array.shape[axis] - kept) // 2
                array = array.take(range(start, start + kept), axis)
        part[value.name] = array
    return part


def measure_ranges(
    model: onnx.ModelProto, names: Sequence[str], samples: Sequence[Feeds], folder: Path
) -> dict[str, Range]:
    """The best range of each named float tensor over all samples. `model` is used up; see `runner` for `folder`."""
    stride = {"start": 0, "end": np.iinfo(np.int64).max, "axis": 0, "step": STRIDE, "flat": -1}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), f"observe_{key}") for key, value in stride.items()
    )
    observers = {name: _observers(index, name) for index, name in enumerate(names)}
    nodes = [*_after(model.graph, observers)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    outputs = [f"observe_{index}_{what}" for index in range(len(names)) for what in ("low", "high", "some")]
    run = runner(model, outputs, folder)
    seen: list[list[Array]] = [[] for _ in names]
    for feeds in samples:
        found = run(feeds)
        for index, kept in enumerate(seen):
            low, high, some = found[3 * index : 3 * index + 3]
            kept.append(np.concatenate([[low, high], some[:: -(-len(some) // KEPT)]]))
    return {name: best_range(np.concatenate(kept)) for name, kept in zip(names, seen, strict=True)}


def _observers(index: int, name: str) -> list[onnx.NodeProto]:
    low, high, flat, some = (f"observe_{index}_{what}" for what in ("low", "high", "flat", "some"))
    return [
        onnx.helper.make_node("ReduceMin", [name], [low], keepdims=0),
        onnx.helper.make_node("ReduceMax", [name], [high], keepdims=0),
        onnx.helper.make_node("Reshape", [name, "observe_flat"], [flat]),
        onnx.helper.make_node("Slice", [flat, *(f"observe_{k}" for k in ("start", "end", "axis", "step"))], [some]),
    ]


def _after(graph: onnx.GraphProto, observers: Mapping[str, Sequence[onnx.NodeProto]]) -> Iterator[onnx.NodeProto]:
    """The graph's nodes, and the observers of each tensor behind the node that makes it: it need not be kept longer."""
    for value in graph.input:
        yield from observers.get(value.name, ())
    for node in graph.node:
        yield onnx.NodeProto.FromString(node.SerializeToString())
        for output in node.output:
            yield from observers.get(output, ())


def best_range(values: Array) -> Range:
    """The range around zero whose uint8 codes give back the values with the least squared error of the grid."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    tops = [Range(low, high * float(ratio)) for ratio in RATIOS]
    top = min(tops, key=lambda candidate: _error(values, candidate)).high
    bottoms = [Range(low * float(ratio), top) for ratio in RATIOS]
    return min(bottoms, key=lambda candidate: _error(values, candidate))


def _error(values: Array, candidate: Range) -> float:
    scale, zero = np.float32(candidate.scale), np.float32(candidate.zero_point)
    back = (np.clip(np.rint(values / scale) + zero, 0, TOP) - zero) * scale
    return float(np.square(values - back).mean(dtype=np.float64))
