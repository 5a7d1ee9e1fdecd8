"""Decoding in bands: maps and their figures, pieces of every kind on the fake engine, the pipeline's option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketdiffusion import bands
from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.bundle.manifest import BandGraph, ComponentEntry, FileEntry, version_needed
from pocketdiffusion.bundle.manifest_json import dump_manifest, parse_manifest
from pocketdiffusion.component import Component
from pocketdiffusion.errors import BundleCorrupt, InvalidRequest
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray, Array, TensorSpec
from pocketdiffusion.timing import Timings

GROUPS = 2


def spec(channels: int) -> TensorSpec:
    return TensorSpec("float32", (1, channels, "height", "width"))


FIGURE = TensorSpec("float32", (1, GROUPS, 1, 1))


def blur(array: AnyArray) -> AnyArray:
    """A convolution that sees one row above and below, and zeros past the edges."""
    padded = np.pad(array, ((0, 0), (0, 0), (1, 1), (0, 0)))
    return padded[:, :, :-2] + 2 * padded[:, :, 1:-1] - padded[:, :, 2:]


def normed(array: AnyArray, mean: AnyArray, variance: AnyArray) -> AnyArray:
    each = array.shape[1] // GROUPS
    return (array - mean.repeat(each, 1)) / np.sqrt(variance + 1e-6).repeat(each, 1)


def figures(array: AnyArray) -> tuple[AnyArray, AnyArray]:
    parts = array.astype(np.float64).reshape(GROUPS, -1)
    return parts.mean(1).reshape(1, GROUPS, 1, 1), parts.var(1).reshape(1, GROUPS, 1, 1)


PIECES: tuple[tuple[BandGraph, Callable[[dict[str, AnyArray]], Mapping[str, AnyArray]]], ...] = (
    (BandGraph("head", {"x": spec(4)}, {"a": spec(4)}, None, 1), lambda f: {"a": f["x"] - f["x"].mean()}),
    (BandGraph("up", {"a": spec(4)}, {"b": spec(4)}, 1, 2), lambda f: {"b": blur(f["a"].repeat(2, 2).repeat(2, 3))}),
    (
        BandGraph("first", {"b": spec(4), "b_mean": FIGURE, "b_variance": FIGURE}, {"c": spec(4), "d": spec(2)}, 1, 1),
        lambda f: {"c": blur(normed(f["b"], f["b_mean"], f["b_variance"])), "d": f["b"][:, :2]},
    ),
    (
        BandGraph(
            "second",
            {"c_mean": FIGURE, "c_variance": FIGURE, "c": spec(4), "d": spec(2), "b": spec(4)},
            {"y": spec(2)},
            1,
            1,
        ),
        lambda f: {"y": blur(normed(f["c"], f["c_mean"], f["c_variance"]))[:, :2] + f["d"] + f["b"][:, 2:]},
    ),
)


def whole(x: Array) -> AnyArray:
    a = x - x.mean()
    b = blur(a.repeat(2, 2).repeat(2, 3))
    c = blur(normed(b, *figures(b)))
    return blur(normed(c, *figures(c)))[:, :2] + b[:, :2] + b[:, 2:]


def decoder() -> tuple[Component, FakeBackend]:
    engine = FakeBackend({f"{g.graph}": FakeGraph(g.inputs, g.outputs, function) for g, function in PIECES})
    listed = tuple(graph for graph, _ in PIECES)
    entry = ComponentEntry("fake", "whole", {"x": spec(4)}, {"y": spec(2)}, "float32", bands=listed)
    pieces = [
        Component("decoder", Path(e.graph), e, backend=engine, device="cpu", residency="release") for e in entry.pieces
    ]
    return Component("decoder", Path("whole"), entry, backend=engine, device="cpu", bands=pieces), engine


@pytest.mark.parametrize("height", [1, 5, 16])
@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_bands_give_what_the_whole_gives(height: int, rows: int) -> None:
    x = (np.random.default_rng(0).standard_normal((1, 4, height, 3)) * 3 + 5).astype(np.float32)
    part, engine = decoder()
    found = bands.run(part, {"x": x}, rows, Timings())
    assert list(found) == ["y"]
    np.testing.assert_allclose(found["y"], whole(x), rtol=1e-4, atol=1e-4)
    assert engine.opened == engine.closed == [graph.graph for graph, _ in PIECES]  # each is open in its turn only
    for name, key in (("up", "a"), ("first", "b")):
        heights = {feeds[key].shape[2] for piece, feeds in engine.runs if piece == name}
        assert len(heights) == 1  # engines open a graph for one shape
        assert heights.pop() <= rows + 2
    assert [feeds["x"].shape for name, feeds in engine.runs if name == "head"] == [(1, 4, height, 3)]


def test_a_map_lets_bands_go_and_keeps_its_figures() -> None:
    values = np.random.default_rng(0).standard_normal((1, 6, 10, 7)).astype(np.float32) + 100
    found = bands.Map()
    for start in (0, 4, 8):
        found.append(values[:, :, start : start + 4], summed=True)
    np.testing.assert_array_equal(found.rows(3, 9), values[:, :, 3:9])
    found.drop(3)
    assert (found.start, len(found.bands)) == (0, 3)
    found.drop(5)
    assert (found.start, len(found.bands), found.height) == (4, 2, 10)
    np.testing.assert_array_equal(found.rows(5, 10), values[:, :, 5:])
    mean, variance = found.figures(3)
    groups = values.astype(np.float64).reshape(3, -1)
    np.testing.assert_allclose(mean.ravel(), groups.mean(1), rtol=1e-6)
    np.testing.assert_allclose(variance.ravel(), groups.var(1), rtol=1e-3)


@pytest.mark.parametrize(("height", "most"), [(10, 3), (10, 10), (10, 11), (1, 1), (9, 2)])
def test_bands_cover_every_row_once_and_are_about_equal(height: int, most: int) -> None:
    found = bands.spans(height, most)
    assert [row for start, stop in found for row in range(start, stop)] == list(range(height))
    heights = [stop - start for start, stop in found]
    assert max(heights) <= most
    assert max(heights) - min(heights) <= 1


@pytest.mark.parametrize("rows", [0, -1, 7, True, 16.0, "16"])
def test_a_height_that_is_too_small_or_no_number_is_refused(rows: Any) -> None:
    with pytest.raises(InvalidRequest, match="vae_bands is .*; give at least 8 rows, or None") as error:
        bands.check(decoder()[0], rows)
    assert error.value.parameter == "vae_bands"


def test_a_bundle_without_pieces_says_how_to_get_them(pipe: Pipeline, backend: FakeBackend) -> None:
    pipe.vae_bands = 16
    with pytest.raises(
        InvalidRequest, match="vae_decoder was exported in one piece; export it again with --banded-vae"
    ):
        pipe.stream("a cat")
    assert backend.runs == []
    assert pipe("a cat", output_type="latent", num_inference_steps=2).images is not None  # decodes nothing


def test_the_pipeline_decodes_in_bands(pipe: Pipeline, backend: FakeBackend) -> None:
    """The tiny decoder is one piece that looks at no other row."""
    expected = pipe("a cat", seed=0, width=96, height=80, output_type="np")
    backend.runs.clear()
    part = pipe.components["vae_decoder"]
    graph = BandGraph(part.entry.graph, part.entry.inputs, part.entry.outputs, 0, 4)
    part.entry = replace(part.entry, bands=(graph,))
    (entry,) = part.entry.pieces
    part.bands = (Component("vae_decoder", part.graph, entry, backend=backend, device="cpu", residency="release"),)
    pipe.vae_bands = 8
    found = pipe("a cat", seed=0, width=96, height=80, output_type="np")
    np.testing.assert_array_equal(found.images, expected.images)
    shapes = [feeds["latent_sample"].shape for name, feeds in backend.runs if name.startswith("vae_decoder")]
    assert shapes == [(1, 4, rows, 24) for rows in (7, 7, 7)]
    assert set(found.configuration) == set(expected.configuration)


def test_a_manifest_keeps_pieces_and_refuses_what_is_not_wired(tiny_bundle: Any) -> None:
    manifest = tiny_bundle.manifest
    old = manifest.components["vae_decoder"]
    middle = {"m": spec(4)}
    pieces = (
        BandGraph("vae_decoder/a.fake", old.inputs, middle, None, 1),
        BandGraph("vae_decoder/b.fake", {**middle, "m_mean": FIGURE, "m_variance": FIGURE}, old.outputs, 1, 4),
    )

    def with_pieces(*found: BandGraph) -> Any:
        files = [*manifest.files, *(FileEntry(f"vae_decoder/{name}.fake", 1, "0" * 64) for name in "ab")]
        parts = {**manifest.components, "vae_decoder": replace(old, bands=found)}
        listed = tuple(sorted(files, key=lambda file: file.path))
        return replace(manifest, components=parts, files=listed, format_version=version_needed(parts))

    made = with_pieces(*pieces)
    assert made.format_version == 3
    read = parse_manifest(dump_manifest(made)).components["vae_decoder"].bands
    assert [(piece.graph, piece.halo, piece.scale) for piece in read] == [
        ("vae_decoder/a.fake", None, 1),
        ("vae_decoder/b.fake", 1, 4),
    ]
    for wrong, message in (
        (pieces[1:], "reads 'm', which no piece before it makes|reads \"m\""),
        (pieces[:1], "the pieces of vae_decoder do not make"),
        ((replace(pieces[0], graph="vae_decoder/c.fake"), pieces[1]), "of vae_decoder is not among its files"),
        ((pieces[0], replace(pieces[1], inputs={})), "reads no map"),
        ((pieces[0], replace(pieces[1], halo=65)), "halo is 65"),
    ):
        with pytest.raises(BundleCorrupt, match=message):
            dump_manifest(with_pieces(*wrong))
