"""How much noise other forms of some weights bring to a component's outputs, measured on samples.

The trial graph takes its weights as inputs, so that one session serves every choice of forms, and a weight is put in
another form by overwriting an array. The arrays are float16: 2 bytes a weight, and a rounding far below the noise of
8 bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion_export.component import Feeds
from pocketdiffusion_export.quant.calibrate import runner

Outputs = Sequence[Sequence[Array]]
"""For each sample, the component's outputs."""


class Trial:
    """A float graph with weights that can be overwritten."""

    def __init__(self, model: onnx.ModelProto, weights: Iterable[str]) -> None:
        """`model` is only read. The named initializers must be float32 and fit float16."""
        wanted = set(weights)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in wanted}
        self._halves = {name: self.weight(name).astype(np.float16) for name in self._tensors}
        with tempfile.TemporaryDirectory() as folder:
            outputs = [value.name for value in model.graph.output]
            self._run = runner(_with_inputs(model, self._halves), outputs, Path(folder))

    def weight(self, name: str) -> Array:
        """The float32 weight itself."""
        return np.asarray(numpy_helper.to_array(self._tensors[name]), np.float32)

    def put(self, name: str, weight: Array) -> None:
        """Use an array of the same shape in place of a weight."""
        self._halves[name][...] = weight

    def outputs(self, samples: Sequence[Feeds]) -> Outputs:
        """What the graph gives with the weights of the moment."""
        weights = {_input(name): half for name, half in self._halves.items()}
        return [self._run({**feeds, **weights}) for feeds in samples]


def relative_noise(expected: Outputs, found: Outputs) -> float:
    """Energy of the error over energy of the signal, over all samples; of several outputs the worst."""
    pairs = [list(zip(*pair, strict=True)) for pair in zip(expected, found, strict=True)]
    noise = np.sum([[_energy(want - got) for want, got in pair] for pair in pairs], axis=0)
    signal = np.sum([[_energy(want) for want, _ in pair] for pair in pairs], axis=0)
    return float(np.max(noise / np.maximum(signal, np.finfo(np.float64).tiny)))


def _input(name: str) -> str:
    return f"{name}_trial"


def _with_inputs(model: onnx.ModelProto, halves: dict[str, AnyArray]) -> onnx.ModelProto:
    """A copy whose weights of these names are inputs, cast where they are used first, and which has no outputs."""
    made = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    made.graph.name = model.graph.name
    made.graph.input.extend(model.graph.input)
    for name, half in halves.items():
        made.graph.input.append(onnx.helper.make_tensor_value_info(_input(name), onnx.TensorProto.FLOAT16, half.shape))
    made.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in halves)
    waiting = set(halves)
    for node in model.graph.node:
        for name in waiting.intersection(node.input):
            made.graph.node.append(onnx.helper.make_node("Cast", [_input(name)], [name], to=onnx.TensorProto.FLOAT))
        waiting.difference_update(node.input)
        made.graph.node.append(node)
    return made


def _energy(array: Array) -> float:
    return float(np.square(array, dtype=np.float64).sum())
