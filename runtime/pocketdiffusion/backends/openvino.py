"""OpenVINO: opens OpenVINO IR (.xml with its .bin) and ONNX graphs on CPU, GPU and NPU.

The CPU and GPU plugins compute in bfloat16 or float16 by themselves where the hardware has them, so the precision is
always set and what the compiled graph really uses is read back. ONNX graphs with int8 weights and float arithmetic are
dequantized once, at load, as in the onnxruntime backend and at the same price. IR keeps its compressed weights, and so
does ONNX that is opened compact, as far as the plugin can: the CPU's does for MatMul, and not for convolutions.

A compiled graph is kept in `cache.EngineCache` where its contents are known and not larger than `MAX_KEPT` (a part of a
graph always is), because compiling takes three times as long as importing it.

Limits: one request per session, so runs from several threads go one after another; inputs of unknown rank are refused.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketdiffusion import _telemetry
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.cache import EngineCache, processor
from pocketdiffusion.backends.session import EngineSession, label, reason, require_device
from pocketdiffusion.bundle.openvino_xml import port_name, weights_name
from pocketdiffusion.errors import BackendUnavailable, DeviceNotAttached, GraphFailed
from pocketdiffusion.tensors import AnyArray, TensorSpec

PRECISIONS = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}
"""Ours -> value of INFERENCE_PRECISION_HINT, entry of OPTIMIZATION_CAPABILITIES."""
DEQUANTIZE = frozenset({"Constant", "Convert", "Subtract", "Multiply", "Reshape", "Unsqueeze"})
"""What the ONNX reader makes of DequantizeLinear."""

ACCELERATOR_NODES = ("/dev/dri", "/dev/dxg", "/dev/accel")
"""Where Linux shows GPUs and NPUs to programs (dxg: inside WSL)."""

MAX_KEPT = 1 << 30
"""Bytes of a graph and its weights. Larger ones are not kept: few of them would drive all others out of the cache."""

REOPENED = 64 << 20
"""Bytes of a graph and its weights from which one that was compiled is closed and opened from the cache at once. What
was compiled holds weights in all forms that they had on the way: the embedded model's denoiser 185 MB, imported 117.
"""

READING = 2
"""Raised when `read` makes something else of a graph: what was compiled before then no longer counts."""


class OpenVinoBackend:
    """Devices are OpenVINO's in lower case: "gpu" (or "gpu.0", "gpu.1"), "cpu", "npu"."""

    name = "openvino"
    formats: tuple[str, ...] = ("openvino", "onnx")

    def devices(self) -> list[str]:
        """GPUs, then the CPU, then the NPU; [] when openvino is missing or broken."""
        if importlib.util.find_spec("openvino") is None:
            return []
        if sys.platform == "linux" and not any(map(os.path.exists, ACCELERATOR_NODES)):
            return ["cpu"]  # importing the engine to learn this costs 0.1 s
        try:
            names = [name.lower() for name in shared_core().available_devices]
        except BackendUnavailable:
            return []
        return sorted(names, key=lambda name: ("gpu", "cpu").index(name[:3]) if name[:3] in ("gpu", "cpu") else 2)

    def precisions(self, device: str) -> tuple[str, ...]:
        """What the hardware has, by the plugin. Raises BackendUnavailable."""
        return ("float32",) if device == "npu" else tuple(_precisions(shared_core(), device))

    def version(self) -> str:
        """For example "2026.4.1"; "" when openvino is missing."""
        try:
            return str(_engine().__version__).split("-")[0]
        except BackendUnavailable:
            return ""

    def fixes_shapes(self, device: str) -> bool:
        """On the CPU. Elsewhere it was never measured, and a GPU wants its rows together."""
        return device == "cpu"

    def open(self, graph: Path, device: str, options: SessionOptions) -> EngineSession:
        """Read and compile a graph. Raises BackendUnavailable, DeviceNotAttached or GraphFailed."""
        require_device(self.name, device, self.devices())
        core = shared_core()
        settings = properties(core, graph, device, options)
        try:
            opened = _compiled(core, graph, device, options, settings)
        except Exception as error:  # the readers raise classes that share no base but Exception
            raise GraphFailed(f"{label(graph)} could not be opened on openvino:{device}: {reason(error)}") from error
        compiled = opened.graph
        attached = [str(name).strip("()").lower() for name in compiled.get_property("EXECUTION_DEVICES")]
        if not any(name.startswith(device) for name in attached):
            raise DeviceNotAttached(f"{label(graph)}: asked for openvino:{device}, opened on {', '.join(attached)}")
        outputs = {name: _spec(port) for name, port in zip(opened.outputs, compiled.outputs, strict=True)}
        if not outputs:  # an empty ONNX file reads as a model of nothing
            raise GraphFailed(f"{label(graph)} could not be opened on openvino:{device}: it has no outputs")
        return EngineSession(
            graph,
            inputs={
                name: _input_spec(graph, name, port) for name, port in zip(opened.inputs, compiled.inputs, strict=True)
            },
            outputs=outputs,
            device=f"openvino:{device}",
            precision=_precision(graph, device, options, compiled, opened.integer),
            execute=_Executor(compiled.create_infer_request(), list(outputs), opened.mapped),
            cached=opened.cached,
            kept=opened.kept,
        )


def _engine() -> Any:
    _telemetry.disable()
    try:
        import openvino
    except Exception as error:  # a broken installation fails in many ways
        raise BackendUnavailable(
            f"openvino could not be imported ({reason(error)}); pip install 'pocketdiffusion[openvino]'"
        ) from error
    return openvino


@functools.cache
def shared_core() -> Any:
    """The engine's entry point, of which a process needs one. Raises BackendUnavailable."""
    return _engine().Core()


@dataclass(frozen=True, slots=True)
class _Opened:
    """A compiled graph and what only the graph as read tells."""

    graph: Any
    inputs: list[str]
    outputs: list[str]
    integer: bool
    """Whether it quantizes activations."""
    cached: bool = False
    """Whether it was in the cache before."""
    mapped: memoryview | None = None
    """The contents of the file that it was imported from."""
    kept: Path | None = None
    """The file in the cache that holds it."""


def _compiled(core: Any, graph: Path, device: str, options: SessionOptions, settings: Mapping[str, Any]) -> _Opened:
    """From the cache, or compiled and put there. Raises the engine's own exceptions, GraphFailed, InvalidRequest."""
    key, size = _key(core, graph, device, options, settings), _stored_bytes(graph)
    cache = None if key is None or (size > MAX_KEPT and not options.passing) else EngineCache()
    if key is None or cache is None:
        return _read_and_compiled(core, graph, device, options, settings)
    if (found := _imported(core, cache, key, device, settings)) is not None:
        return found
    opened = _read_and_compiled(core, graph, device, options, settings)
    facts = {"inputs": opened.inputs, "outputs": opened.outputs, "integer": opened.integer}
    kept = cache.store(key, facts, opened.graph.export_model)
    if kept is None or options.passing or size < REOPENED:
        return replace(opened, kept=kept)
    del opened  # before it is imported
    found = _imported(core, cache, key, device, settings)
    if found is None:  # gone already
        return _read_and_compiled(core, graph, device, options, settings)
    return replace(found, cached=False)


def _imported(
    core: Any, cache: EngineCache, key: Mapping[str, Any], device: str, settings: Mapping[str, Any]
) -> _Opened | None:
    """A graph from the cache; None where it has none that the engine takes."""
    found = cache.load(key)
    if found is None:
        return None
    with suppress(Exception):  # one of a build or driver that calls itself the same; it is compiled and kept anew
        tensor = _engine().Tensor(np.frombuffer(found.data, np.uint8), shared_memory=True)
        with found.passing():
            imported = core.import_model(tensor, device.upper(), settings)
        return _Opened(imported, **found.facts, cached=True, mapped=found.data, kept=found.path)
    return None


def _read_and_compiled(
    core: Any, graph: Path, device: str, options: SessionOptions, settings: Mapping[str, Any]
) -> _Opened:
    model = read(core, graph, options)
    given, made = ([_name(graph, port) for port in ports] for ports in (model.inputs, model.outputs))
    integer = _quantizes_activations(model)
    return _Opened(core.compile_model(model, device.upper(), settings), given, made, integer)


def _stored_bytes(graph: Path) -> int:
    """Of a graph and what lies beside it, above all its weights."""
    return sum(file.stat().st_size for file in graph.parent.iterdir())


def _key(
    core: Any, graph: Path, device: str, options: SessionOptions, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """All that a compiled graph depends on; None where it can't or shall not be kept."""
    name = device.upper()
    if options.identity is None or "EXPORT_IMPORT" not in core.get_property(name, "OPTIMIZATION_CAPABILITIES"):
        return None
    return {
        "identity": options.identity,
        "graph": label(graph),
        "engine": f"openvino {_engine().__version__}",
        "device": device,
        "hardware": core.get_property(name, "FULL_DEVICE_NAME"),
        "processor": processor(),
        "settings": {key: str(value) for key, value in settings.items()},
        "weights": options.weights,
        "shapes": options.shapes and {name: list(shape) for name, shape in options.shapes.items()},
        "reading": READING,
    }


def read(core: Any, graph: Path, options: SessionOptions) -> Any:
    """The model of a file. ONNX goes to its own reader: the general one tries all others on a broken file, aloud."""
    if graph.suffix != ".onnx":
        model = core.read_model(graph, graph.with_name(weights_name(graph.name)))
        _take_fractions(model)
        _fix(model, options.shapes or {})
        return model
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    model = frontend.convert(frontend.load(str(graph)))
    _fix(model, options.shapes or {})
    if _quantizes_activations(model) or options.weights == "compact":
        _fold_tables(model)
    else:
        _fold(model)
    return model


def _fix(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Fix the free axes of inputs to those of calls of such shapes."""
    from openvino import PartialShape

    fixed = {}
    for port in model.inputs:
        shape = shapes.get(port_name([str(name) for name in port.get_names()]))
        if shape is not None and port.partial_shape.is_dynamic and port.partial_shape.rank.get_length() == len(shape):
            axes = zip(port.partial_shape, shape, strict=True)
            fixed[port] = PartialShape([length if axis.is_dynamic else axis for axis, length in axes])
    if fixed:
        model.reshape(fixed)


def _take_fractions(model: Any) -> None:
    """Make whole-number inputs that are only turned into floats floats: optimum-intel's IR, and so ours, declares the
    timestep as int64, and many schedules ask for timesteps in between.
    """
    from openvino import Type

    for parameter in model.get_parameters():
        readers = [reader.get_node() for reader in parameter.output(0).get_target_inputs()]
        floats = all(node.get_type_name() == "Convert" and node.get_element_type().is_real() for node in readers)
        if parameter.get_element_type() == Type.i64 and floats and readers:
            parameter.set_element_type(Type.f32)
            model.validate_nodes_and_infer_types()


def _quantizes_activations(model: Any) -> bool:
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def _fold(model: Any) -> None:
    """Compute everything that depends on constants only."""
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)


def _fold_tables(model: Any) -> None:
    """Dequantize embeddings with a scale per column: OpenVINO 2026.4's CPU plugin corrupts the heap on int8 ones.

    Others stay as they are stored: of Stable Diffusion 1.5's, 76 MB in float16 where float32 takes 152.
    """
    from openvino import Model, opset13

    for gather in (node for node in model.get_ops() if node.get_type_name() == "Gather"):
        source = gather.input_value(0)
        if _dequantizes(source.get_node()) and _scaled_by_column(source.get_node()):
            table = Model([opset13.result(source)], [], "table")
            _fold(table)
            gather.input(0).replace_source_output(table.get_results()[0].input_value(0))


def _scaled_by_column(table: Any) -> bool:
    """Whether a dequantized table has other scales than one for each row, or one for all."""
    if table.get_type_name() != "Multiply":
        return False
    scale = list(table.input_value(1).get_shape())
    return any(length > 1 for length in scale[len(scale) - len(table.get_output_shape(0)) + 1 :])


def _dequantizes(node: Any) -> bool:
    """Whether a node and all before it are constants or the arithmetic of DequantizeLinear."""
    return node.get_type_name() in DEQUANTIZE and all(_dequantizes(value.get_node()) for value in node.input_values())


def properties(core: Any, graph: Path, device: str, options: SessionOptions) -> dict[str, Any]:
    """What a graph is compiled with. Raises GraphFailed for a precision that the device does not have."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if device == "npu" and options.precision == "float32":
        return settings  # an NPU has float16 only and refuses the hint; `Session.precision` tells
    able = _precisions(core, device)
    if options.precision not in able:  # a hint for another is taken, and answered by what the device has
        raise GraphFailed(
            f"{label(graph)}: openvino:{device} does not compute in {options.precision}; choose from {', '.join(able)}"
        )
    settings["INFERENCE_PRECISION_HINT"] = PRECISIONS[options.precision][0]
    if device == "cpu":
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # by default int8 weights make activations int8 as well
        if options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.threads
    return settings


def _precisions(core: Any, device: str) -> list[str]:
    capabilities = core.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
    return [name for name, (_, capability) in PRECISIONS.items() if capability in capabilities]


def _precision(graph: Path, device: str, options: SessionOptions, compiled: Any, integer: bool) -> str:
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    used = next((name for name, (value, _) in PRECISIONS.items() if value == hint), str(hint))
    if used != options.precision and device != "npu":
        raise GraphFailed(
            f"{label(graph)}: asked for {options.precision}, openvino:{device} computes in {used}; ask for that"
        )
    return "int8" if integer else used


def _name(graph: Path, port: Any) -> str:
    """The name of a port of the model as read, the same that `openvino_xml` reads from the file: compiling gives ports
    the names of nodes that fall away.
    """
    names = [str(name) for name in port.get_names()]
    if not names:
        raise GraphFailed(f"{label(graph)}: an input or output has no name; export the graph with names")
    return port_name(names)


def _spec(port: Any) -> TensorSpec:
    shape = port.partial_shape
    axes = () if shape.rank.is_dynamic else tuple(None if axis.is_dynamic else axis.get_length() for axis in shape)
    return TensorSpec(port.element_type.to_dtype().name, axes)


def _input_spec(graph: Path, name: str, port: Any) -> TensorSpec:
    if port.partial_shape.rank.is_dynamic:
        raise GraphFailed(f"{label(graph)}: input '{name}' has no rank; export the graph with shapes")
    return _spec(port)


class _Executor:
    """Runs a request. `mapped` is what the engine reads its constants from without owning it."""

    def __init__(self, request: Any, names: list[str], mapped: memoryview | None) -> None:
        self._request, self._names, self._mapped = request, names, mapped
        self._lock = threading.Lock()

    def __call__(self, feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
        with self._lock:
            self._request.infer(feeds)
            return {name: np.array(self._request.get_output_tensor(i).data) for i, name in enumerate(self._names)}

    def __del__(self) -> None:
        self._request = None  # and with it the graph, before the mapping
        self._mapped = None
