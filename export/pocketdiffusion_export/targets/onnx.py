"""ONNX through torch's TorchScript exporter, then cleaned by `targets/onnx_clean.py`.

Opset 17, because every engine of the last years opens it. Group norm stays Reshape-InstanceNormalization-Reshape:
opset 21's GroupNormalization was slower on the embedded UNet (onnxruntime 14.5 ms for 12.7, OpenVINO 16.1 for 15.1).
Tracing leaves weights out of the graph, and those of large components are written beside it (`model.onnx_data`), which
lifts ONNX's limit of 2 GiB and lets engines map them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch

from pocketdiffusion.tensors import AnyArray, TensorSpec
from pocketdiffusion_export.component import ComponentSpec
from pocketdiffusion_export.sizes import Shapes
from pocketdiffusion_export.targets.onnx_clean import clean

OPSET = 17
EXTERNAL_BYTES = 100 << 20
"""Weights that together are larger lie in a file of their own."""
INLINE_BYTES = 1024
"""Tensors that are smaller stay in the graph in any case: engines want to see constants such as shapes."""
PAGE = 4096
"""Alignment of tensors in the weights' file, for mapping."""

_AS_TRACED: Shapes = {}
_NONE: Mapping[str, Shapes] = {}


class OnnxTarget:
    """Writes and reads ONNX graphs."""

    format = "onnx"
    static = False
    """Whether graphs have no free axes at all, batch and text length included."""
    graph = "model.onnx"
    """File name inside a component's folder."""

    def trace(self, spec: ComponentSpec, *, release: bool = False) -> onnx.ModelProto:
        """The component as a cleaned float32 ONNX model.

        `release` takes each weight away from the source module once it is copied, so that both never fill the memory
        together; the module can't run afterwards.
        """
        buffer, module = io.BytesIO(), spec.module.eval()
        with warnings.catch_warnings(), spec.form(), torch.inference_mode():
            warnings.simplefilter("ignore")  # tracer remarks on shape checks that free axes make constant
            torch.onnx.export(
                module,
                spec.example,
                buffer,
                dynamo=False,
                opset_version=OPSET,
                export_params=False,
                do_constant_folding=False,  # needs the weights in the graph; cleaning does the same
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_axes={name: dict(axes) for name, axes in spec.axes.items()},
            )
        traced = onnx.load_from_string(buffer.getvalue())
        _name_outputs(traced, spec)
        return clean(traced, _weights(module, {value.name for value in traced.graph.input}, release))

    def save(
        self, model: onnx.ModelProto, file: Path, shapes: Shapes = _AS_TRACED, others: Mapping[str, Shapes] = _NONE
    ) -> None:
        """Write the model and check it; the same model gives the same bytes.

        `shapes` fixes axes of inputs and outputs. `others` are graphs of other shapes by the names of their files
        beside the first, whose weights they read.
        """
        if others or sum(tensor.ByteSize() for tensor in model.graph.initializer) > EXTERNAL_BYTES:
            model = with_external_data(model, file.with_name(f"{file.name}_data"))
        for place, fixed in ((file, shapes), *((file.with_name(name), other) for name, other in others.items())):
            place.write_bytes(_shaped(model, fixed).SerializeToString(deterministic=True))
            onnx.checker.check_model(place)

    def describe(
        self, model: onnx.ModelProto, shapes: Shapes = _AS_TRACED
    ) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        """Inputs and outputs by name."""
        graph = model.graph
        inputs, outputs = ({v.name: describe_value(v, shapes) for v in some} for some in (graph.input, graph.output))
        return inputs, outputs

    def place(self, component: str) -> str:
        """A component's graph, relative to the bundle."""
        return f"{component}/{self.graph}"

    def finish(self, folder: Path) -> tuple[str, ...]:
        """Nothing more belongs to the bundle."""
        return ()


TARGET = OnnxTarget()


def _name_outputs(model: onnx.ModelProto, spec: ComponentSpec) -> None:
    """Give each output the shape that the tracer saw, with the spec's names for free axes."""
    with torch.inference_mode():
        outputs = spec.reference(*spec.example)
    for value, tensor in zip(model.graph.output, outputs, strict=True):
        free = spec.axes.get(value.name, {})
        shape = [free.get(axis, length) for axis, length in enumerate(tensor.shape)]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))


def _weights(module: torch.nn.Module, names: set[str], release: bool) -> dict[str, AnyArray]:
    """Parameters and buffers as arrays without a copy; with `release` the arrays are all that keeps them."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items() if name in names}
    if release:
        for name in arrays:
            tensors[name].data = torch.empty(0)
    return arrays


def with_external_data(model: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    """The model with its large tensors written to `file`; the one given stays as it is."""
    tensors = []
    with file.open("wb") as stream:
        for tensor in model.graph.initializer:
            if tensor.ByteSize() < INLINE_BYTES or not tensor.HasField("raw_data"):
                tensors.append(tensor)
                continue
            stream.write(bytes(-stream.tell() % PAGE))
            place = {"location": file.name, "offset": stream.tell(), "length": stream.write(tensor.raw_data)}
            outside = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            outside.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                outside.external_data.add(key=key, value=str(value))
            tensors.append(outside)
    old = model.graph
    graph = onnx.helper.make_graph(list(old.node), old.name, list(old.input), list(old.output), tensors)
    return onnx.helper.make_model(
        graph, opset_imports=list(model.opset_import), producer_name=model.producer_name, ir_version=model.ir_version
    )


def _shaped(model: onnx.ModelProto, shapes: Shapes) -> onnx.ModelProto:
    """The model, or a copy with these axes."""
    if not shapes:
        return model
    made = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*made.graph.input, *made.graph.output):
        if value.name in shapes:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    return made


def describe_value(value: onnx.ValueInfoProto, shapes: Shapes = _AS_TRACED) -> TensorSpec:
    """Type and axes of a tensor, the axes those in `shapes` if it is there; None: any length."""
    kind = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    traced = tuple(dim.dim_param or dim.dim_value or None for dim in kind.shape.dim)
    return TensorSpec(dtype, shapes.get(value.name, traced))
