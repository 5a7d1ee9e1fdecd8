"""Graphs that no engine on this system opens, read back from what was written: their weights, and what they compute.

That is Core ML anywhere but on macOS. A package's program is computed operation by operation in torch, which shows that
it is the source's function, and neither how fast nor with which rounding Core ML computes it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from pocketdiffusion.backends.base import Session
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.tensors import AnyArray

ENGINE = "read back in torch"
"""Stands in figures where an engine's name would."""
APPLE_DB = 35.0
SAMPLES = 4
"""Inputs of one graph that are computed."""


def needed(format: str) -> bool:
    """Whether no engine on this system can open a graph format, whatever is installed."""
    return format == "coreml" and sys.platform != "darwin"


def open_session(graph: Path) -> Session:
    """A graph to run. Raises ExportError for one that can't be read back."""
    from pocketdiffusion_export.targets.coreml_check import open_package

    return open_package(graph)


def keep_weights(model: onnx.ModelProto, folder: Path) -> dict[str, AnyArray]:
    """A model's weights before they are quantized, in a nameless file of `folder`'s disk and not in memory."""
    tensors = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # the maps keep it
    places = {}
    for tensor in tensors:
        array = numpy_helper.to_array(tensor)
        places[tensor.name] = (stream.tell(), array.dtype, array.shape)
        stream.write(np.ascontiguousarray(array).data)
    stream.flush()
    return {name: np.memmap(stream, kind, "r", offset, shape) for name, (offset, kind, shape) in places.items()}


def compare(graph: Path, entry: ComponentEntry, source: Mapping[str, AnyArray]) -> dict[str, float]:
    """SQNR in dB of each weight of a graph against the source's, once it has the form that its manifest entry says.

    Raises ExportError where it has not.
    """
    from pocketdiffusion_export.targets.coreml_check import check_form, compare_weights

    check_form(graph, entry)
    return compare_weights(graph, source)


def floor(weights: str, demanded: float) -> float:
    """What macOS must reach. Core ML's own float16 arithmetic was not seen here; Apple's converter asks for 35 dB."""
    return demanded if weights == "float32" else min(demanded, APPLE_DB)


def remarks(engines: tuple[str, ...], weights: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """What people must know of figures that no engine gave."""
    if ENGINE not in engines:
        return ()
    figures = [figure for component in weights.values() for figure in component.values()]
    return (
        "Not run: Core ML runs on macOS only. Checked: structure, inputs and outputs; every weight as read back from "
        f"the packages against the source's (worst {min(figures):.1f} dB, median {float(np.median(figures)):.1f} dB, "
        "all in weights.json); and the programs, computed in torch from the packages, against the source. "
        "`pocketdiffusion verify` on macOS runs them.",
    )
