"""What one graph is opened with and fed, and what that was found to cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketdiffusion.backends import load
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.cache import processor
from pocketdiffusion.bundle.manifest import BandGraph, ComponentEntry, GraphPart
from pocketdiffusion.tensors import TensorSpec
from pocketdiffusion.tuning.shapes import Shape


@dataclass(frozen=True, slots=True)
class Subject:
    """One graph at one choice of everything that its cost depends on."""

    component: str
    graph: Path
    entry: ComponentEntry
    contents: str
    """What names the graph's exact contents: its bundle's digest and its place there."""
    backend: str
    device: str
    options: SessionOptions
    shapes: Mapping[str, Shape]
    """Of its inputs."""
    streamed: bool = False
    """Opened in parts."""
    bands: int | None = None
    """Rows of a band, if it runs in bands: then `options` are those of the pieces, and their identity the bundle's."""

    def key(self) -> dict[str, Any]:
        """All of that, the engine's version and the machine: what is remembered counts only where they are the same."""
        options = self.options
        return {
            "contents": self.contents,
            "component": self.component,
            "device": f"{self.backend}:{self.device}",
            "engine": f"{self.backend} {load(self.backend).version()}",
            "machine": machine(),
            "threads": options.threads,
            "precision": options.precision,
            "weights": options.weights,
            "cached": options.identity is not None,
            "streamed": self.streamed,
            "bands": self.bands,
            "shapes": {name: list(shape) for name, shape in sorted(self.shapes.items())},
        }

    def to_json(self) -> dict[str, Any]:
        """Every field by name, for a child process."""
        return {**asdict(self), "graph": str(self.graph)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Subject:
        """The value that `to_json` wrote. The entry's graphs for other sizes are left out."""
        entry = data["entry"]
        return cls(
            **{name: data[name] for name in ("component", "contents", "backend", "device", "streamed", "bands")},
            graph=Path(data["graph"]),
            entry=ComponentEntry(
                entry["format"],
                entry["graph"],
                _specs(entry["inputs"]),
                _specs(entry["outputs"]),
                entry["weights"],
                bands=tuple(
                    BandGraph(**{**band, "inputs": _specs(band["inputs"]), "outputs": _specs(band["outputs"])})
                    for band in entry["bands"]
                ),
                parts=tuple(
                    GraphPart(**{**part, "inputs": _specs(part["inputs"]), "outputs": _specs(part["outputs"])})
                    for part in entry["parts"]
                ),
            ),
            options=SessionOptions(**data["options"]),
            shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
        )

    def __str__(self) -> str:
        size = max(self.shapes.values(), key=len, default=())
        inputs = "x".join(map(str, size))
        weights = "" if self.options.weights == "fast" else f", {self.options.weights} weights"
        weights = ", in parts" if self.streamed else weights
        weights += "" if self.bands is None else f", in bands of {self.bands} rows"
        return f"{self.component} on {self.backend}:{self.device}, {self.options.precision}{weights}, {inputs}"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a graph adds to a process which has its engine loaded; without programs' code, but for `code`."""

    opening: int
    """Peak while it is opened."""
    open: int
    """Held then."""
    running: int
    """Peak while it runs."""
    ran: int
    """Held after a run: engines keep what they computed in."""
    left: int
    """Held after it is closed."""
    code: int
    """By how much the engine's code grew meanwhile, which all its graphs share."""

    @property
    def peak(self) -> int:
        """The largest of all, with the code."""
        return max(self.opening, self.running) + self.code


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a child process measured of a `Subject`. Times are in seconds."""

    loading: float
    """Importing the engine."""
    opening: float
    first: float
    """The first run, which pays for what an engine does once."""
    run: float
    """The median of the runs after the first; `first` where there was time for one only."""
    precision: str
    """The arithmetic really used, e.g. "int8"."""
    memory: Memory | None
    """None on systems other than Linux, which do not tell it as it grows."""
    sqnr_db: float | None = None
    """Against the bundle's golden outputs, the worst of them; None where it holds none."""
    kept: str | None = None
    """The file in the engine's cache that the graph was opened from."""

    def to_json(self) -> dict[str, Any]:
        """Every field by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Footprint:
        """The value that `to_json` wrote. Raises TypeError, ValueError or AttributeError for anything else."""
        memory = None if data["memory"] is None else Memory(**data["memory"])
        return cls(**{**data, "memory": memory})


def machine() -> str:
    """What figures depend on besides software: the processor's kind, and how many of its cores there are."""
    return f"{processor()} x{os.cpu_count()}"


def _specs(given: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(spec["dtype"], tuple(spec["shape"])) for name, spec in given.items()}
