"""Graph formats that components are written in.

A target is a module with ``export(spec, file)``, which writes one component as float32, ``describe(file)``, which
gives its inputs and outputs, and the names FORMAT and GRAPH. `TARGETS` maps a name to that module.
"""

from __future__ import annotations

TARGETS = {"onnx": "pocketdiffusion_export.targets.onnx:TARGET"}
