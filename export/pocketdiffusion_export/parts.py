"""Graphs cut into parts that read the same weights, and the proof that the parts compute what the whole does.

Parts are graphs beside the whole one, of some hundred KB together; see `pocketdiffusion.backends.streaming` for what
runs them. They can be made while a model is exported, or later from a bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from pocketdiffusion import backends
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.streaming import open_parts
from pocketdiffusion.bundle import Bundle, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import ComponentEntry, GraphPart, version_needed
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export import verify
from pocketdiffusion_export.component import Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.plan import part_bytes
from pocketdiffusion_export.registry import lookup
from pocketdiffusion_export.targets import CUTTERS
from pocketdiffusion_export.write import assembled

MIN_DB = 60.0
"""SQNR of the parts against the whole where a bundle demands none of the whole against its source."""
MB = 1_000_000

Say = Callable[[str], None]


def cut_component(
    folder: Path,
    entry: ComponentEntry,
    limit: int,
    samples: Mapping[str, Sequence[Feeds]],
    engines: Sequence[str],
) -> tuple[ComponentEntry, tuple[str, ...]]:
    """A component's entry with parts of at most `limit` bytes, and what was found, for people.

    `folder` is the bundle, `samples` are inputs by graph file. A component of smaller weights stays whole. Raises
    ExportError where parts are not as near to the whole as that must be to its source. That is not to the last bit:
    OpenVINO rounds 8-bit activations in other places where layers are cut apart.
    """
    notes, parts = [], dict[str, tuple[GraphPart, ...]]()
    for graph in entry.graphs:
        parts[graph.graph] = lookup(CUTTERS, "format to cut", entry.format)(folder / graph.graph, limit)
        if made := parts[graph.graph]:
            nearest = {engine: _sqnr(folder, replace(graph, parts=made), engine, samples) for engine in engines}
            figures = ", ".join(f"{db:.0f} dB SQNR on {engine}" for engine, db in nearest.items())
            if min(nearest.values()) < (entry.min_sqnr_db or MIN_DB):
                raise ExportError(f"the parts of {graph.graph} differ from the whole: {figures}; export it uncut")
            largest = max(part.weight_bytes for part in made) / MB
            notes.append(
                f"{graph.graph} once more in {len(made)} parts of at most {largest:.0f} MB; equal to {figures}"
            )
    sizes = tuple(replace(sized, parts=parts[sized.graph]) for sized in entry.sizes)
    return replace(entry, parts=parts[entry.graph], sizes=sizes), tuple(notes)


def cut_bundle(source: Path, destination: Path, part_size: int, say: Say) -> tuple[str, ...]:
    """Write a copy of a bundle with parts of at most `part_size` megabytes of weights. Returns what was found, for
    people. Raises BundleError, ExportError; then nothing was written or replaced.
    """
    say(f"checking {source}")
    bundle = open_own(source, destination)
    limit = part_bytes(part_size, {entry.format for entry in bundle.manifest.components.values()})
    with assembled(destination) as folder:
        old = {part.graph for entry in bundle.manifest.components.values() for g in entry.graphs for part in g.parts}
        copy_files(bundle, folder, without=old)
        return _cut_copy(bundle, folder, limit, say)


def open_own(source: Path, destination: Path) -> Bundle:
    """A bundle to change a copy of. Raises BundleError, and ExportError for another exporter's folder."""
    if destination.resolve() == source.resolve():
        raise ExportError(f"the destination {destination} is the bundle that is changed; choose another folder")
    bundle = Bundle.open(source)
    if not bundle.hashed:
        raise ExportError(f"{source} is no bundle of pocketdiffusion; export its source instead")
    return bundle


def copy_files(bundle: Bundle, folder: Path, without: Container[str] = ()) -> None:
    """Copy a bundle's files, but for its manifest and those `without`, to a folder."""
    for file in bundle.manifest.files:
        if file.path not in without:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / file.path, folder / file.path)


def _cut_copy(bundle: Bundle, folder: Path, limit: int, say: Say) -> tuple[str, ...]:
    """Cut the graphs of a bundle that was copied to `folder`, and write its manifest."""
    manifest, entries, notes = bundle.manifest, dict[str, ComponentEntry](), list[str]()
    golden = {} if manifest.golden is None else load_file(folder / manifest.golden)
    for name, entry in manifest.components.items():
        say(f"cutting {name}")
        samples = {graph.graph: [_sample(name, graph, golden)] for graph in entry.graphs}
        entries[name], made = cut_component(folder, entry, limit, samples, verify.engines(entry.format))
        notes += made
    append_readme(folder, manifest.name, notes)
    version = version_needed(entries, manifest.changes)
    write_manifest(folder, replace(manifest, components=entries, files=file_entries(folder), format_version=version))
    return tuple(notes)


def append_readme(folder: Path, name: str, paragraphs: Sequence[str]) -> None:
    """Add to the README.md of a bundle of that name."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else f"# {name}\n"
    readme.write_text(text + "".join(f"\n{each}\n" for each in paragraphs), encoding="utf-8", newline="\n")


def _sample(name: str, graph: ComponentEntry, golden: Mapping[str, AnyArray]) -> Feeds:
    """The golden inputs of a component, in the lengths that a graph is fixed to."""
    feeds = {}
    for key, spec in graph.inputs.items():
        given = golden.get(f"{name}/in/{key}")
        if given is None:
            raise ExportError(f"the bundle has no golden input '{key}' of {name} to check parts with; export it again")
        axes = [axis if isinstance(axis, int) else length for axis, length in zip(spec.shape, given.shape, strict=True)]
        feeds[key] = np.resize(given, axes)
    return feeds


def _sqnr(folder: Path, graph: ComponentEntry, engine: str, samples: Mapping[str, Sequence[Feeds]]) -> float:
    """Of the parts' worst output against the whole's, in dB."""
    backend = backends.load(engine)
    whole = backend.open(folder / graph.graph, "cpu", SessionOptions(weights="compact"))
    expected = [whole.run(feeds) for feeds in samples[graph.graph]]
    whole.close()
    session = open_parts(backend, folder, graph, "cpu", SessionOptions())
    found = [session.run(feeds) for feeds in samples[graph.graph]]
    session.close()
    return min(verify.compare([e[n] for e in expected], [f[n] for f in found]).sqnr_db for n in graph.outputs)
