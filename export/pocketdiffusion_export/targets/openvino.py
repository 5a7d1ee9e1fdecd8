"""OpenVINO IR, converted from our ONNX graph, in the files and folders of optimum-intel (`openvino_model.xml`, `.bin`).

It starts from ONNX and not from torch, because the form of the graph decides its speed: the UNet of SD 1.5 took 4.5 s
a guided step from the ONNX graph and 8.0 s converted directly from torch. Integer weights stay integers; a model with
float16 weights gets all its floating constants stored as float16.
openvino_genai's Text2ImagePipeline loads such a bundle, unless its batch is fixed.
Limit: IR opens on OpenVINO only, so it is verified there only; an ONNX bundle opens on OpenVINO as well.
"""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import openvino
from openvino import opset13 as opset

from pocketdiffusion.tensors import TensorSpec
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.sizes import Shapes
from pocketdiffusion_export.targets.onnx import TARGET as ONNX
from pocketdiffusion_export.targets.openvino_tokenizer import write_tokenizers

TIMESTEP = "timestep"
WHOLE = TensorSpec("int64", (1,))
TRACES = ("conversion_parameters", "Runtime_version")
"""What the converter notes about its call. The version stays in the manifest and in the IR's own mark."""

_AS_TRACED: Shapes = {}
_NONE: Mapping[str, Shapes] = {}


class OpenVinoTarget:
    """Writes IR."""

    format = "openvino"
    static = False
    graph = "openvino_model.xml"
    """File name inside a component's folder; its weights lie beside it in `openvino_model.bin`."""

    def save(
        self, model: onnx.ModelProto, file: Path, shapes: Shapes = _AS_TRACED, others: Mapping[str, Shapes] = _NONE
    ) -> None:
        """Convert the model and write it; the same model gives the same bytes. Raises ExportError on a full disk.

        `shapes` and `others` are as for ONNX; the graphs share one .bin, which the bytes of each are compared with.
        """
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=file.parent) as folder:
            source = Path(folder) / ONNX.graph  # by a file, because a model in memory is limited to 2 GiB
            ONNX.save(model, source)
            converted = openvino.convert_model(source)
            _whole_timestep(converted)
            _remove_traces(converted)
            half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
            _write(converted, file, shapes, half)
            for name, fixed in others.items():
                _write(converted, file.with_name(name), fixed, half)
                share_weights(file, file.with_name(name))

    def describe(
        self, model: onnx.ModelProto, shapes: Shapes = _AS_TRACED
    ) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        """Inputs and outputs by name."""
        inputs, outputs = ONNX.describe(model, shapes)
        return {name: WHOLE if name == TIMESTEP and not spec.shape else spec for name, spec in inputs.items()}, outputs

    def place(self, component: str) -> str:
        """A component's graph, relative to the bundle."""
        return f"{component}/{self.graph}"

    def finish(self, folder: Path) -> tuple[str, ...]:
        """Write tokenizers for openvino_genai into the bundle. Returns what was left out, for people."""
        return write_tokenizers(folder)


TARGET = OpenVinoTarget()


def _write(model: Any, file: Path, shapes: Shapes, half: bool) -> None:
    """`half`: the converter made float32 of float16."""
    axes = {port.get_any_name(): shapes.get(port.get_any_name()) for port in model.inputs}
    fixed = {name: _partial(shape) for name, shape in axes.items() if shape}  # a scalar has no axes to fix
    if fixed:
        model = model.clone()
        model.reshape(fixed)
    try:
        openvino.save_model(model, file, compress_to_fp16=half)
    except RuntimeError as error:  # all that the engine says of a full disk is "iostream error"
        raise ExportError(f"writing {file.name} failed ({error}); is the disk full? Nothing was written") from None


def _partial(shape: tuple[int | str, ...]) -> Any:
    return openvino.PartialShape([axis if isinstance(axis, int) else -1 for axis in shape])


def share_weights(first: Path, other: Path) -> None:
    """Remove the other graph's weights, which are those of the first byte for byte."""
    weights = other.with_suffix(".bin")
    if not filecmp.cmp(first.with_suffix(".bin"), weights, shallow=False):
        raise ExportError(
            f"{other.name} has other weights than {first.name}, so they can't share a file; export it alone"
        )
    weights.unlink()


def _whole_timestep(model: Any) -> None:
    """Make the denoiser's timestep what optimum-intel writes and openvino_genai feeds: int64 with one axis.

    Our OpenVINO backend takes fractions all the same.
    """
    for parameter in model.get_parameters():
        if parameter.output(0).get_any_name() != TIMESTEP or parameter.partial_shape.rank.get_length():
            continue
        whole = opset.parameter([1], openvino.Type.i64, name=TIMESTEP)
        whole.output(0).get_tensor().set_names({TIMESTEP})
        scalar = opset.squeeze(opset.convert(whole, openvino.Type.f32), opset.constant([0], openvino.Type.i64))
        parameter.output(0).get_tensor().set_names(set())
        parameter.output(0).replace(scalar.output(0))
        model.replace_parameter(model.get_parameter_index(parameter), whole)
        model.validate_nodes_and_infer_types()


def _remove_traces(model: Any) -> None:
    """Take out what differs from run to run: the converter counts the nodes of the whole process in their names."""
    for key in TRACES:
        if key in model.rt_info:
            del model.rt_info[key]
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result") and "." not in node.friendly_name:  # weights keep theirs
            node.friendly_name = f"{node.get_type_name()}_{index}"
