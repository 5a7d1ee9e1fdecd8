"""Bundles with a graph for each of several image sizes, and graphs of a fixed batch: manifest, checks, runtime."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.bundle import MANIFEST, Bundle, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import ComponentEntry, Manifest, SizedGraph, version_needed
from pocketdiffusion.bundle.manifest_json import dump_manifest, parse_manifest
from pocketdiffusion.bundle.openvino_xml import weights_name
from pocketdiffusion.component import Component
from pocketdiffusion.errors import BundleCorrupt, BundleError, BundleUnsafe, InvalidRequest
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import TensorSpec

from . import bundle_maker as maker
from . import bundle_mutations as damage

SPEC = TensorSpec("float32", (1, 4))
ONNX_FILE, IR_FILE = "unet/model_96x64.onnx", "vae_decoder/openvino_model_96x64.xml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small bundle with another graph of each format, which read the first ones' weights."""
    folder = maker.make_bundle(tmp_path / "tiny")
    (folder / ONNX_FILE).write_bytes(maker.onnx_model(maker.external("model.onnx_data")))
    (folder / IR_FILE).write_text(maker.IR.format(offset=0, size=16), encoding="utf-8")
    write_manifest(folder, sized(folder))
    return folder


def sized(folder: Path, **change: Any) -> Manifest:
    manifest = maker.make_manifest(folder)
    graphs = {
        "unet": SizedGraph(96, 64, ONNX_FILE, {"x": SPEC}, {"y": SPEC}),
        "vae_decoder": SizedGraph(96, 64, IR_FILE, {"z": SPEC}, {}),
    }
    components = {
        name: replace(entry, sizes=(replace(graphs[name], **(change if name == "unet" else {})),))
        for name, entry in manifest.components.items()
    }
    return replace(manifest, components=components, files=file_entries(folder), format_version=2)


def test_a_bundle_of_several_sizes_opens(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    assert manifest == parse_manifest(dump_manifest(manifest)) == sized(folder)
    first, second = manifest.components["unet"].graphs
    assert (first.graph, second.graph) == ("unet/model.onnx", ONNX_FILE)
    assert first.sizes == second.sizes == ()


def test_only_what_needs_it_is_of_the_newer_format(folder: Path) -> None:
    plain = maker.make_manifest(folder)
    assert (version_needed(plain.components), version_needed(sized(folder).components)) == (1, 2)
    assert b'"sizes"' not in dump_manifest(plain)
    with pytest.raises(BundleCorrupt, match="format_version is 2, what it holds is format 1"):
        dump_manifest(replace(plain, format_version=2))
    with pytest.raises(BundleCorrupt, match="format_version is 1, what it holds is format 2"):
        dump_manifest(replace(sized(folder), format_version=1))


def test_an_empty_list_of_sizes_is_no_second_spelling(folder: Path) -> None:
    maker.rehash(folder, lambda all: all["components"]["unet"].update(sizes=[]))
    with pytest.raises(BundleCorrupt, match=r"components\.'?unet'?\.sizes is \[\], allowed: no such key"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 64}, "size 64x64; allowed: each size once"),
        ({"width": 100}, "size 100x64; .* multiples of 16"),
        ({"width": 1 << 20}, "allowed: a number from 1 to 16384"),
        ({"graph": "unet/other.onnx"}, "graph 'unet/other.onnx' of unet is not among its files"),
        ({"inputs": {"z": SPEC}}, "has other inputs or outputs than unet/model.onnx"),
        ({"outputs": {}}, "has other inputs or outputs"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BundleCorrupt, match=reason):
        dump_manifest(sized(folder, **change))


def test_the_graphs_of_other_sizes_are_looked_into(folder: Path) -> None:
    wrong = TensorSpec("float32", (1, 5))
    write_manifest(folder, sized(folder, inputs={"x": wrong}))
    with pytest.raises(BundleCorrupt, match=rf"{ONNX_FILE}: .*\(1, 5\)|{ONNX_FILE}"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("file", "data"), [(ONNX_FILE, maker.onnx_model(maker.external("../x"))), (IR_FILE, b"<!DOCTYPE")]
)
def test_a_hostile_graph_of_another_size_is_refused(folder: Path, file: str, data: bytes) -> None:
    maker.replace(folder / file, data)
    maker.rehash(folder)
    with pytest.raises(BundleUnsafe, match=file):
        Bundle.open(folder)


def test_an_ir_that_reads_past_the_shared_weights_is_refused(folder: Path) -> None:
    maker.replace(folder / IR_FILE, maker.IR.format(offset=8, size=16).encode())
    maker.rehash(folder)
    with pytest.raises(BundleCorrupt, match=r"reads vae_decoder/openvino_model\.bin up to byte 24"):
        Bundle.open(folder)


def test_the_weights_of_an_ir() -> None:
    assert weights_name("unet/openvino_model.xml") == "openvino_model.bin"
    assert weights_name("unet/openvino_model_768x512.xml") == "openvino_model.bin"
    assert weights_name("unet/openvino_model_part12.xml") == "openvino_model.bin"
    assert weights_name("unet/openvino_model_768x512_part1.xml") == "openvino_model.bin"
    assert weights_name("openvino_model_part0.xml") == "openvino_model_part0.bin"
    assert weights_name("openvino_model_x512.xml") == "openvino_model_x512.bin"


# Running

LATENTS = {"native": (8, 8), "wide": (8, 12)}


@pytest.fixture
def two_sizes(tiny_bundle: Bundle, backend: FakeBackend) -> tuple[Pipeline, FakeBackend]:
    """The fake pipeline with graphs fixed to 32x32 and 48x32."""
    manifest = tiny_bundle.manifest
    components, graphs = dict(manifest.components), dict(backend.graphs)
    for name in ("unet", "vae_decoder"):
        entry = components[name]
        for label, (height, width) in LATENTS.items():
            inputs = {key: fixed(spec, height, width) for key, spec in entry.inputs.items()}
            graph = f"{name}/{label}.fake"
            graphs[graph] = FakeGraph(inputs, entry.outputs, backend.graphs[entry.graph].function)
            if label == "native":
                components[name] = replace(components[name], graph=graph, inputs=inputs)
            else:
                wide = SizedGraph(48, 32, graph, inputs, entry.outputs)
                components[name] = replace(components[name], sizes=(wide,))
    engine = FakeBackend(graphs)
    bundle = replace(tiny_bundle, manifest=replace(manifest, components=components))
    return Pipeline(bundle, {name: make(name, entry, engine) for name, entry in components.items()}), engine


def make(name: str, entry: ComponentEntry, engine: FakeBackend) -> Component:
    def one(graph: ComponentEntry, sizes: dict[tuple[int, int], Component]) -> Component:
        return Component(name, Path(graph.graph), graph, backend=engine, device="cpu", sizes=sizes)

    first, *others = entry.graphs
    return one(first, {(s.width, s.height): one(g, {}) for s, g in zip(entry.sizes, others, strict=True)})


def fixed(spec: TensorSpec, height: int, width: int) -> TensorSpec:
    if len(spec.shape) != 4:
        return spec
    return TensorSpec(spec.dtype, (*spec.shape[:2], height, width))


def test_the_graph_that_fits_the_picture_runs(two_sizes: tuple[Pipeline, FakeBackend]) -> None:
    pipe, engine = two_sizes
    assert pipe("a", output_type="np", seed=0).images.shape == (1, 32, 32, 3)
    assert {name for name, _ in engine.runs} == {
        "text_encoder/model.fake",
        "unet/native.fake",
        "vae_decoder/native.fake",
    }
    engine.runs.clear()
    assert pipe("a", output_type="np", seed=0, width=48).images.shape == (1, 32, 48, 3)
    assert {name for name, _ in engine.runs} == {"text_encoder/model.fake", "unet/wide.fake", "vae_decoder/wide.fake"}


def test_one_size_is_open_at_a_time(two_sizes: tuple[Pipeline, FakeBackend]) -> None:
    pipe, engine = two_sizes
    pipe("a", seed=0)
    assert engine.closed == []
    pipe("a", seed=0, width=48)
    assert engine.closed == ["unet/native.fake", "vae_decoder/native.fake"]
    pipe("a", seed=0, width=48)
    assert engine.opened.count("unet/wide.fake") == 1
    pipe.close()
    assert sorted(engine.closed) == sorted(engine.opened)


def test_a_size_in_use_is_not_closed(two_sizes: tuple[Pipeline, FakeBackend]) -> None:
    pipe, engine = two_sizes
    running = pipe.stream("a", seed=0, num_inference_steps=2)
    next(running)
    pipe("a", seed=0, width=48, output_type="latent")
    assert "unet/native.fake" not in engine.closed
    assert [step.index for step in running] == [1]


def test_another_size_is_refused_with_those_that_are_possible(two_sizes: tuple[Pipeline, FakeBackend]) -> None:
    with pytest.raises(InvalidRequest, match="64x32 was asked; tiny is fixed to 32x32, 48x32$"):
        two_sizes[0]("a", width=64)


# A fixed batch


def batched(size: int | None, axis: int = 3) -> tuple[Component, FakeBackend]:
    x, t = TensorSpec("float32", (size, axis)), TensorSpec("float32", (1,))
    y = TensorSpec("float32", (size, axis))
    engine = FakeBackend({"m.fake": FakeGraph({"x": x, "t": t}, {"y": y}, lambda f: {"y": f["x"] * f["t"]})})
    entry = ComponentEntry("fake", "m.fake", {"x": x, "t": t}, {"y": y}, "float32")
    return Component("unet", Path("m.fake"), entry, backend=engine, device="cpu", options=SessionOptions()), engine


@pytest.mark.parametrize(
    ("size", "rows", "runs"), [(1, 1, 1), (1, 3, 3), (2, 2, 1), (2, 5, 3), (4, 1, 1), (None, 5, 1)]
)
def test_more_or_fewer_rows_than_a_graph_takes_run_in_turn(size: int | None, rows: int, runs: int) -> None:
    component, engine = batched(size)
    x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    found = component.run({"x": x, "t": np.full(1, 2, np.float32)})["y"]
    np.testing.assert_array_equal(found, 2 * x)
    assert [feeds["x"].shape for _, feeds in engine.runs] == [(size or rows, 3)] * runs


def test_images_do_not_depend_on_a_graphs_batch(
    make_pipe: Callable[..., Pipeline], tiny_bundle: Bundle, backend: FakeBackend
) -> None:
    want = make_pipe()("a", seed=0, num_images_per_prompt=3, output_type="np").images
    for size in (1, 2):
        entries = {name: of_batch(entry, size) for name, entry in tiny_bundle.manifest.components.items()}
        engine = FakeBackend(
            {e.graph: FakeGraph(e.inputs, e.outputs, backend.graphs[e.graph].function) for e in entries.values()}
        )
        bundle = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, components=entries))
        pipe = Pipeline(bundle, {name: make(name, entry, engine) for name, entry in entries.items()})
        found = pipe("a", seed=0, num_images_per_prompt=3, output_type="np").images
        np.testing.assert_array_equal(found, want)
        assert {len(next(iter(feeds.values()))) for _, feeds in engine.runs} == {size}


def of_batch(entry: ComponentEntry, size: int) -> ComponentEntry:
    def rows(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(spec.dtype, (size, *spec.shape[1:])) if spec.shape else spec

    return replace(
        entry,
        inputs={name: rows(spec) for name, spec in entry.inputs.items()},
        outputs={name: rows(spec) for name, spec in entry.outputs.items()},
    )


def test_a_prompt_that_is_longer_than_a_fixed_length_is_refused(tiny_bundle: Bundle, backend: FakeBackend) -> None:
    unet = tiny_bundle.manifest.components["unet"]
    states = replace(unet.inputs["encoder_hidden_states"], shape=("batch", 8, 6))
    entries = {
        **tiny_bundle.manifest.components,
        "unet": replace(unet, inputs={**unet.inputs, "encoder_hidden_states": states}),
    }
    pipe = Pipeline(tiny_bundle, {name: make(name, entry, backend) for name, entry in entries.items()})
    assert pipe("abcd", seed=0).images
    with pytest.raises(
        InvalidRequest, match="fills 2 times 8 tokens; .* fixed to 8: shorten it, or choose long_prompt"
    ):
        pipe("abcdefghij", seed=0)
    assert pipe("abcdefghij", seed=0, long_prompt="truncate").images


def test_the_manifest_on_disk_says_the_format(folder: Path) -> None:
    assert json.loads((folder / MANIFEST).read_bytes())["format_version"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_no_damage_to_the_manifest_is_accepted(folder: Path, tmp_path: Path) -> None:
    """Every key taken away, replaced by an object, or with an unknown one in it, and the digest made to fit."""
    manifest = sized(folder)
    plain = replace(manifest.components["vae_decoder"], sizes=())  # without its sizes it would be sound
    write_manifest(folder, replace(manifest, components={**manifest.components, "vae_decoder": plain}))
    Bundle.open(folder)
    count = 0
    for index, mutation in enumerate(damage.mutations(folder, seed=0)):
        if mutation.kind == "schema":
            count += 1
            copy = tmp_path / str(index)
            shutil.copytree(folder, copy, copy_function=os.link)
            mutation.apply(copy)
            with pytest.raises(BundleError, match=MANIFEST):
                Bundle.open(copy)
    assert count > 300
