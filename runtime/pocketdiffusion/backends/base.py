"""The seam between this package and an inference engine: two protocols and a value type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pocketdiffusion.tensors import AnyArray, TensorSpec


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What belongs to the machine and not to the model."""

    threads: int | None = None
    """Compute threads; None leaves the engine its own choice (the physical cores)."""
    precision: str = "float32"
    """The arithmetic asked for: "float32", "bfloat16", "float16". An engine that can't give it says so."""


class Session(Protocol):
    """One opened graph."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    device: str
    """Where it really runs, e.g. "onnxruntime:cpu"."""
    precision: str
    """The arithmetic that is really used, e.g. "float32"."""

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """All outputs by name. The arrays are the caller's own."""
        ...

    def close(self) -> None:
        """Free the graph. Closing twice is allowed."""
        ...


class Backend(Protocol):
    """An engine. One file per engine; see `pocketdiffusion.backends.BACKENDS`."""

    name: str
    formats: tuple[str, ...]
    """Graph formats it opens: "onnx", "openvino", "coreml", "fake"."""

    def devices(self) -> list[str]:
        """Devices present, best first, e.g. ["cuda", "cpu"]. Cheap, never raises; [] when the engine is missing."""
        ...

    def open(self, graph: Path, device: str, options: SessionOptions) -> Session:
        """Open a graph on a device of `devices()`. Raises BackendUnavailable, DeviceNotAttached or GraphFailed."""
        ...

    def version(self) -> str:
        """The engine's version, or "" when it is missing."""
        ...
