"""Graphs in parts: what runs when, what is in memory, what goes wrong; on the fake engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketdiffusion.backends import Choice
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.backends.session import EngineSession
from pocketdiffusion.backends.streaming import StreamedSession, open_parts
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.manifest import ComponentEntry, GraphPart, version_needed
from pocketdiffusion.bundle.manifest_json import dump_manifest, parse_manifest
from pocketdiffusion.component import Component
from pocketdiffusion.components import open_components
from pocketdiffusion.errors import BundleCorrupt, GraphFailed, InvalidRequest, NonFinite
from pocketdiffusion.tensors import AnyArray, TensorSpec
from pocketdiffusion.timing import Timings

ROWS, ONE = TensorSpec("float32", ("batch", 3)), TensorSpec("float32", ())
WHOLE = Path("bundle/unet/model.fake")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def part(number: int, inputs: str, outputs: str) -> GraphPart:
    specs = {name: ONE if name == "t" else ROWS for name in inputs + outputs}
    return GraphPart(
        f"unet/part{number}.fake", {n: specs[n] for n in inputs}, {n: specs[n] for n in outputs}, weight_bytes=10
    )


PARTS = (part(1, "xt", "ab"), part(2, "at", "c"), part(3, "cb", "d"), part(4, "d", "y"))
"""`b` skips a part, `t` goes into two."""
ENTRY = ComponentEntry("fake", "unet/model.fake", {"x": ROWS, "t": ONE}, {"y": ROWS}, "float32", parts=PARTS)
FUNCTIONS: list[Callable[[dict[str, AnyArray]], dict[str, AnyArray]]] = [
    lambda f: {"a": f["x"] + f["t"], "b": f["x"] * 2},
    lambda f: {"c": f["a"] * f["t"]},
    lambda f: {"d": f["c"] - f["b"]},
    lambda f: {"y": f["d"] + 1},
]


def expected(x: AnyArray, t: float) -> AnyArray:
    return np.asarray((x + t) * t - 2 * x + 1)


@dataclass
class Watched(FakeBackend):
    """Counts open graphs, and waits before it opens one."""

    most: int = 0
    seconds: float = 0.0
    options: list[SessionOptions] = field(default_factory=list)

    def open(self, graph: Path, device: str, options: SessionOptions) -> EngineSession:
        time.sleep(self.seconds)
        self.options.append(options)
        session = super().open(graph, device, options)
        self.most = max(self.most, len(self.opened) - len(self.closed))
        return session


def engine(**change: Any) -> Watched:
    """`change` by number of the part: fields of its graph."""
    graphs = {p.graph: FakeGraph(p.inputs, p.outputs, function) for p, function in zip(PARTS, FUNCTIONS, strict=True)}
    for number, fields in change.items():
        name = f"unet/part{number[1:]}.fake"
        graphs[name] = replace(graphs[name], **fields)
    return Watched(graphs)


def stream(backend: Watched) -> StreamedSession:
    return open_parts(backend, Path("bundle"), ENTRY, "cpu", SessionOptions())


def test_the_parts_compute_the_whole() -> None:
    session = stream(engine())
    for rows in (1, 2, 5):
        x = np.resize(X, (rows, 3))
        np.testing.assert_array_equal(session.run({"x": x, "t": np.float32(3)})["y"], expected(x, 3))
    assert (session.device, session.precision, session.cached) == ("fake:cpu", "float32", False)


def test_at_most_two_parts_are_open() -> None:
    backend = engine()
    session = stream(backend)
    for _ in range(3):
        session.run({"x": X, "t": np.float32(1)})
    assert backend.most <= 2
    session.close()
    assert sorted(backend.opened) == sorted(backend.closed)


def test_the_next_part_is_opened_while_one_runs() -> None:
    def wait_for_next(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
        deadline = time.monotonic() + 60
        while PARTS[2].graph not in backend.opened and time.monotonic() < deadline:
            time.sleep(0.001)
        assert backend.opened == [p.graph for p in PARTS[:3]]
        return FUNCTIONS[1](feeds)

    backend = engine(p2={"function": wait_for_next})
    session = stream(backend)
    session.run({"x": X[:1], "t": np.float32(1)})
    session.close()
    assert backend.most == 2


def test_parts_are_opened_in_turn_once_a_run_whatever_the_rows() -> None:
    backend = engine()
    session = stream(backend)
    session.run({"x": X, "t": np.float32(1)})
    session.run({"x": X, "t": np.float32(1)})
    session.close()
    names = [p.graph for p in PARTS]
    assert backend.opened == [*names, *names, names[0]]  # after a second run a third is expected
    assert [name for name, _ in backend.runs] == [name for name in names + names for _ in range(2)]
    assert all(feeds[key].shape == (1, 3) for _, feeds in backend.runs for key in feeds if key != "t")


def test_a_fixed_batch_is_kept() -> None:
    two = TensorSpec("float32", (2, 3))

    def fix(specs: Any) -> dict[str, TensorSpec]:
        return {name: two if spec is ROWS else spec for name, spec in specs.items()}

    parts = tuple(replace(p, inputs=fix(p.inputs), outputs=fix(p.outputs)) for p in PARTS)
    entry = replace(ENTRY, inputs=fix(ENTRY.inputs), outputs=fix(ENTRY.outputs), parts=parts)
    backend = engine()
    component = Component("unet", WHOLE, entry, backend=backend, device="cpu", residency="stream")
    x = np.resize(X, (3, 3))
    np.testing.assert_array_equal(component.run({"x": x, "t": np.float32(3)})["y"], expected(x, 3))
    assert [feeds["d"].shape for name, feeds in backend.runs if name == PARTS[3].graph] == [(2, 3)] * 2
    component.close()
    assert backend.opened.count(PARTS[1].graph) == 1


def test_weights_stay_as_stored_and_every_part_has_its_own_identity() -> None:
    backend = engine()
    open_parts(backend, Path("bundle"), ENTRY, "cpu", SessionOptions(identity="digest", threads=3))
    assert backend.options == [
        SessionOptions(weights="compact", passing=True, threads=3, identity=f"digest {PARTS[0].graph}")
    ]


@pytest.mark.parametrize("number", [2, 3, 4])
def test_an_error_while_opening_is_raised_and_the_next_run_tries_again(number: int) -> None:
    backend = engine(**{f"p{number}": {"fail_at_open": "no memory"}})
    session = stream(backend)
    for _ in range(2):
        with pytest.raises(GraphFailed, match=f"part{number}.fake: no memory"):
            session.run({"x": X, "t": np.float32(1)})
        assert sorted(backend.opened) == sorted(backend.closed)
    backend.graphs = engine().graphs
    np.testing.assert_array_equal(session.run({"x": X, "t": np.float32(1)})["y"], expected(X, 1))
    session.close()
    assert sorted(backend.opened) == sorted(backend.closed)


def test_an_error_in_the_first_part_is_one_of_opening() -> None:
    with pytest.raises(GraphFailed, match="part1.fake: no memory"):
        stream(engine(p1={"fail_at_open": "no memory"}))


def test_an_error_of_a_run_closes_all_parts() -> None:
    def fails(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
        raise ValueError("broken")

    backend = engine(p3={"function": fails})
    session = stream(backend)
    with pytest.raises(GraphFailed, match="part3.fake failed on fake:cpu: broken"):
        session.run({"x": X, "t": np.float32(1)})
    assert sorted(backend.opened) == sorted(backend.closed)


def test_values_that_are_not_finite_are_found() -> None:
    backend = engine(p2={"nan_from_run": 0})
    component = Component("unet", WHOLE, ENTRY, backend=backend, device="cpu", residency="stream")
    with pytest.raises(NonFinite, match="unet produced"):
        component.run({"x": X, "t": np.float32(1)})
    component.close()


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [
        ({"x": X}, "model.fake: input 't' is missing"),
        ({"x": X, "t": np.float32(1), "z": X}, "input 'z' is unknown"),
        ({"x": X[:, :2], "t": np.float32(1)}, r"input 'x' got float32 \[2, 2\]"),
    ],
)
def test_feeds_are_checked_before_a_part_runs(feeds: dict[str, Any], reason: str) -> None:
    backend = engine()
    with pytest.raises(GraphFailed, match=reason):
        stream(backend).run(feeds)
    assert backend.runs == []


def test_a_part_of_another_graph_is_refused() -> None:
    backend = engine(p2={"outputs": {"z": ROWS}, "function": lambda f: {"z": f["a"]}})
    with pytest.raises(BundleCorrupt, match="unet/part2.fake: has other inputs or outputs than the manifest says"):
        stream(backend).run({"x": X, "t": np.float32(1)})
    assert sorted(backend.opened) == sorted(backend.closed)


def test_closing_waits_for_an_opening_and_can_be_repeated() -> None:
    backend = engine()
    session = stream(backend)
    session.run({"x": X, "t": np.float32(1)})
    backend.seconds = 0.05
    session.run({"x": X, "t": np.float32(1)})  # the first part is being opened for the next run
    session.close()
    session.close()
    assert sorted(backend.opened) == sorted(backend.closed)
    with pytest.raises(GraphFailed, match="the session is closed"):
        session.run({"x": X, "t": np.float32(1)})


def test_closing_waits_for_a_run_in_another_thread() -> None:
    backend, found = engine(), list[AnyArray]()
    session = stream(backend)
    backend.seconds = 0.02
    running = threading.Thread(target=lambda: found.append(session.run({"x": X, "t": np.float32(2)})["y"]))
    running.start()
    while not backend.runs:
        time.sleep(0.001)
    session.close()
    running.join()
    np.testing.assert_array_equal(found[0], expected(X, 2))
    assert sorted(backend.opened) == sorted(backend.closed)


def test_runs_of_several_threads_do_not_mix() -> None:
    backend = engine()
    session = stream(backend)
    found: dict[int, AnyArray] = {}

    def run(t: int) -> None:
        found[t] = session.run({"x": X, "t": np.float32(t)})["y"]

    threads = [threading.Thread(target=run, args=(t,)) for t in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for t, y in found.items():
        np.testing.assert_array_equal(y, expected(X, t))
    assert backend.most <= 2 and len(found) == 6


def test_a_component_streams_within_its_scope_of_use() -> None:
    backend, timings = engine(), Timings()
    component = Component("unet", WHOLE, ENTRY, backend=backend, device="cpu", residency="stream")
    component.open_ahead()
    assert backend.opened == []  # it waits for its turn, as with "release"
    with component.use():
        component.run({"x": X, "t": np.float32(1)}, timings)
        component.run({"x": X, "t": np.float32(1)}, timings)
    assert sorted(backend.opened) == sorted(backend.closed)
    assert {name: len(spans) for name, spans in timings.samples.items()} == {
        "wait_open": 1,
        "unet.open": 1,
        "unet.run": 2,
    }


def test_parts_are_opened_for_the_shapes_of_what_they_are_handed() -> None:
    backend = engine()
    backend.fixes = True
    component = Component("unet", WHOLE, ENTRY, backend=backend, device="cpu", residency="stream")
    for _ in range(2):
        np.testing.assert_array_equal(component.run({"x": X, "t": np.float32(3)})["y"], expected(X, 3))
    component.close()
    seen = {str(sorted(options.shapes.items())) for options in backend.options if options.shapes is not None}
    assert seen == {str(sorted((name, () if name == "t" else (1, 3)) for name in p.inputs)) for p in PARTS}
    assert [options.shapes is None for options in backend.options] == [False] * 9


def test_other_shapes_open_parts_for_any() -> None:
    free = TensorSpec("float32", ("batch", "width"))

    def widen(specs: Any) -> dict[str, TensorSpec]:
        return {name: free if spec is ROWS else spec for name, spec in specs.items()}

    parts = tuple(replace(p, inputs=widen(p.inputs), outputs=widen(p.outputs)) for p in PARTS)
    entry = replace(ENTRY, inputs=widen(ENTRY.inputs), outputs=widen(ENTRY.outputs), parts=parts)
    backend = Watched(
        {p.graph: FakeGraph(p.inputs, p.outputs, f) for p, f in zip(parts, FUNCTIONS, strict=True)}, fixes=True
    )
    component = Component("unet", WHOLE, entry, backend=backend, device="cpu", residency="stream")
    for width in (3, 5, 4):
        x = np.resize(X, (2, width))
        np.testing.assert_array_equal(component.run({"x": x, "t": np.float32(3)})["y"], expected(x, 3))
    component.close()
    assert [options.shapes is None for options in backend.options][-5:] == [True] * 5


# Bundles


def cut(bundle: Bundle, **change: Any) -> Bundle:
    """The tiny bundle with a denoiser in two parts, whose files are the whole graph's."""
    unet = bundle.manifest.components["unet"]
    middle = {"middle": TensorSpec("float32", ("batch", 4, None, None))}
    parts = (
        GraphPart(unet.graph, unet.inputs, middle, 7),
        GraphPart(unet.graph, {**middle, "timestep": unet.inputs["timestep"]}, unet.outputs, 8),
    )
    entry = replace(unet, **{"parts": parts, **change})
    manifest = replace(bundle.manifest, components={**bundle.manifest.components, "unet": entry}, format_version=3)
    return replace(bundle, manifest=manifest)


CHOICE = Choice("fake", "cpu", "")


def test_streaming_needs_a_denoiser_in_parts(tiny_bundle: Bundle) -> None:
    choices = dict.fromkeys(tiny_bundle.manifest.components, CHOICE)
    with pytest.raises(InvalidRequest, match="tiny has no denoiser in parts; export it with --part-size 64, or choose"):
        open_components(tiny_bundle, choices, SessionOptions(), "stream")


def test_what_has_parts_streams_and_the_rest_is_released(tiny_bundle: Bundle) -> None:
    bundle = cut(tiny_bundle)
    choices = dict.fromkeys(bundle.manifest.components, CHOICE)
    components = open_components(bundle, choices, SessionOptions(), "stream")
    streamed = [name for name, c in components.items() if c.streamed]
    assert streamed == ["unet"]
    assert {c.residency for c in components.values()} == {"stream"}
    whole = open_components(bundle, choices, SessionOptions(), "release")
    assert not any(c.streamed for c in whole.values())


def test_a_manifest_with_changes_is_a_format_of_its_own(tiny_bundle: Bundle) -> None:
    """Older readers would not tell that something is computed in another way."""
    changed = replace(tiny_bundle.manifest, changes=("reads fewer keys",), format_version=4)
    assert parse_manifest(dump_manifest(changed)) == changed
    assert version_needed(cut(tiny_bundle).manifest.components, changed.changes) == 4
    assert b'"changes"' not in dump_manifest(tiny_bundle.manifest)
    with pytest.raises(BundleCorrupt, match="format_version is 1, what it holds is format 4"):
        dump_manifest(replace(changed, format_version=1))


def test_a_manifest_with_parts_is_read_as_written(tiny_bundle: Bundle) -> None:
    manifest = cut(tiny_bundle).manifest
    assert parse_manifest(dump_manifest(manifest)) == manifest
    assert (version_needed(manifest.components), version_needed(tiny_bundle.manifest.components)) == (3, 1)
    assert b'"parts"' not in dump_manifest(tiny_bundle.manifest)
    with pytest.raises(BundleCorrupt, match="format_version is 2, what it holds is format 3"):
        dump_manifest(replace(manifest, format_version=2))
    assert [file.graph for file in manifest.components["unet"].files] == ["unet/model.fake"] * 3


def test_parts_that_do_not_make_the_whole_are_refused(tiny_bundle: Bundle) -> None:
    first, second = cut(tiny_bundle).manifest.components["unet"].parts
    for parts, reason in (
        ((second, first), "unet/model.fake needs 'middle', which no part before it makes"),
        ((first,), "no part of unet/model.fake makes 'out_sample'"),
        ((replace(first, graph="unet/gone.fake"), second), "graph 'unet/gone.fake' is not among its files"),
        ((replace(first, weight_bytes=-1), second), "allowed: a number from 0"),
    ):
        with pytest.raises(BundleCorrupt, match=reason):
            dump_manifest(cut(tiny_bundle, parts=parts).manifest)
