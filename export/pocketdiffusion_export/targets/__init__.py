"""Graph formats that components are written in.

Every target starts from the cleaned (and quantized) ONNX model of a component, so that a source is traced once however
many are asked for. A target is an object with ``save(model, file)``, ``describe(model)``, which gives the inputs and
outputs, and the names ``format`` and ``graph``.
"""

from __future__ import annotations

TARGETS = {
    "onnx": "pocketdiffusion_export.targets.onnx:TARGET",
    "openvino": "pocketdiffusion_export.targets.openvino:TARGET",
}
