"""The VAE in tiles: graphs of any size and of fixed ones, the pipeline's option, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketdiffusion import cli, vae
from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.manifest import ComponentEntry, Numbers, SizedGraph
from pocketdiffusion.component import Component
from pocketdiffusion.errors import GraphFailed, InvalidRequest
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray, Array, TensorSpec
from pocketdiffusion.timing import Timings

FACTOR = 4
NUMBERS = Numbers(
    width=128,
    height=128,
    latent_channels=4,
    latent_scale=0.5,
    latent_shift=0.25,
    vae_factor=FACTOR,
    size_multiple=16,
    text_length=8,
    default_steps=5,
    default_guidance=3.0,
)
Axis = int | str
Function = Callable[[dict[str, AnyArray]], Mapping[str, AnyArray]]


def box(array: AnyArray, radius: int) -> AnyArray:
    """A convolution that sees `radius` cells on each side, and zeros past the edges."""
    padded = np.pad(array, ((0, 0), (0, 0), (radius, radius), (radius, radius)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1, 2 * radius + 1), axis=(2, 3))
    return windows.mean(axis=(4, 5))


def decoding(radius: int) -> Function:
    return lambda f: {"sample": box(f["latent_sample"], radius)[:, :3].repeat(FACTOR, 2).repeat(FACTOR, 3)}


def encoding(radius: int) -> Function:
    def function(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
        cells = box(feeds["sample"][:, :, ::FACTOR, ::FACTOR], radius)
        mean = np.concatenate([cells, cells[:, :1]], axis=1)
        return {"latent_parameters": np.concatenate([mean, 0.1 * mean], axis=1)}

    return function


def decoder(function: Function, *sizes: tuple[Axis, Axis]) -> tuple[Component, FakeBackend]:
    """A component with a graph for each (height, width) in cells."""
    return component("vae_decoder", "latent_sample", 4, 1, {"sample": TensorSpec("float32", (1, 3, "h", "w"))})(
        function, *sizes
    )


def encoder(function: Function, *sizes: tuple[Axis, Axis]) -> tuple[Component, FakeBackend]:
    outputs = {"latent_parameters": TensorSpec("float32", (1, 8, "h", "w"))}
    return component("vae_encoder", "sample", 3, FACTOR, outputs)(function, *sizes)


def component(
    name: str, key: str, channels: int, unit: int, outputs: Mapping[str, TensorSpec]
) -> Callable[..., tuple[Component, FakeBackend]]:
    def make(function: Function, *sizes: tuple[Axis, Axis]) -> tuple[Component, FakeBackend]:
        found = sizes or (("height", "width"),)
        inputs = {
            size: {key: TensorSpec("float32", (1, channels, *(a * unit if isinstance(a, int) else a for a in size)))}
            for size in found
        }
        engine = FakeBackend({f"{h}x{w}.fake": FakeGraph(inputs[h, w], outputs, function) for h, w in found})

        def one(size: tuple[Axis, Axis], others: dict[tuple[int, int], Component]) -> Component:
            graph = "{}x{}.fake".format(*size)
            entry = ComponentEntry("fake", graph, inputs[size], outputs, "float32")
            return Component(name, Path(graph), entry, backend=engine, device="cpu", sizes=others)

        others = {(int(w) * FACTOR, int(h) * FACTOR): one((h, w), {}) for h, w in found[1:]}
        return one(found[0], others), engine

    return make


def random(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [(32, 33), (48, 80), (50, 70)])
def test_decoding_is_exact_where_the_overlap_covers_what_a_pixel_depends_on(size: tuple[int, int]) -> None:
    latents = random(2, 4, *size)
    graph, engine = decoder(decoding(2))
    whole = vae.decode(graph, latents, NUMBERS, Timings())
    engine.runs.clear()
    found = vae.decode(graph, latents, NUMBERS, Timings(), (32, 32))
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert {feeds["latent_sample"].shape for _, feeds in engine.runs} == {(1, 4, 32, 32)}
    assert found.flags.c_contiguous
    assert found.dtype == np.float32

    wider, _ = decoder(decoding(4))  # past the margin: the zeros at a tile's rim show
    whole, found = (vae.decode(wider, latents, NUMBERS, Timings(), tile) for tile in (None, (32, 32)))
    assert 1e-3 < np.abs(found - whole).max() < 0.5


def test_encoding_is_exact_where_the_overlap_covers_what_a_cell_depends_on() -> None:
    images = random(1, 200, 280, 3)
    graph, engine = encoder(encoding(2))
    noise = random(3, 4, 50, 70)
    whole = vae.encode(graph, images, NUMBERS, lambda: noise, Timings())
    engine.runs.clear()
    found = vae.encode(graph, images, NUMBERS, lambda: noise, Timings(), (32, 32))
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert {feeds["sample"].shape for _, feeds in engine.runs} == {(1, 3, 128, 128)}


@pytest.mark.parametrize(
    ("graphs", "size", "most", "tile"),
    [
        ([], (64, 96), None, (64, 96)),
        ([], (64, 96), 128, (64, 16)),
        ([], (64, 64), 128, (16, 64)),
        ([], (64, 96), 64, (16, 16)),
        ([], (8, 96), 64, (8, 32)),
        ([], (64, 64), 256, (64, 64)),
        ([], (64, 96), 4096, (64, 96)),
        ([(32, 32)], (32, 32), None, (32, 32)),
        ([(32, 32)], (64, 96), None, (32, 32)),
        ([(32, 32), (64, 48)], (64, 96), None, (64, 48)),
        ([(32, 32), (64, 48)], (64, 48), None, (64, 48)),
        ([(32, 32), (64, 48)], (64, 48), 128, (32, 32)),
        ([(64, 64), (32, 32)], (64, 64), 200, (32, 32)),
        ([(32, 32), (64, 48)], (64, 48), 220, (32, 32)),
        ([(32, 32), (64, 48)], (64, 48), 224, (64, 48)),
        ([("h", 32)], (64, 64), None, (64, 32)),
        ([("h", 32)], (64, 64), 128, (27, 32)),
    ],
)
def test_the_largest_tile_that_a_graph_takes(
    graphs: list[tuple[Axis, Axis]], size: tuple[int, int], most: int | None, tile: tuple[int, int]
) -> None:
    part, _ = decoder(decoding(0), *graphs)
    assert vae.tile_for(part, size, NUMBERS, most) == tile
    part, _ = encoder(encoding(0), *graphs)
    assert vae.tile_for(part, size, NUMBERS, most) == tile


@pytest.mark.parametrize("most", [0, -1, 63, 64.5, True, "256"])
def test_a_limit_that_is_too_small_or_no_number_is_refused(most: Any) -> None:
    part, _ = decoder(decoding(0))
    with pytest.raises(InvalidRequest, match="vae_tile is .*; give at least 64 pixels, or None") as error:
        vae.tile_for(part, (64, 64), NUMBERS, most)
    assert error.value.parameter == "vae_tile"


def test_graphs_that_are_fixed_to_more_are_named() -> None:
    part, _ = decoder(decoding(0), (32, 32), (48, 64))
    with pytest.raises(
        InvalidRequest, match="vae_tile is 64, squared; vae_decoder is fixed to 128x128, 256x192: give more, or None$"
    ):
        vae.tile_for(part, (64, 64), NUMBERS, 64)
    with pytest.raises(InvalidRequest, match="128x64 was asked; vae_decoder is fixed to 128x128, 256x192: ask for no"):
        vae.tile_for(part, (16, 32), NUMBERS, None)


def test_answers_of_another_size_are_refused() -> None:
    part, _ = decoder(lambda feeds: {"sample": np.zeros((1, 3, 9, 9))})
    with pytest.raises(GraphFailed, match=r"vae_decoder gave \(1, 3, 9, 9\), not \(1, 3, 128, 128\)"):
        vae.decode(part, random(1, 4, 64, 64), NUMBERS, Timings(), (32, 32))
    part, _ = encoder(lambda feeds: {"latent_parameters": np.zeros((1, 8, 9, 9))})
    with pytest.raises(GraphFailed, match=r"vae_encoder gave \(9, 9\) latents, not \(32, 32\)"):
        vae.encode(part, random(1, 256, 256, 3), NUMBERS, lambda: random(1, 4, 64, 64), Timings(), (32, 32))


# The pipeline


def decoded(backend: FakeBackend) -> set[tuple[int, ...]]:
    return {feeds["latent_sample"].shape for name, feeds in backend.runs if name.startswith("vae_decoder")}


def test_tiles_are_off_until_they_are_asked_for(pipe: Pipeline, backend: FakeBackend) -> None:
    whole = pipe("a cat", seed=0, width=96, height=80, output_type="np")
    assert whole.messages == ()
    assert decoded(backend) == {(1, 4, 20, 24)}
    backend.runs.clear()
    pipe.vae_tile = 64
    tiled = pipe("a cat", seed=0, width=96, height=80, num_images_per_prompt=2, output_type="np")
    assert decoded(backend) == {(1, 4, 16, 16)}
    assert tiled.messages == (
        "vae_decoder ran in 4 tiles of 64x64 pixels; in one piece it gives a slightly different picture",
    )
    np.testing.assert_allclose(tiled.images[0], whole.images[0], atol=1e-5)  # each of its pixels depends on one cell
    assert pipe("a cat", seed=0, width=64, height=64).messages == ()
    assert pipe("a cat", seed=0, width=96, output_type="latent").messages == ()


def test_a_starting_picture_is_encoded_in_tiles_and_what_is_kept_of_it_stays(
    pipe: Pipeline, backend: FakeBackend
) -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (1, 80, 96, 3)).astype(np.float32)
    mask = np.full_like(image, -1)
    mask[:, :, 48:] = 1
    given = {"image": image, "mask_image": mask, "seed": 0, "width": 96, "height": 80, "output_type": "np"}
    whole = pipe("a cat", **given).images
    pipe.vae_tile = 64
    result = pipe("a cat", **given)
    np.testing.assert_allclose(result.images, whole, atol=1e-5)
    np.testing.assert_allclose(result.images[:, :, :48], image[:, :, :48] / 2 + 0.5, atol=1e-6)
    encoded = {feeds["sample"].shape for name, feeds in backend.runs if name.startswith("vae_encoder")}
    assert encoded == {(1, 3, 80, 96), (1, 3, 64, 64)}
    assert [message.split()[0] for message in result.messages] == ["vae_encoder", "vae_decoder"]


def test_a_mask_that_repaints_nothing_is_refused(pipe: Pipeline) -> None:
    """One white pixel counts if it is what its latent cell takes, the top left one."""
    image = np.zeros((1, 64, 64, 3), np.float32)
    mask = np.full_like(image, -1)
    mask[:, 9, 9] = 1
    given = {"image": image, "mask_image": mask, "seed": 0, "width": 64, "height": 64}
    with pytest.raises(InvalidRequest, match="mask_image has nothing white"):
        pipe.stream("a cat", **given)
    mask[:, 8, 8] = 1
    assert len(pipe("a cat", **given).images) == 1


def test_a_wrong_limit_is_refused_before_the_first_step(pipe: Pipeline, backend: FakeBackend) -> None:
    pipe.vae_tile = 16
    with pytest.raises(InvalidRequest, match="vae_tile is 16; give at least 64"):
        pipe.stream("a cat")
    assert backend.runs == []


def test_a_decoder_of_a_fixed_size_makes_larger_pictures(tiny_bundle: Bundle, backend: FakeBackend) -> None:
    """Its graphs are of 32x32 and 48x32 pixels, the denoiser's of any size."""
    manifest = tiny_bundle.manifest
    entry = manifest.components["vae_decoder"]
    shapes = {"small": (8, 8), "wide": (8, 12)}
    inputs = {name: {"latent_sample": TensorSpec("float32", (1, 4, *shape))} for name, shape in shapes.items()}
    function = backend.graphs[entry.graph].function
    graphs = {f"{name}.fake": FakeGraph(inputs[name], entry.outputs, function) for name in shapes}
    engine = FakeBackend({**backend.graphs, **graphs})
    small = replace(entry, graph="small.fake", inputs=inputs["small"])
    wide = replace(small, graph="wide.fake", inputs=inputs["wide"])
    sized = replace(small, sizes=(SizedGraph(48, 32, "wide.fake", wide.inputs, wide.outputs),))
    components = {
        name: Component(name, Path(part.graph), part, backend=engine, device="cpu")
        for name, part in {**manifest.components, "vae_decoder": sized}.items()
    }
    components["vae_decoder"].sizes[48, 32] = Component(
        "vae_decoder", Path("wide.fake"), wide, backend=engine, device="cpu"
    )
    pipe = Pipeline(
        replace(tiny_bundle, manifest=replace(manifest, components={**manifest.components, "vae_decoder": sized})),
        components,
    )
    found = pipe("a cat", seed=0, width=64, height=48, output_type="np")
    assert {name for name, _ in engine.runs} & {"small.fake", "wide.fake"} == {"wide.fake"}
    assert found.messages[0].startswith("vae_decoder ran in 4 tiles of 48x32 pixels")
    with pytest.raises(InvalidRequest, match="16x16 was asked; vae_decoder is fixed to 32x32, 48x32"):
        pipe("a cat", width=16, height=16)


def test_the_command_line_passes_the_limit_on_and_tells_of_tiles(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(cls: type[Pipeline], model: str, *, vae_tile: int | None, **options: Any) -> Pipeline:
        pipe.vae_tile = vae_tile
        return pipe

    monkeypatch.setattr(Pipeline, "from_pretrained", classmethod(opened))
    command = ["generate", "a cat", "--width", "96", "--height", "96", "--seed", "0", "-o", str(tmp_path / "a.png")]
    assert cli.main(command) == 0
    assert "tiles" not in capsys.readouterr().err
    assert cli.main([*command, "--vae-tile", "64"]) == 0
    assert "vae_decoder ran in 4 tiles of 64x64 pixels" in capsys.readouterr().err
    assert cli.main([*command, "--vae-tile", "8"]) == 2
    assert "give at least 64 pixels" in capsys.readouterr().err
