"""ONNX through torch's TorchScript exporter, then cleaned by `targets/onnx_clean.py`.

Opset 17, because every engine of the last years opens it. Group norm stays Reshape-InstanceNormalization-Reshape:
opset 21's GroupNormalization was slower on the embedded UNet (onnxruntime 14.5 ms for 12.7, OpenVINO 16.1 for 15.1).
Limit: weights of one component up to 2 GiB, since they are stored inside the .onnx file.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch

from pocketdiffusion.tensors import TensorSpec
from pocketdiffusion_export.component import ComponentSpec
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.targets.onnx_clean import clean

OPSET = 17
MAX_BYTES = 2 << 30


class OnnxTarget:
    """Writes and reads ONNX graphs."""

    format = "onnx"
    graph = "model.onnx"
    """File name inside a component's folder."""

    def trace(self, spec: ComponentSpec) -> onnx.ModelProto:
        """The component as a cleaned float32 ONNX model. Raises ExportError when it is too large or can't be traced."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in spec.module.parameters())
        if size > MAX_BYTES:
            raise ExportError(f"{spec.name} holds {size >> 20} MiB of weights; one ONNX file holds at most 2048 MiB")
        buffer = io.BytesIO()
        with warnings.catch_warnings(), spec.form(), torch.inference_mode():
            warnings.simplefilter("ignore")  # tracer remarks on shape checks that free axes make constant
            torch.onnx.export(
                spec.module.eval(),
                spec.example,
                buffer,
                dynamo=False,
                opset_version=OPSET,
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_axes={name: dict(axes) for name, axes in spec.axes.items()},
            )
        model = clean(onnx.load_from_string(buffer.getvalue()))
        _name_outputs(model, spec)
        return model

    def save(self, model: onnx.ModelProto, file: Path) -> None:
        """Check the model and write it; the same model gives the same bytes."""
        onnx.checker.check_model(model)
        file.write_bytes(model.SerializeToString(deterministic=True))

    def describe(self, model: onnx.ModelProto) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        """Inputs and outputs by name."""
        return {v.name: _spec(v) for v in model.graph.input}, {v.name: _spec(v) for v in model.graph.output}


TARGET = OnnxTarget()


def _name_outputs(model: onnx.ModelProto, spec: ComponentSpec) -> None:
    """Give each output the shape that the tracer saw, with the spec's names for free axes."""
    with torch.inference_mode():
        outputs = spec.reference(*spec.example)
    for value, tensor in zip(model.graph.output, outputs, strict=True):
        free = spec.axes.get(value.name, {})
        shape = [free.get(axis, length) for axis, length in enumerate(tensor.shape)]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    return TensorSpec(dtype, tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim))
