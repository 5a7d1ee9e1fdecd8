"""The seam between this package and an inference engine: two protocols and a value type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.tensors import AnyArray, TensorSpec

Weights = Literal["fast", "compact"]

PRECISIONS = ("float32", "bfloat16", "float16")
"""The arithmetic that can be asked for, the usual one first."""
MOST_THREADS = 1024
"""Engines start as many as they are told, whatever it costs."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What belongs to the machine and not to the model."""

    threads: int | None = None
    """Compute threads, 1 to `MOST_THREADS`; None leaves the engine its own choice (the physical cores)."""
    precision: str = "float32"
    """The arithmetic asked for, of `PRECISIONS`. An engine that can't give it says so."""
    weights: Weights = "fast"
    """Of graphs with int8 or float16 weights and float32 arithmetic: "fast" turns weights into float32 once, at
    opening; "compact" keeps them in memory as they are stored and does it in every run, as `streaming` always has it.
    The answers differ by rounding.
    """
    identity: str | None = None
    """What names the graph's exact contents. An engine may keep what it makes of the graph under it, for the next
    opening; None: nothing vouches for the contents, or nothing shall be kept."""
    shapes: Mapping[str, tuple[int, ...]] | None = None
    """Input -> shape of the calls to come, of one row each. An engine that `fixes_shapes` fixes the graph's free axes
    to them, and `Session.inputs` tells."""
    passing: bool = False
    """The graph is closed after a run or few: the engine shall not hold memory for runs to come."""

    def __post_init__(self) -> None:
        if self.threads is not None and (type(self.threads) is not int or not 1 <= self.threads <= MOST_THREADS):
            raise InvalidRequest(
                "threads",
                f"threads is {self.threads!r}; give a whole number from 1 to {MOST_THREADS}, or leave it to the engine",
            )


class Session(Protocol):
    """One opened graph."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    device: str
    """Where it really runs, e.g. "onnxruntime:cpu"."""
    precision: str
    """The arithmetic that is really used, e.g. "float32"."""
    cached: bool
    """Whether the engine took what it had made of the graph from its cache."""
    kept: Path | None
    """The file in that cache with what the engine made of the graph; None where it keeps nothing."""

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

    def fixes_shapes(self, device: str) -> bool:
        """Whether graphs are faster there when they are opened for one shape of calls; see `SessionOptions.shapes`."""
        ...

    def precisions(self, device: str) -> tuple[str, ...]:
        """The arithmetic that may be asked for on a device of `devices()`, "float32" first. It may not fit a graph."""
        ...

    def open(self, graph: Path, device: str, options: SessionOptions) -> Session:
        """Open a graph on a device of `devices()`. Raises BackendUnavailable, DeviceNotAttached or GraphFailed."""
        ...

    def version(self) -> str:
        """The engine's version, or "" when it is missing."""
        ...
