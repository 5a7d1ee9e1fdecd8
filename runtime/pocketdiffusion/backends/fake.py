"""Graphs from Python functions, for tests and examples: no engine, no files.

Nothing is read from disk: `FakeBackend.open` looks a graph up by the name of its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.session import EngineSession, label, require_device
from pocketdiffusion.errors import GraphFailed
from pocketdiffusion.tensors import AnyArray, TensorSpec


@dataclass(frozen=True, slots=True)
class FakeGraph:
    """One graph. Outputs are cast to the declared types."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    function: Callable[[dict[str, AnyArray]], Mapping[str, AnyArray]]
    """Checked feeds to outputs; what it raises becomes GraphFailed."""
    nan_from_run: int | None = None
    """From this run on (counted from 0, over all sessions) the first value of every float output is NaN."""
    fail_at_open: str | None = None
    """Message of the GraphFailed that opening raises."""


@dataclass(slots=True)
class FakeBackend:
    """A `Backend` whose graphs are named by their file, ``"unet/model.onnx"`` or ``"model.onnx"``."""

    graphs: Mapping[str, FakeGraph] = field(default_factory=dict)
    name: str = "fake"
    formats: tuple[str, ...] = ("fake",)
    fixes: bool = False
    """Whether graphs are opened for one shape of calls."""
    opened: list[str] = field(default_factory=list)
    """Names of the graphs in the order they were opened."""
    runs: list[tuple[str, dict[str, AnyArray]]] = field(default_factory=list)
    """Graph name and checked feeds of each run."""
    closed: list[str] = field(default_factory=list)
    """Names of the graphs in the order they were closed."""

    def devices(self) -> list[str]:
        """Always ["cpu"]."""
        return ["cpu"]

    def precisions(self, device: str) -> tuple[str, ...]:
        """Only "float32" has a meaning; any is taken."""
        return ("float32",)

    def version(self) -> str:
        """Always "1"."""
        return "1"

    def fixes_shapes(self, device: str) -> bool:
        """As `fixes` says."""
        return self.fixes

    def open(self, graph: Path, device: str, options: SessionOptions) -> EngineSession:
        """A session of the graph with that file name. Raises BackendUnavailable or GraphFailed."""
        require_device(self.name, device, self.devices())
        name = label(graph) if label(graph) in self.graphs else graph.name
        if name not in self.graphs:
            raise GraphFailed(f"{label(graph)}: no such fake graph; choose from {', '.join(self.graphs) or 'none'}")
        fake = self.graphs[name]
        if fake.fail_at_open is not None:
            raise GraphFailed(f"{label(graph)}: {fake.fail_at_open}")
        self.opened.append(name)
        return _FakeSession(
            graph,
            inputs=_fixed(fake.inputs, options.shapes or {}),
            outputs=fake.outputs,
            device=f"{self.name}:{device}",
            precision=options.precision,
            execute=lambda feeds: self._run(name, fake, feeds),
            on_close=lambda: self.closed.append(name),
        )

    def _run(self, name: str, fake: FakeGraph, feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
        done = sum(1 for graph, _ in self.runs if graph == name)
        self.runs.append((name, {key: array.copy() for key, array in feeds.items()}))
        results = fake.function(feeds)
        outputs = {key: np.array(results[key], spec.dtype) for key, spec in fake.outputs.items()}
        if fake.nan_from_run is not None and done >= fake.nan_from_run:
            for array in outputs.values():
                if array.dtype.kind == "f":
                    array.flat[0] = np.nan
        return outputs


def _fixed(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(spec.dtype, shapes.get(name, spec.shape)) for name, spec in specs.items()}


class _FakeSession(EngineSession):
    def __init__(
        self,
        graph: Path,
        *,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        device: str,
        precision: str,
        execute: Callable[[dict[str, AnyArray]], dict[str, AnyArray]],
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(graph, inputs=inputs, outputs=outputs, device=device, precision=precision, execute=execute)
        self._on_close = on_close

    def close(self) -> None:
        if self._execute is not None:
            self._on_close()
        super().close()
