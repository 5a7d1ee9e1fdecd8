"""A UNet in two chunks, as ml-stable-diffusion's `--chunk-unet` makes them, for iOS, where a whole one is too large.

Each holds about half of the weights; where they are parted, as little as possible is handed on.
"""

from __future__ import annotations

from typing import Any

import onnx

from pocketdiffusion_export.cutting import cut
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.targets.onnx_parts import Types, flow_of, part_of

SHARES = (0.55, 0.65, 0.75, 0.85)
"""Of all weights, what one chunk may hold; the first with which there are two."""
SMALL = 1024
"""Bytes of constants that shapes may follow from."""


def halves(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Two models, of which the second takes what the first gives. Raises ExportError where there is no such place."""
    light = _without_weights(model.graph)
    types = Types(light)
    flow = flow_of(light, types)
    for share in SHARES:
        pieces = cut(flow, int(sum(flow.weights.values()) * share))
        if len(pieces) == 2:
            first, second = (part_of(model, types, piece) for piece in pieces)
            return first, second
    raise ExportError("the denoiser can't be cut into two chunks: one layer holds most of it; leave --chunk-unet out")


def _without_weights(graph: onnx.GraphProto) -> Any:
    """The same graph with its large constants somewhere else, as shapes are inferred of copies."""
    light = onnx.GraphProto(name=graph.name)
    for field in ("node", "input", "output", "value_info"):
        getattr(light, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        if (size := tensor.ByteSize()) <= SMALL:
            light.initializer.append(tensor)
            continue
        stub = light.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        stub.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "elsewhere"), ("length", str(size))):
            stub.external_data.add(key=key, value=value)
    return light
