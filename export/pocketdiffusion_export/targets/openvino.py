"""OpenVINO IR, converted from our ONNX graph, in the files and folders of optimum-intel (`openvino_model.xml`, `.bin`).

It starts from ONNX and not from torch, because the form of the graph decides its speed: the UNet of SD 1.5 took 4.5 s
a guided step from the ONNX graph and 8.0 s converted directly from torch. Integer weights stay integers; a model with
float16 weights gets all its floating constants stored as float16.
Limit: IR opens on OpenVINO only, so it is verified there only; an ONNX bundle opens on OpenVINO as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import openvino

from pocketdiffusion.tensors import TensorSpec
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.targets.onnx import TARGET as ONNX

TRACES = ("conversion_parameters", "Runtime_version")
"""What the converter notes about its call. The version stays in the manifest and in the IR's own mark."""


class OpenVinoTarget:
    """Writes IR."""

    format = "openvino"
    graph = "openvino_model.xml"
    """File name inside a component's folder; its weights lie beside it in `openvino_model.bin`."""

    def save(self, model: onnx.ModelProto, file: Path) -> None:
        """Convert the model and write it; the same model gives the same bytes. Raises ExportError on a full disk."""
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=file.parent) as folder:
            source = Path(folder) / ONNX.graph  # by a file, because a model in memory is limited to 2 GiB
            ONNX.save(model, source)
            converted = openvino.convert_model(source)
            _remove_traces(converted)
            half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
            try:
                openvino.save_model(converted, file, compress_to_fp16=half)  # the converter made float32 of float16
            except RuntimeError as error:  # all that the engine says of a full disk is "iostream error"
                raise ExportError(
                    f"writing {file.name} failed ({error}); is the disk full? Nothing was written"
                ) from None

    def describe(self, model: onnx.ModelProto) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        """Inputs and outputs by name."""
        return ONNX.describe(model)


TARGET = OpenVinoTarget()


def _remove_traces(model: Any) -> None:
    """Take out what differs from run to run: the converter counts the nodes of the whole process in their names."""
    for key in TRACES:
        if key in model.rt_info:
            del model.rt_info[key]
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result") and "." not in node.friendly_name:  # weights keep theirs
            node.friendly_name = f"{node.get_type_name()}_{index}"
