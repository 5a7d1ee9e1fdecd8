"""What the sessions of all engines have in common: checked feeds, one-line errors, closing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from pocketdiffusion.backends.feeds import check_feeds
from pocketdiffusion.errors import BackendUnavailable, GraphFailed
from pocketdiffusion.tensors import AnyArray, TensorSpec

Execute = Callable[[dict[str, AnyArray]], dict[str, AnyArray]]
"""Runs an engine: checked feeds in, arrays that nobody else writes to out."""


class EngineSession:
    """A `Session` around one function, which holds the engine's objects; closing drops it and them.

    `run` may be called from several threads as far as the engine allows it.
    """

    def __init__(
        self,
        graph: Path,
        *,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        device: str,
        precision: str,
        execute: Execute,
        cached: bool = False,
        kept: Path | None = None,
    ) -> None:
        self.inputs, self.outputs, self.device, self.precision = inputs, outputs, device, precision
        self.cached, self.kept = cached, kept
        self._label = label(graph)
        self._execute: Execute | None = execute

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """All outputs by name. Raises GraphFailed for wrong feeds, an engine's error, and a closed session."""
        execute = self._execute
        if execute is None:
            raise GraphFailed(f"{self._label}: the session is closed; open the graph again")
        checked = check_feeds(self._label, feeds, self.inputs)
        try:
            return execute(checked)
        except Exception as error:  # engines raise classes of their own, straight from C++
            raise GraphFailed(f"{self._label} failed on {self.device}: {reason(error)}") from error

    def close(self) -> None:
        """Free the graph. Closing twice is allowed."""
        self._execute = None


def label(graph: Path) -> str:
    """A graph's name in messages: its file and folder, because most files are called model.onnx."""
    return f"{graph.parent.name}/{graph.name}"


def reason(error: BaseException) -> str:
    """An engine's message in one line of at most 400 characters, without the places in its source."""
    text = re.sub(r"Exception from \S+:\d+:|failed at \S+:\d+:", " ", str(error))
    return " ".join(text.split())[:400] or type(error).__name__


def require_device(backend: str, device: str, present: list[str]) -> None:
    """Raise BackendUnavailable unless `device` is one of `present`, or names a group of them ("gpu" for "gpu.0")."""
    if not any(device == name or name.startswith(f"{device}.") for name in present):
        found = ", ".join(f"{backend}:{name}" for name in present) or "no device, or the engine is not installed"
        raise BackendUnavailable(f"{backend}:{device} is not here; present: {found}")
