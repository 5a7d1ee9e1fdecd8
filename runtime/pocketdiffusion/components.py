"""All graphs of a bundle, each with the device that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from pocketdiffusion.backends import Choice, choose, load, parse_devices, role_value
from pocketdiffusion.backends.base import SessionOptions, Weights
from pocketdiffusion.backends.probe import Trial, probe
from pocketdiffusion.backends.roles import role_of
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.integrity import Records, marks
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.bundle.paths import cache_dir
from pocketdiffusion.component import Component, Residency
from pocketdiffusion.errors import BackendUnavailable, InvalidRequest


def choose_devices(bundle: Bundle, device: str | Mapping[str, str]) -> dict[str, Choice]:
    """The engine and device of each component. Raises InvalidRequest and BackendUnavailable."""
    roles = parse_devices(device)
    return {
        name: choose(entry.format, role_value(roles, name), component=name)
        for name, entry in bundle.manifest.components.items()
    }


def open_components(
    bundle: Bundle,
    choices: Mapping[str, Choice],
    options: SessionOptions,
    residency: Residency,
    *,
    cache: bool = True,
    precisions: Mapping[str, str] | None = None,
) -> dict[str, Component]:
    """A `Component` for each graph; nothing is opened yet. `precisions`, by role, go before that of `options`.

    Graphs of another exporter's folder are tried in a child process once for each engine and device, which is
    remembered as long as no file changes. `cache`: engines may keep what they compile, unless nothing vouches for the
    bundle's contents. Raises InvalidRequest, BackendError.
    """
    for field, value, allowed in (
        ("residency", residency, get_args(Residency)),
        ("weights", options.weights, get_args(Weights)),
    ):
        if value not in allowed:
            raise InvalidRequest(field, f"{field} is {value!r}; choose one of: {', '.join(allowed)}")
    if residency == "stream":
        _require_parts(bundle)
    for name, choice in choices.items():
        if choice.backend == "openvino" and bundle.manifest.components[name].format == "onnx":
            _refuse_linked_weights(bundle, name)
    each = dict.fromkeys(choices, options)
    if precisions is not None:
        each = {name: replace(options, precision=role_value(precisions, name)) for name in choices}
    if not bundle.hashed:
        _try_once(bundle, choices, each)
    digest = bundle.digest if cache and bundle.hashed else None
    return {
        name: _component(bundle, name, choice, replace(each[name], identity=digest), residency)
        for name, choice in choices.items()
    }


def _component(bundle: Bundle, name: str, choice: Choice, options: SessionOptions, residency: Residency) -> Component:
    entry, backend = bundle.manifest.components[name], load(choice.backend)
    options = replace(
        options, precision=choice.precision or options.precision, weights=choice.weights or options.weights
    )

    def make(
        graph: ComponentEntry,
        sizes: Mapping[tuple[int, int], Component] | None = None,
        bands: Sequence[Component] = (),
    ) -> Component:
        return Component(
            name,
            bundle.path / graph.graph,
            graph,
            backend=backend,
            device=choice.device,
            options=replace(options, identity=options.identity and f"{options.identity} {graph.graph}"),
            residency=residency,
            sizes=sizes,
            bands=bands,
        )

    first, *others = entry.graphs
    sizes = {(s.width, s.height): make(graph) for s, graph in zip(entry.sizes, others, strict=True)}
    return make(replace(first, bands=entry.bands), sizes=sizes, bands=pieces(name, entry, bundle.path, choice, options))


def pieces(name: str, entry: ComponentEntry, folder: Path, choice: Choice, options: SessionOptions) -> list[Component]:
    """A component for each of `entry.bands`, whose graphs lie below `folder`. `options.identity` is the bundle's."""
    return [
        Component(
            name,
            folder / piece.graph,
            piece,
            backend=load(choice.backend),
            device=choice.device,
            options=replace(options, identity=options.identity and f"{options.identity} {piece.graph}", passing=True),
            residency="release",
        )
        for piece in entry.pieces
    ]


def _require_parts(bundle: Bundle) -> None:
    """Raise InvalidRequest where there is no denoiser in parts; other components are small, and may be whole."""
    entries = bundle.manifest.components
    if not any(entry.parts for name, entry in entries.items() if role_of(name) == "denoiser"):
        raise InvalidRequest(
            "residency",
            f"residency is 'stream', but {bundle.manifest.name} has no denoiser in parts; export it with "
            "--part-size 64, or choose release",
        )


def _refuse_linked_weights(bundle: Bundle, name: str) -> None:
    """OpenVINO 2026.4 opens an ONNX file through a link but not the weights beside it: a hub's cache has both."""
    graph = bundle.graph(name)
    for path in (bundle.path / entry.path for entry in bundle.manifest.files if not entry.path.endswith(".json")):
        if path != graph and path.parent == graph.parent and path.resolve().parent != graph.parent:
            raise BackendUnavailable(
                f"{name} (onnx): openvino does not read weights through a link, and {path.name} is one; "
                f"choose onnxruntime:cpu, or make a copy without links: cp -rL {bundle.path} DEST"
            )


def _try_once(bundle: Bundle, choices: Mapping[str, Choice], options: Mapping[str, SessionOptions]) -> None:
    trials = [
        Trial(bundle.graph(name), choice.backend, choice.device, options[name]) for name, choice in choices.items()
    ]
    engines = sorted({f"{choice} {load(choice.backend).version()}" for choice in choices.values()})
    graphs = [f"{trial.graph} {trial.options.precision} {trial.options.weights}" for trial in trials]
    key = f"tried {bundle.digest} {', '.join(engines)} {graphs}"
    records, found = Records(cache_dir()), marks(bundle.path, bundle.manifest.files)
    if not records.holds(bundle.path, key, found):
        probe(trials)
        records.add(bundle.path, key, found)


def describe_choices(choices: Mapping[str, Choice]) -> list[str]:
    """One line for each device in use: which components it runs and why."""
    lines: dict[str, list[str]] = {}
    for name, choice in choices.items():
        lines.setdefault(f"{choice} ({choice.reason})", []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]
