"""Ranges of activations, measured by running the float graph on samples.

Each observed tensor is reduced inside the graph, to its least and largest value and every 61st element, so that memory
does not grow with the number of tensors. The range that is chosen is the one with the least squared error after
quantization to uint8 on those elements, of a grid that shrinks either end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
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


def runner(model: onnx.ModelProto, outputs: Sequence[str]) -> Any:
    """A function from feeds to the named tensors, computed in float; the graph goes through a temporary file.

    Weights stay int8 in memory and are read back in every run, one layer at a time: a large UNet fits that way.
    """
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of all weights
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(model.SerializeToString())
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
    return lambda feeds: session.run(list(outputs), dict(feeds))


def measure_ranges(model: onnx.ModelProto, names: Sequence[str], samples: Sequence[Feeds]) -> dict[str, Range]:
    """The best range of each named float tensor over all samples. `model` is used up."""
    stride = {"start": 0, "end": np.iinfo(np.int64).max, "axis": 0, "step": STRIDE, "flat": -1}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), f"observe_{key}") for key, value in stride.items()
    )
    outputs = []
    for index, name in enumerate(names):
        low, high, flat, some = (f"observe_{index}_{what}" for what in ("low", "high", "flat", "some"))
        model.graph.node.extend(
            [
                onnx.helper.make_node("ReduceMin", [name], [low], keepdims=0),
                onnx.helper.make_node("ReduceMax", [name], [high], keepdims=0),
                onnx.helper.make_node("Reshape", [name, "observe_flat"], [flat]),
                onnx.helper.make_node("Slice", [flat, *(f"observe_{k}" for k in list(stride)[:4])], [some]),
            ]
        )
        outputs += [low, high, some]
    run = runner(model, outputs)
    seen: list[list[Array]] = [[] for _ in names]
    for feeds in samples:
        found = run(feeds)
        for index, kept in enumerate(seen):
            low, high, some = found[3 * index : 3 * index + 3]
            kept.append(np.concatenate([[low, high], some[:: -(-len(some) // KEPT)]]))
    return {name: best_range(np.concatenate(kept)) for name, kept in zip(names, seen, strict=True)}


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
