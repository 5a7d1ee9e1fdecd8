"""Engines: which there are, which are here, and which one runs a graph.

A backend is one file and one line in `BACKENDS`; the file is imported on use, and the engine when it is needed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from pocketdiffusion.backends.base import Backend, SessionOptions, Weights
from pocketdiffusion.backends.roles import parse_devices, parse_precisions, role_value
from pocketdiffusion.errors import BackendUnavailable, InvalidRequest

__all__ = [
    "AUTO_ORDER",
    "BACKENDS",
    "Choice",
    "DeviceInfo",
    "SessionOptions",
    "available",
    "choose",
    "load",
    "parse_devices",
    "parse_precisions",
    "role_value",
]

BACKENDS: dict[str, str] = {
    "onnxruntime": "pocketdiffusion.backends.onnxruntime:OnnxRuntimeBackend",
    "openvino": "pocketdiffusion.backends.openvino:OpenVinoBackend",
    "coreml": "pocketdiffusion.backends.coreml:CoreMLBackend",
    "fake": "pocketdiffusion.backends.fake:FakeBackend",
}

# Dedicated GPUs come first, then what an operating system offers for any GPU, then the CPU. On the CPU ONNX Runtime
# goes before OpenVINO, because it starts faster; OpenVINO runs large graphs faster and is worth asking for. Left out:
# NPUs and Core ML by ONNX Runtime (static shapes, or graphs split into many parts), TensorRT (builds for minutes).
AUTO_ORDER: tuple[tuple[str, str, str], ...] = (
    ("onnxruntime", "cuda", "an NVIDIA GPU"),
    ("onnxruntime", "migraphx", "an AMD GPU"),
    ("onnxruntime", "rocm", "an AMD GPU"),
    ("coreml", "all", "Apple's GPU and Neural Engine"),
    ("onnxruntime", "directml", "a GPU by DirectX 12"),
    ("openvino", "gpu", "an Intel GPU"),
    ("onnxruntime", "cpu", "no GPU that an installed engine can use; starts fastest on a CPU"),
    ("openvino", "cpu", "no GPU that an installed engine can use"),
)

INSTALL = {
    "onnxruntime": "pip install 'pocketdiffusion[cpu]'",
    "cuda": "pip install 'pocketdiffusion[cuda]'",
    "directml": "pip install 'pocketdiffusion[directml]'",
    "openvino": "pip install 'pocketdiffusion[openvino]'",
    "coreml": "pip install 'pocketdiffusion[coreml]' (on macOS only)",
}


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device of one installed engine."""

    backend: str
    device: str
    version: str
    """The engine's version."""
    formats: tuple[str, ...]
    """Graph formats that it opens there."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a graph, and why."""

    backend: str
    device: str
    reason: str
    """For people, to stand after the choice: "an NVIDIA GPU"."""
    precision: str | None = None
    """The arithmetic that belongs to the choice; None leaves it open. So does `weights`."""
    weights: Weights | None = None

    def __str__(self) -> str:
        return f"{self.backend}:{self.device}"


@functools.cache
def load(name: str) -> Backend:
    """The backend of that name. Its engine need not be installed. Raises InvalidRequest for an unknown name."""
    if name not in BACKENDS:
        raise InvalidRequest("device", f"unknown backend '{name}'; choose from {', '.join(_engines())}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend


def available() -> list[DeviceInfo]:
    """Every device of every installed engine, best first for each engine; without the fake backend."""
    return [
        DeviceInfo(name, device, load(name).version(), load(name).formats)
        for name in _engines()
        for device in load(name).devices()
    ]


def choose(format: str, device: str = "auto", *, component: str | None = None) -> Choice:
    """What runs a graph of that format.

    `device` is "auto" (the first of `AUTO_ORDER` that is here and opens the format), "backend:device", "backend" (its
    best device) or "device" (the first backend in `BACKENDS` that has it). `component` is named in messages.
    Raises BackendUnavailable (nothing here does it) and InvalidRequest (no such backend).
    """
    if device == "auto":
        return _automatic(format, component)
    first, colon, rest = device.lower().partition(":")
    if first in BACKENDS:
        return _from_backend(format, first, rest, component)
    if colon:
        raise InvalidRequest("device", f"unknown backend '{first}'; choose from {', '.join(_engines())}")
    for backend, found in _openers(format):
        if _has(found, first):
            return Choice(backend, first, f"the first engine here that has '{first}'")
    raise _unavailable(format, device, component)


def _automatic(format: str, component: str | None) -> Choice:
    for backend, device, why in AUTO_ORDER:
        if format in load(backend).formats and _has(load(backend).devices(), device):
            return Choice(backend, device, why)
    raise _unavailable(format, "auto", component)


def _from_backend(format: str, backend: str, device: str, component: str | None) -> Choice:
    engine = load(backend)
    if format not in engine.formats:
        raise BackendUnavailable(
            f"{_graph(format, component)} can't be opened by {backend}, which takes {', '.join(engine.formats)}; "
            f"choose from {', '.join(_here(format)) or 'none here: ' + _install(format)}"
        )
    found = engine.devices()
    if not found or not _has(found, device or found[0]):
        raise _unavailable(format, f"{backend}:{device}" if device else backend, component)
    return Choice(backend, device or found[0], "asked for" if device else f"the best device of {backend}")


def _unavailable(format: str, device: str, component: str | None) -> BackendUnavailable:
    here = ", ".join(_here(format)) or "none"
    asked = "no engine is installed" if device == "auto" and here == "none" else f"device '{device}' is not here"
    return BackendUnavailable(
        f"{_graph(format, component)}: {asked}; present for this format: {here}; to add an engine: {_install(format)}"
    )


def _graph(format: str, component: str | None) -> str:
    return f"{component or 'a graph'} ({format})"


def _install(format: str) -> str:
    """Commands for the engines that open a format; all of them for a format that none opens."""
    names = {name for name in _engines() if format in load(name).formats}
    extras = {"cuda", "directml"} if "onnxruntime" in names else set()
    return ", or ".join(command for name, command in INSTALL.items() if not names or name in names | extras)


def _here(format: str) -> list[str]:
    return [f"{backend}:{device}" for backend, found in _openers(format) for device in found]


def _openers(format: str) -> Iterator[tuple[str, list[str]]]:
    """Engines that open a format, with their devices."""
    return ((name, load(name).devices()) for name in _engines() if format in load(name).formats)


def _engines() -> list[str]:
    """Backends that a person may be offered."""
    return [name for name in BACKENDS if name != "fake"]


def _has(found: list[str], device: str) -> bool:
    """Whether a device is there, or a numbered one of its kind: "gpu" for "gpu.0"."""
    return any(name == device or name.startswith(f"{device}.") for name in found)
