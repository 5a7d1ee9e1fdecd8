"""Graph formats that components are written in.

A target is an object with ``trace(spec)``, which gives one component as a float32 model of the format,
``save(model, file)``, ``describe(model)``, which gives its inputs and outputs, and the names ``format`` and ``graph``.
"""

from __future__ import annotations

TARGETS = {"onnx": "pocketdiffusion_export.targets.onnx:TARGET"}
