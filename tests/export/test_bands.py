"""Decoders cut into pieces for bands: the same picture as in one piece, on both engines; what is refused."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline, vae  # noqa: E402
from pocketdiffusion.backends import SessionOptions, load  # noqa: E402
from pocketdiffusion.bundle import Bundle  # noqa: E402
from pocketdiffusion.bundle.models import find_bundle  # noqa: E402
from pocketdiffusion.component import Component  # noqa: E402
from pocketdiffusion.timing import Timings  # noqa: E402
from pocketdiffusion.tuning.footprint import Subject  # noqa: E402
from pocketdiffusion.tuning.trial import measure  # noqa: E402
from pocketdiffusion_export import bands  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import Made, export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402
from pocketdiffusion_export.targets.onnx_bands import cut, cut_file  # noqa: E402

pytestmark = pytest.mark.torch
ENGINES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The embedded model, its decoder's pieces written."""
    folder = tmp_path_factory.mktemp("embedded") / "sticker"
    shutil.copytree(find_bundle("sticker"), folder)
    bundle = Bundle.open(folder)
    entry = bundle.manifest.components["vae_decoder"]
    made = replace(entry, bands=cut_file(folder / entry.graph))
    return replace(bundle, manifest=replace(bundle.manifest, components={"vae_decoder": made}))


def decoder(bundle: Bundle, engine: str) -> Component:
    entry, options = bundle.manifest.components["vae_decoder"], SessionOptions(threads=1)
    whole, *pieces = (
        Component("vae_decoder", bundle.path / e.graph, e, backend=load(engine), device="cpu", options=options)
        for e in (entry, *entry.pieces)
    )
    whole.bands = tuple(pieces)
    return whole


@pytest.mark.parametrize("engine", ENGINES)
def test_bands_give_what_the_whole_gives(embedded: Bundle, engine: str) -> None:
    part, numbers = decoder(embedded, engine), embedded.manifest.numbers
    latents = np.random.default_rng(0).standard_normal((2, numbers.latent_channels, 11, 18)).astype(np.float32)
    whole = vae.decode(part, latents, numbers, Timings())
    for rows in (8, 13, 1000):
        timings = Timings()
        found = vae.decode(part, latents, numbers, timings, bands=rows)
        np.testing.assert_allclose(found, whole, atol=1e-5)
        many = len(timings.samples["vae_decoder.run"]) > 2 * len(part.bands)
        assert many == (rows < 1000)  # 1000 rows are one band, of each of two pictures


def test_pieces_hold_no_weights_of_their_own(embedded: Bundle) -> None:
    entry = embedded.manifest.components["vae_decoder"]
    assert sum((embedded.path / piece.graph).stat().st_size for piece in entry.bands) < 400_000
    assert (embedded.path / f"{entry.graph}_data").stat().st_size > 400_000
    assert [piece.halo for piece in entry.bands] == [None, *[1] * (len(entry.bands) - 1)]
    assert np.prod([piece.scale for piece in entry.bands]) == embedded.manifest.numbers.vae_factor


@pytest.fixture(scope="module", params=["fp32", "int8"])
def made(request: pytest.FixtureRequest, tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("bands") / request.param
    plan = make_plan(tiny, folder, recipe=request.param, preset=preset, accept_error=True, banded_vae=True)
    return export(plan, lambda line: None).bundles[0]


@pytest.mark.slow
def test_an_exported_bundle_decodes_in_bands(made: Made) -> None:
    assert made.manifest.format_version == 3
    assert "Decoded in bands, pixels" in (made.destination / "README.md").read_text(encoding="utf-8")
    for engine in ENGINES:
        pipe = Pipeline.from_pretrained(made.destination, device=engine, threads=1, vae_bands=8)
        given = {"seed": 0, "width": 40, "height": 24, "output_type": "np", "num_images_per_prompt": 2}
        result = pipe("red apple", **given)
        assert pipe.components["vae_decoder"]._opening is None  # the whole graph was not opened
        assert result.configuration["vae_decoder"].precision == "float32"
        pipe.vae_bands = None
        np.testing.assert_allclose(result.images, pipe("red apple", **given).images, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's memory")
@pytest.mark.parametrize("engine", ENGINES)
def test_bands_are_measured_in_a_child(embedded: Bundle, engine: str) -> None:
    entry, options = embedded.manifest.components["vae_decoder"], SessionOptions(threads=1, identity="digest")
    shapes = {"latent_sample": (1, embedded.manifest.numbers.latent_channels, 12, 12)}
    graph = embedded.path / entry.graph
    subject = Subject("vae_decoder", graph, entry, "digest", engine, "cpu", options, shapes, bands=8)
    found = measure(subject)
    assert found.memory is not None and found.memory.running > 0
    assert found.opening == 0 and found.precision == "float32"
    assert (found.kept is None) == (engine == "onnxruntime")


def test_what_can_have_no_bands_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="openvino graphs can't be cut for bands; choose onnx"):
        make_plan("source", tmp_path, target="onnx,openvino", banded_vae=True)
    with pytest.raises(ExportError, match="recipe w8a8 rounds activations, .* choose fp32, fp16 or int8, or use tiles"):
        make_plan("source", tmp_path, recipe="w8a8", banded_vae=True)


def upsampling(mode: str = "nearest", *after: onnx.NodeProto) -> onnx.ModelProto:
    """A convolution, an upsampling of "small" to "large", and more nodes."""
    shape = [1, 2, "h", "w"]
    numbers = {"weight": np.ones((2, 2, 3, 3), np.float32), "bias": np.ones(2, np.float32)}
    numbers |= {"scales": np.array([1, 1, 2, 2], np.float32), "ones": np.ones(2, np.float32)}
    numbers |= {"groups": np.array([0, 2, -1]), "gamma": np.ones((2, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "weight", "bias"], ["small"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["small", "", "scales"], ["large"], mode=mode),
        *after,
    ]
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("x", nodes[-1].output[0])]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in numbers.items()]
    return helper.make_model(helper.make_graph(nodes, "g", *ports, tensors))


def norm(result: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Reshape", ["large", "groups"], ["grouped"]),
        helper.make_node("InstanceNormalization", ["grouped", "ones", "ones"], ["even"], epsilon=1e-6),
        helper.make_node("Shape", ["large"], ["shape"]),
        helper.make_node("Reshape", ["even", "shape"], ["back"]),
        helper.make_node("Mul", ["back", "gamma"], ["scaled"]),
        helper.make_node("Add", ["scaled", "gamma"], [result]),
    ]


def test_graphs_of_other_forms_are_refused() -> None:
    assert [piece.halo for piece in cut(upsampling("nearest", *norm("out")))] == [None, 0, 0]
    with pytest.raises(ExportError, match="no group norm after an upsampling, as in tiny decoders; use tiles"):
        cut(upsampling())
    with pytest.raises(ExportError, match="an upsampling that is not nearest-neighbour"):
        cut(upsampling("linear", *norm("out")))
    softmax = helper.make_node("Softmax", ["normed"], ["out"])
    with pytest.raises(ExportError, match="Softmax is not computed row by row"):
        cut(upsampling("nearest", *norm("normed"), softmax))
    steps = helper.make_node("Conv", ["normed", "weight"], ["out"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    with pytest.raises(ExportError, match="a convolution with steps"):
        cut(upsampling("nearest", *norm("normed"), steps))
    with pytest.raises(ExportError, match="a group norm is followed by Mul, not Add"):
        cut(upsampling("nearest", *norm("normed")[:-1], helper.make_node("Mul", ["scaled", "gamma"], ["out"])))


def test_pieces_that_differ_are_refused(embedded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "MAX_DIFFERENCE", 1e-9)
    entry = replace(embedded.manifest.components["vae_decoder"], bands=())
    feeds = {"latent_sample": np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)}
    with pytest.raises(
        ExportError, match=r"in bands the decoder differs by \S+ \(onnxruntime\) from the whole, more than 1e-09"
    ):
        bands.add_bands(embedded.path, entry, [feeds], ["onnxruntime"])
