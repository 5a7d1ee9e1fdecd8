"""ONNX Runtime: opens ONNX graphs on every execution provider that the installed build has.

A graph that stores weights as int8 and computes in float (DequantizeLinear in front of each layer, no QuantizeLinear)
is dequantized once, at load: ONNX Runtime would otherwise do it in every run and quantize MatMul's activations too,
which changes the answer. The price is memory: the weights are held as float32. Opened compact, they stay int8 and each
run dequantizes them, one layer after the other, still for float arithmetic; of the embedded model's denoiser the peak
is 153 MB then and not 232, the time 8 % more. That takes files whose DequantizeLinear nodes stand first, as export
writes them: ONNX Runtime goes by their place, and would otherwise dequantize all layers before it computes one.
A graph that quantizes activations keeps its QDQ nodes, from which ONNX Runtime builds integer kernels; weight-only
layers inside such a graph stay dequantized in every run.

Nothing is kept on disk: ONNX Runtime 1.31 opens what it optimized before little faster (0.41 against 0.53 s of the
processor's time for that denoiser), and its file holds int8 weights as float32, four times the size.

Limits: computes in the graph's own types (TensorRT can be asked for float16).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from pathlib import Path
from typing import Any

from pocketdiffusion import _telemetry
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.session import EngineSession, Execute, label, reason, require_device
from pocketdiffusion.errors import BackendUnavailable, DeviceNotAttached, GraphFailed
from pocketdiffusion.tensors import AnyArray, TensorSpec

PROVIDERS = {  # best first
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "directml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "acl": "ACLExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
    "cann": "CANNExecutionProvider",
}
NVIDIA = frozenset({"cuda", "tensorrt", "tensorrt-rtx"})

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}

_QUANTIZE_LINEAR = b"\x22\x0eQuantizeLinear"
"""NodeProto.op_type (field 4, 14 bytes) as it stands in an ONNX file."""


class OnnxRuntimeBackend:
    """Devices are named after execution providers: see `PROVIDERS`."""

    name = "onnxruntime"
    formats: tuple[str, ...] = ("onnx",)

    def devices(self) -> list[str]:
        """The providers of this build whose hardware is here, best first; [] when onnxruntime is missing or broken."""
        try:
            built_in = engine().get_available_providers()
        except BackendUnavailable:
            return []
        return [
            device
            for device, provider in PROVIDERS.items()
            if provider in built_in and (device not in NVIDIA or _nvidia_present())
        ]

    def precisions(self, device: str) -> tuple[str, ...]:
        """A graph has its own precision, which "float32" takes; TensorRT may be asked for float16."""
        return ("float32", "float16") if device == "tensorrt" else ("float32",)

    def version(self) -> str:
        """For example "1.31.1"; "" when onnxruntime is missing."""
        try:
            return str(engine().__version__)
        except BackendUnavailable:
            return ""

    def fixes_shapes(self, device: str) -> bool:
        """Never."""
        return False

    def open(self, graph: Path, device: str, options: SessionOptions) -> EngineSession:
        """Load and optimise a graph. Raises BackendUnavailable, DeviceNotAttached or GraphFailed."""
        require_device(self.name, device, self.devices())
        ort = engine()
        if device in NVIDIA and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds CUDA and cuDNN that came as pip packages
        try:
            integer = quantizes_activations(graph)
            session = open_session(graph, device, options, session_options(device, options, integer=integer))
        except Exception as error:  # pybind classes that share no base but Exception
            raise GraphFailed(f"{label(graph)} could not be opened on onnxruntime:{device}: {reason(error)}") from error
        attached = session.get_providers()
        if attached[0] != PROVIDERS[device]:
            raise DeviceNotAttached(
                f"{label(graph)}: asked for onnxruntime:{device}, but {PROVIDERS[device]} did not attach (got "
                f"{', '.join(attached)}); check its driver and libraries, or choose another, e.g. onnxruntime:cpu"
            )
        inputs = {node.name: _spec(graph, node) for node in session.get_inputs()}
        outputs = {node.name: _spec(graph, node) for node in session.get_outputs()}
        return EngineSession(
            graph,
            inputs=inputs,
            outputs=outputs,
            device=f"onnxruntime:{device}",
            precision=_precision(graph, device, options, integer, [*inputs.values(), *outputs.values()]),
            execute=_executor(session, list(outputs)),
        )


@functools.cache
def engine() -> Any:
    """The library. Raises BackendUnavailable."""
    _telemetry.disable()
    try:
        import onnxruntime
    except Exception as error:  # a broken installation fails in many ways
        raise BackendUnavailable(
            f"onnxruntime could not be imported ({reason(error)}); pip install 'pocketdiffusion[cpu]'"
        ) from error
    onnxruntime.disable_telemetry_events()  # builds that use Windows tracing ignore the environment variable
    return onnxruntime


@functools.cache
def _nvidia_present() -> bool:
    """Whether the driver sees a GPU: builds for CUDA list their providers on any machine."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def quantizes_activations(graph: Path) -> bool:
    """Whether a QuantizeLinear node stands in the file, by its bytes: parsing would cost more than opening."""
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_QUANTIZE_LINEAR) >= 0


def session_options(device: str, options: SessionOptions, *, integer: bool) -> Any:
    """What a graph is opened with; `integer`: whether it quantizes activations."""
    ort = engine()
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 4  # what goes wrong arrives as an exception
    settings.intra_op_num_threads = options.threads or 0
    # Workers wait actively within a run, which is faster, and go to sleep when it ends.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if not integer:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if device in ("cpu", "directml"):
        # DirectML's documentation asks for it. On a CPU the pattern of one run is allocated beside the arena that the
        # run grew: the embedded model's denoiser took 301 MB with it and 234 MB without, in the same time.
        settings.enable_mem_pattern = False
    settings.enable_cpu_mem_arena = not options.passing
    if device == "directml":
        settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    return settings


def open_session(graph: Path, device: str, options: SessionOptions, settings: Any) -> Any:
    """The engine's session. Raises the engine's own exceptions."""
    compact = options.weights == "compact"
    return engine().InferenceSession(
        str(graph),
        settings,
        providers=_providers(device, options),
        enable_fallback=0,  # otherwise a failing provider is replaced by another with a print
        disabled_optimizers=["ConstantFolding"] if compact else None,
    )


def _providers(device: str, options: SessionOptions) -> list[tuple[str, dict[str, str]]]:
    """The asked provider, and the CPU for the nodes that it does not have."""
    settings: dict[str, str] = {}
    if device == "cuda":
        settings = {"use_tf32": "0"}  # on by default; its 10-bit mantissa is not float32
    elif device == "tensorrt":
        settings = {"trt_fp16_enable": "1" if options.precision == "float16" else "0"}
    elif device == "xnnpack" and options.threads is not None:
        settings = {"intra_op_num_threads": str(options.threads)}
    asked = [(PROVIDERS[device], settings)]
    return asked if device == "cpu" else [*asked, (PROVIDERS["cpu"], {})]


def _precision(graph: Path, device: str, options: SessionOptions, integer: bool, specs: list[TensorSpec]) -> str:
    """What the graph computes in. "float32" is what is asked for by default and takes any graph."""
    if device == "tensorrt" and options.precision == "float16":
        return "float16"
    own = "float16" if any(spec.dtype == "float16" for spec in specs) else "float32"
    if options.precision not in ("float32", own):
        raise GraphFailed(
            f"{label(graph)}: asked for {options.precision}, but onnxruntime:{device} computes in the graph's own "
            f"{own}; export the bundle in {options.precision}, or use openvino"
        )
    return "int8" if integer else own


def _spec(graph: Path, node: Any) -> TensorSpec:
    if node.type not in DTYPES:
        raise GraphFailed(f"{label(graph)}: '{node.name}' is a {node.type}; allowed: {', '.join(DTYPES)}")
    return TensorSpec(DTYPES[node.type], tuple(node.shape))


def _executor(session: Any, names: list[str]) -> Execute:
    def execute(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return execute
