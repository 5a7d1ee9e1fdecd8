"""Core ML, by coremltools: opens compiled models (.mlmodelc), packages (.mlpackage) and .mlmodel files, on macOS only.

A compiled model opens at once; a package is compiled by the system at each opening. A compiled model is described by
its `metadata.json`, a package by its protobuf; Apple's names and layouts become ours (`apple.py`). `UnetChunk1` stands
for the UNet that goes on in `UnetChunk2` beside it. Limits: multi-array inputs and outputs only; Core ML decides for
each layer which of the allowed units runs it, and does not tell; no thread count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocketdiffusion import _telemetry
from pocketdiffusion.backends.apple import Model, chained, chunks, translated
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.session import EngineSession, Execute, label, reason, require_device
from pocketdiffusion.errors import BackendUnavailable, GraphFailed
from pocketdiffusion.tensors import AnyArray, TensorSpec

COMPUTE_UNITS = {  # best first; names of coremltools.ComputeUnit
    "all": "ALL",
    "ane": "CPU_AND_NE",
    "gpu": "CPU_AND_GPU",
    "cpu": "CPU_ONLY",
}
ARRAY_TYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32"}
"""ArrayFeatureType.ArrayDataType of Core ML's FeatureTypes.proto."""

MIL_FLOAT16 = 10
"""DataType.FLOAT16 of Core ML's MIL.proto."""


class CoreMLBackend:
    """Devices: "all" (Core ML chooses), "ane" (Neural Engine and CPU), "gpu" (GPU and CPU), "cpu"."""

    name = "coreml"
    formats: tuple[str, ...] = ("coreml",)

    def devices(self) -> list[str]:
        """All of `COMPUTE_UNITS` on macOS with coremltools; [] elsewhere."""
        return list(COMPUTE_UNITS) if self.version() else []

    def precisions(self, device: str) -> tuple[str, ...]:
        """A model has the precision that it was compiled for; "float32" takes any."""
        return ("float32",)

    def version(self) -> str:
        """coremltools' version, e.g. "9.0"; "" when it is missing or this is not macOS."""
        try:
            return str(_engine().__version__)
        except BackendUnavailable:
            return ""

    def fixes_shapes(self, device: str) -> bool:
        """Never."""
        return False

    def open(self, graph: Path, device: str, options: SessionOptions) -> EngineSession:
        """Load a model. Raises BackendUnavailable or GraphFailed."""
        require_device(self.name, device, self.devices())
        ct = _engine()
        units = ct.ComputeUnit[COMPUTE_UNITS[device]]
        try:
            inputs, outputs, precision, execute = chained([_load(ct, place, units) for place in chunks(graph)])
        except Exception as error:  # coremltools raises bare Exception and RuntimeError
            raise GraphFailed(f"{label(graph)} could not be opened on coreml:{device}: {reason(error)}") from error
        if options.precision not in ("float32", precision):  # float32, the default, takes any model
            raise GraphFailed(f"{label(graph)}: asked for {options.precision}, the model is compiled for {precision}")
        inputs, outputs, execute = translated(inputs, outputs, execute)
        return EngineSession(
            graph,
            inputs=inputs,
            outputs=outputs,
            device=f"coreml:{device}",
            precision=precision,
            execute=execute,
        )


Description = tuple[dict[str, TensorSpec], dict[str, TensorSpec], str]
"""Inputs, outputs, precision."""


def compiled_description(graph: Path) -> Description:
    """From the `metadata.json` that Apple's compiler writes into a .mlmodelc folder."""
    metadata = json.loads((graph / "metadata.json").read_text(encoding="utf-8"))[0]
    inputs = {field["name"]: _schema_spec(field) for field in metadata["inputSchema"]}
    outputs = {field["name"]: _schema_spec(field) for field in metadata["outputSchema"]}
    return inputs, outputs, "float16" if "Float16" in metadata["computePrecision"] else "float32"


def package_description(spec: Any) -> Description:
    """From the protobuf of a .mlpackage or .mlmodel, as `MLModel.get_spec` gives it."""
    inputs = {field.name: _feature_spec(field) for field in spec.description.input}
    outputs = {field.name: _feature_spec(field) for field in spec.description.output}
    return inputs, outputs, "float16" if _computes_float16(spec) else "float32"


def _schema_spec(field: Mapping[str, Any]) -> TensorSpec:
    if field["type"] != "MultiArray":
        raise ValueError(f"'{field['name']}' is a {field['type']}; allowed: MultiArray")
    flexible = field.get("hasShapeFlexibility") == "1"
    shape = json.loads(field["shape"])
    return TensorSpec(field["dataType"].lower(), tuple(None if flexible else int(size) for size in shape))


def _feature_spec(field: Any) -> TensorSpec:
    if field.type.WhichOneof("Type") != "multiArrayType":
        raise ValueError(f"'{field.name}' is a {field.type.WhichOneof('Type')}; allowed: multiArrayType")
    array = field.type.multiArrayType
    flexible = array.WhichOneof("ShapeFlexibility") is not None
    return TensorSpec(ARRAY_TYPES[array.dataType], tuple(None if flexible else int(size) for size in array.shape))


def _computes_float16(spec: Any) -> bool:
    """Whether any value inside an ML program is float16; older model types leave it to the compute unit: float32."""
    return spec.WhichOneof("Type") == "mlProgram" and any(
        output.type.tensorType.dataType == MIL_FLOAT16
        for function in spec.mlProgram.functions.values()
        for block in function.block_specializations.values()
        for operation in block.operations
        for output in operation.outputs
    )


def _engine() -> Any:
    if sys.platform != "darwin":
        raise BackendUnavailable("coreml runs on macOS only; on this system use onnxruntime or openvino")
    _telemetry.disable()
    try:
        import coremltools
    except Exception as error:  # a broken installation fails in many ways
        raise BackendUnavailable(
            f"coremltools could not be imported ({reason(error)}); pip install 'pocketdiffusion[coreml]'"
        ) from error
    return coremltools


def _load(ct: Any, place: Path, units: Any) -> Model:
    if place.suffix == ".mlmodelc":
        inputs, outputs, precision = compiled_description(place)
        model = ct.models.CompiledMLModel(str(place), units)
    else:
        model = ct.models.MLModel(str(place), compute_units=units)
        inputs, outputs, precision = package_description(model.get_spec())
    return inputs, outputs, precision, _executor(model, outputs)


def _executor(model: Any, outputs: Mapping[str, TensorSpec]) -> Execute:
    def execute(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
        results = model.predict(feeds)
        return {name: np.array(results[name], spec.dtype) for name, spec in outputs.items()}

    return execute
