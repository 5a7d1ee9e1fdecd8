"""A package against its manifest entry and its source, without Core ML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pocketdiffusion.backends.apple import chained, chunks, translated
from pocketdiffusion.backends.coreml import package_description
from pocketdiffusion.backends.session import EngineSession
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.quant.weights import sqnr_db
from pocketdiffusion_export.targets.coreml_program import Program
from pocketdiffusion_export.targets.coreml_weights import LINEAR

SPECIFICATION = 7
"""Core ML's version of iOS 16 and macOS 13."""


def open_package(graph: Path) -> EngineSession:
    """A package as a session that computes in torch, with the names and rows that the runtime gives it."""
    programs = [Program(place) for place in chunks(graph)]
    found = [(*package_description(program.spec), program.run) for program in programs]
    inputs, outputs, precision, execute = chained(found)
    inputs, outputs, execute = translated(inputs, outputs, execute)
    return EngineSession(graph, inputs=inputs, outputs=outputs, device="torch", precision=precision, execute=execute)


def check_form(graph: Path, entry: ComponentEntry) -> None:
    """Raise ExportError unless a package, and its second chunk, hold ML programs of the right version and form."""
    for place in chunks(graph):
        spec = Program(place).spec
        kind, version = spec.WhichOneof("Type"), spec.specificationVersion
        if (kind, version) != ("mlProgram", SPECIFICATION):
            raise ExportError(
                f"{place.name} is a {kind} of version {version}, it should be an mlProgram of {SPECIFICATION}"
            )
    session = open_package(graph)
    if (dict(session.inputs), dict(session.outputs)) != (dict(entry.inputs), dict(entry.outputs)):
        raise ExportError(f"{graph.name} takes or gives something else than the manifest says")


def compare_weights(graph: Path, source: Mapping[str, AnyArray]) -> dict[str, float]:
    """Weight -> SQNR in dB. Raises ExportError for a weight of the program that is none of the source's."""
    names = {_identifier(name): name for name in source}
    found = {}
    weights = (weight for place in chunks(graph) for weight in Program(place).weights())
    for stored, values in weights:
        turned = stored.endswith(LINEAR)
        name = names.get(stored.removesuffix(LINEAR) if turned else stored)
        if name is None:
            continue  # a constant that the graph computed, such as a mask
        found[name] = sqnr_db(np.asarray(source[name]), (values.T if turned else values).astype(np.float32))
    return found


def _identifier(name: str) -> str:
    """A name as an ML program spells it."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter == "_") else "_" for letter in name)
    return f"_{plain}" if plain[0].isdigit() else plain
