"""How much arithmetic a graph is, counted from its nodes at given input shapes, by OpenVINO's shape propagation.

One path for ONNX graphs and OpenVINO IR. Two operations for each multiplication with addition, in matrix products,
convolutions and attention, and nothing for all else: torch's `FlopCounterMode` counts alike. It is the arithmetic that
the model asks for, whatever an engine makes of it. Weights are mapped, not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from pocketdiffusion import _telemetry
from pocketdiffusion.backends.session import label, reason
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.openvino_xml import weights_name
from pocketdiffusion.tuning.shapes import Shape, denoiser_rows, entry_at, input_shapes
from pocketdiffusion_bench.errors import BenchError

UNCOUNTED = frozenset(
    (
        *("Einsum", "DeformableConvolution", "PagedAttentionExtension", "If", "Loop", "TensorIterator"),
        *("LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell"),
    )
)
"""Nodes that multiply matrices, or hold others, and that no known model of ours has."""


def graph_flops(graph: Path, shapes: Mapping[str, Shape]) -> float:
    """Operations of one run of a graph. Raises BenchError: no OpenVINO, a graph it can't read, a node not countable."""
    model = _read(graph)
    try:
        model.reshape({name: list(shape) for name, shape in shapes.items()})
    except Exception as error:  # classes from C++ that share no base but Exception
        raise BenchError(f"FLOPs of {label(graph)}: the inputs {dict(shapes)} do not fit: {reason(error)}") from error
    return float(sum(_node_flops(graph, node) for node in model.get_ops()))


def step_flops(bundle: Bundle, *, width: int, height: int, guidance: float) -> float:
    """Operations of the denoiser's part of one step of a first-order sampler, for one image; see `graph_flops`."""
    denoiser = denoiser_name(bundle)
    rows = denoiser_rows(bundle.manifest.components[denoiser], guidance)
    shapes = input_shapes(bundle, denoiser, width=width, height=height, rows=rows)
    fixed = shapes["sample"][0]  # a graph for one row runs twice
    return graph_flops(bundle.path / entry_at(bundle, denoiser, (width, height)).graph, shapes) * rows / fixed


def denoiser_name(bundle: Bundle) -> str:
    """The component that runs at every step. Raises BenchError for a bundle without one."""
    for name in ("unet", "transformer"):
        if name in bundle.manifest.components:
            return name
    raise BenchError(f"{bundle.manifest.name} has no denoiser; it has {', '.join(bundle.manifest.components)}")


def _read(graph: Path) -> Any:
    _telemetry.disable()
    try:
        import openvino
        from openvino.frontend import FrontEndManager
    except ImportError:
        raise BenchError(
            f"FLOPs of {label(graph)} need openvino to read the graph: pip install 'pocketdiffusion[openvino]'"
        ) from None
    try:
        if graph.suffix != ".onnx":
            return openvino.Core().read_model(graph, graph.with_name(weights_name(graph.name)))
        frontend = FrontEndManager().load_by_framework("onnx")
        return frontend.convert(frontend.load(str(graph)))
    except Exception as error:
        raise BenchError(f"FLOPs of {label(graph)}: OpenVINO can't read it: {reason(error)}") from error


def _node_flops(graph: Path, node: Any) -> int:
    kind = node.get_type_name()
    if kind in UNCOUNTED:
        raise BenchError(f"FLOPs of {label(graph)}: a {kind} node, which is not counted here; see flops.COUNTED")
    if kind not in COUNTED:
        return 0
    ports = [*node.input_values(), node.output(0)]
    if any(port.get_partial_shape().is_dynamic for port in ports):
        raise BenchError(f"FLOPs of {label(graph)}: the shapes of {kind} '{node.get_friendly_name()}' stay unknown")
    *inputs, output = (tuple(port.get_shape()) for port in ports)
    return COUNTED[kind](inputs, output, node.get_attributes())


def _matmul(inputs: list[Shape], output: Shape, attributes: Mapping[str, Any]) -> int:
    first = inputs[0]
    inner = first[-2] if attributes["transpose_a"] and len(first) > 1 else first[-1]
    return 2 * prod(output) * inner


def _attention(inputs: list[Shape], output: Shape, attributes: Mapping[str, Any]) -> int:
    query, key, value = inputs[:3]
    return 2 * prod(output[:-1]) * key[-2] * (query[-1] + value[-1])


COUNTED: Mapping[str, Callable[[list[Shape], Shape, Mapping[str, Any]], int]] = {
    "MatMul": _matmul,
    "ScaledDotProductAttention": _attention,
    # Weights are (out, in, kernel ...) of a convolution, (in, out, kernel ...) of a transposed one; groups go in front.
    "Convolution": lambda inputs, output, _: 2 * prod(output) * prod(inputs[1][1:]),
    "GroupConvolution": lambda inputs, output, _: 2 * prod(output) * prod(inputs[1][2:]),
    "ConvolutionBackpropData": lambda inputs, _, __: 2 * prod(inputs[0]) * prod(inputs[1][1:]),
    "GroupConvolutionBackpropData": lambda inputs, _, __: 2 * prod(inputs[0]) * prod(inputs[1][2:]),
}
"""Node type -> operations from the shapes of its inputs and its output, and its attributes."""
