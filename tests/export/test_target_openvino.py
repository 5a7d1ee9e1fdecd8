"""The openvino target: IR that equals the source, keeps integer weights, and is the ONNX bundle's twin."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
openvino = pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.bundle import Bundle  # noqa: E402
from pocketdiffusion.cli import main  # noqa: E402
from pocketdiffusion.errors import BundleCorrupt  # noqa: E402
from pocketdiffusion.verify import psnr_db  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import Made, export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402

pytestmark = pytest.mark.torch

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
TARGETS = "onnx,openvino"


@pytest.fixture(scope="module", params=["fp32", "int8"])
def both(
    request: pytest.FixtureRequest, tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Made, Made]:
    """One export to both targets."""
    folder = tmp_path_factory.mktemp("targets") / request.param
    lines: list[str] = []
    plan = make_plan(tiny, folder, target=TARGETS, recipe=request.param, preset=preset)
    onnx, ir = export(plan, lines.append).bundles
    assert sum(line.startswith("loading") for line in lines) == 1
    assert sum(line.startswith("exporting unet") for line in lines) == 1
    return onnx, ir


def test_each_target_is_a_whole_bundle_in_its_folder(both: tuple[Made, Made]) -> None:
    onnx, ir = both
    assert (onnx.destination.name, ir.destination.name) == ("onnx", "openvino")
    for made in both:
        bundle = Bundle.open(made.destination)
        assert bundle.manifest == made.manifest
        assert bundle.manifest.name == "tiny"
    assert {entry.graph for entry in ir.manifest.components.values()} == {
        f"{name}/openvino_model.xml" for name in COMPONENTS
    }
    assert {item.engine for item in ir.measured} == {"openvino"}


def test_ir_is_as_near_to_the_source_as_onnx_is(both: tuple[Made, Made]) -> None:
    ir = both[1]
    for name in COMPONENTS:
        a, b = (made.manifest.components[name].sqnr_db for made in both)
        assert a is not None and b is not None and abs(a - b) < (3 if ir.manifest.recipe == "fp32" else 0.1)


def test_inputs_and_outputs_are_those_of_the_manifest(both: tuple[Made, Made]) -> None:
    ir = both[1]
    for entry in ir.manifest.components.values():
        model = openvino.Core().read_model(ir.destination / entry.graph)
        for ports, specs in ((model.inputs, entry.inputs), (model.outputs, entry.outputs)):
            assert [port.get_any_name() for port in ports] == list(specs)
            for port, spec in zip(ports, specs.values(), strict=True):
                shape = [None if axis.is_dynamic else axis.get_length() for axis in port.partial_shape]
                assert shape == [size if isinstance(size, int) else None for size in spec.shape]
                assert port.element_type.to_dtype().name == spec.dtype


def test_weights_are_stored_as_the_recipe_says(both: tuple[Made, Made]) -> None:
    ir = both[1]
    kinds: Counter[str] = Counter()
    for entry in ir.manifest.components.values():
        model = openvino.Core().read_model(ir.destination / entry.graph)
        for node in model.get_ops():
            if node.get_type_name() == "Constant" and not node.get_element_type().is_integral_number():
                kinds[node.get_element_type().get_type_name()] += node.get_byte_size()
            elif node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "i8":
                kinds["i8"] += node.get_byte_size()
    stored = {made.manifest.components["unet"].format: unet_bytes(made) for made in both}
    assert stored["openvino"] <= stored["onnx"]
    assert set(kinds) == ({"f32"} if ir.manifest.recipe == "fp32" else {"f32", "i8"})
    if ir.manifest.recipe == "int8":
        assert kinds["i8"] > 5 * kinds["f32"]


def unet_bytes(made: Made) -> int:
    names = ("unet/model.onnx", "unet/openvino_model.bin")
    return sum(entry.size for entry in made.manifest.files if entry.path in names)


def test_both_bundles_make_the_same_image(both: tuple[Made, Made]) -> None:
    images = [
        np.asarray(Pipeline.from_pretrained(made.destination, device="cpu")("red apple", seed=3).images[0])
        for made in both
    ]
    assert psnr_db(*images) >= 50


def test_the_command_line_generates_from_it(
    both: tuple[Made, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "image.png"
    assert main(["generate", "a red apple", "--model", str(both[1].destination), "-o", str(out), "--json"]) == 0
    assert "openvino" in json.dumps(json.loads(capsys.readouterr().out))
    assert out.is_file()


def test_a_bin_that_is_too_short_is_refused(both: tuple[Made, Made], tmp_path: Path) -> None:
    import shutil
    from dataclasses import replace

    from pocketdiffusion.bundle import file_entries
    from pocketdiffusion.bundle.content import check_content

    ir = both[1]
    shutil.copytree(ir.destination, tmp_path / "cut")
    weights = tmp_path / "cut/unet/openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:-100])
    manifest = replace(ir.manifest, files=file_entries(tmp_path / "cut"))
    with pytest.raises(BundleCorrupt, match="openvino_model.xml"):
        check_content(tmp_path / "cut", manifest)


def test_ir_is_what_openvino_genai_reads(both: tuple[Made, Made]) -> None:
    """Names, types, ranks and order of inputs and outputs that openvino_genai 2026.4 relies on without looking.

    Taken from its sources (src/cpp/src/image_generation/models); Text2ImagePipeline itself was run on such a bundle.
    """
    folder = both[1].destination
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert [index[name][1] for name in ("text_encoder", "unet", "vae")] == [
        "CLIPTextModel",
        "UNet2DConditionModel",
        "AutoencoderKL",
    ]
    core = openvino.Core()
    models = {name: core.read_model(folder / name / "openvino_model.xml") for name in COMPONENTS}
    unet = {port.get_any_name(): port for port in models["unet"].inputs}
    assert unet["timestep"].element_type == openvino.Type.i64
    assert list(unet["timestep"].partial_shape) == [1]
    assert unet.keys() == {"sample", "timestep", "encoder_hidden_states"}
    models["unet"].reshape({"sample": [2, 4, 8, 8], "timestep": [1], "encoder_hidden_states": [2, 16, 32]})
    assert models["text_encoder"].output(0).get_any_name() == "last_hidden_state"
    assert models["vae_encoder"].output(0).get_any_name() == "latent_parameters"
    for name in ("text_encoder", "vae_decoder", "vae_encoder"):
        assert len(models[name].inputs) == 1
    for name in ("unet", "vae_decoder", "vae_encoder"):
        assert len(models[name].outputs) == 1
    keys = {"unet": {"in_channels", "sample_size", "time_cond_proj_dim"}, "text_encoder": {"max_position_embeddings"}}
    keys["vae_decoder"] = {"latent_channels", "scaling_factor", "block_out_channels"}
    for name, wanted in keys.items():
        assert wanted <= json.loads((folder / name / "config.json").read_text(encoding="utf-8")).keys()


def test_fractions_of_timesteps_reach_the_graph(both: tuple[Made, Made]) -> None:
    """IR declares whole timesteps; between them its answers are still those of the ONNX graph."""
    images = [
        np.asarray(
            Pipeline.from_pretrained(made.destination, device="cpu")(
                "red apple", seed=3, sampler="euler", schedule="karras", num_inference_steps=5
            ).images[0]
        )
        for made in both
    ]
    assert psnr_db(*images) >= 50


def test_without_its_converter_the_missing_tokenizer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketdiffusion_export.targets import openvino_tokenizer

    monkeypatch.setattr(openvino_tokenizer, "PACKAGE", "no_such_package")
    (note,) = openvino_tokenizer.write_tokenizers(tmp_path)
    assert "no openvino_tokenizer.xml, without which openvino_genai can't load it; pip install" in note


def test_tokenizers_are_converted_beside_their_sources(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the converter, whose node names differ from call to call as the true one's do."""
    import itertools
    import shutil
    import types

    from openvino import opset13 as opset

    from pocketdiffusion_export.targets import openvino_tokenizer

    count, given = itertools.count(), []

    def convert(tokenizer: Any, *, truncation: bool) -> Any:
        given.append((tokenizer.model_max_length, truncation))
        text = opset.parameter([-1], openvino.Type.i64, name=f"Parameter_{next(count)}")
        text.output(0).get_tensor().set_names({f"Parameter_{next(count)}"})
        ids = opset.add(text, opset.constant(1, openvino.Type.i64), name=f"x{next(count)}")
        ids.output(0).get_tensor().set_names({"input_ids"})
        return openvino.Model([ids], [text], "tokenizer")

    package = types.ModuleType("openvino_tokenizers")
    package.convert_tokenizer = convert  # type: ignore[attr-defined]
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", package)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny / "tokenizer", tmp_path / name)
    assert openvino_tokenizer.write_tokenizers(tmp_path) == ()
    assert given == [(16, True)] * 2
    for kind in ("xml", "bin"):
        one, two = (tmp_path / name / f"openvino_tokenizer.{kind}" for name in ("tokenizer", "tokenizer_2"))
        assert one.read_bytes() == two.read_bytes()


def test_the_same_export_gives_the_same_bytes(tiny: Path, preset: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(make_plan(tiny, tmp_path / name, target="openvino", recipe="int8", preset=preset), lambda line: None)
    one, two = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_nothing_of_this_machine_is_inside(both: tuple[Made, Made], tiny: Path) -> None:
    words = [str(tiny), str(both[1].destination.parent), "site-packages", "conversion_parameters", ".onnx-", "/tmp"]
    for file in both[1].destination.rglob("*.xml"):
        text = file.read_text(encoding="utf-8")
        assert [word for word in words if word in text] == []


@pytest.mark.parametrize("kind", ["bundle", "file"])
def test_several_targets_need_a_folder_that_is_no_bundle(kind: str, tiny: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if kind == "bundle":
        place.mkdir()
        (place / "manifest.json").write_text("old", encoding="utf-8")
    else:
        place.write_text("words", encoding="utf-8")
    with pytest.raises(ExportError, match="several targets|can't write"):
        export(make_plan(tiny, place, target=TARGETS), lambda line: None)
    assert [file.name for file in tmp_path.rglob("*")] == ["place", *(["manifest.json"] if kind == "bundle" else [])]


def test_without_the_engine_it_says_so(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketdiffusion import backends

    def devices() -> list[Any]:
        return []

    monkeypatch.setattr(backends.load("openvino"), "devices", devices)
    with pytest.raises(ExportError, match="verifying openvino graphs needs openvino; install it"):
        export(make_plan(tiny, tmp_path / "bundle", target="openvino"), lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_full_disk_is_one_line(tiny: Path, preset: Path, tmp_path: Path) -> None:
    """The limit lies between the text encoder's int8 ONNX file, 63 kB, and its .xml, 100 kB."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, hard))
    try:
        plan = make_plan(tiny, tmp_path / "bundle", target="openvino", recipe="int8", preset=preset)
        with pytest.raises(ExportError, match="writing openvino_model.xml failed .*is the disk full"):
            export(plan, lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_quantized_activations_and_their_integer_weights_survive(tmp_path: Path) -> None:
    import onnx

    from pocketdiffusion import backends
    from pocketdiffusion.backends import SessionOptions
    from pocketdiffusion_export.targets.onnx import TARGET as ONNX
    from pocketdiffusion_export.targets.openvino import TARGET

    ONNX.save(qdq_convolution(onnx), tmp_path / "model.onnx")
    TARGET.save(qdq_convolution(onnx), tmp_path / "model.xml")
    nodes = openvino.Core().read_model(tmp_path / "model.xml").get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    assert "FakeQuantize" in {node.get_type_name() for node in nodes}
    assert "i8" in {node.get_element_type().get_type_name() for node in constants}
    x = np.random.default_rng(1).standard_normal((2, 8, 10, 12)).astype(np.float32)
    ours = backends.load("openvino").open(tmp_path / "model.xml", "cpu", SessionOptions()).run({"x": x})["y"]
    theirs = backends.load("onnxruntime").open(tmp_path / "model.onnx", "cpu", SessionOptions()).run({"x": x})["y"]
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def qdq_convolution(onnx: Any) -> Any:
    """A convolution of uint8 activations with int8 weights."""
    make, array = onnx.helper, onnx.numpy_helper.from_array
    weight = np.random.default_rng(0).integers(-127, 128, (16, 8, 3, 3)).astype(np.int8)
    tensors = [array(weight, "w8"), array(np.full(16, 0.01, np.float32), "ws")]
    tensors += [array(np.array(0.02, np.float32), "s"), array(np.array(128, np.uint8), "z")]
    nodes = [
        make.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        make.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        make.make_node("DequantizeLinear", ["w8", "ws"], ["w"], axis=0),
        make.make_node("Conv", ["d", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    x, y = (make.make_tensor_value_info(name, 1, ["n", size, "h", "w_"]) for name, size in (("x", 8), ("y", 16)))
    graph = make.make_graph(nodes, "graph", [x], [y], tensors)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)


def test_float16_weights_are_stored_as_float16(tmp_path: Path) -> None:
    import onnx

    from pocketdiffusion_export.targets.openvino import TARGET

    make = onnx.helper
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float16), "w16")
    nodes = [make.make_node("Cast", ["w16"], ["w"], to=1), make.make_node("MatMul", ["x", "w"], ["y"])]
    x, y = (make.make_tensor_value_info(name, 1, ["n", 64]) for name in ("x", "y"))
    graph = make.make_graph(nodes, "graph", [x], [y], [weight])
    TARGET.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), tmp_path / "m.xml")
    assert 64 * 64 * 2 <= (tmp_path / "m.bin").stat().st_size < 64 * 64 * 2 + 64
