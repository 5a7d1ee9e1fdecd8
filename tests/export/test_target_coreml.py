"""The coreml target: bundles with Apple's names, checked without Core ML, that run on a stand-in for Core ML.

The stand-in gives the backend of the runtime a `coremltools` whose models compute in torch from the package.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ct = pytest.importorskip("coremltools")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.backends import coreml  # noqa: E402
from pocketdiffusion.backends.apple import described  # noqa: E402
from pocketdiffusion.bundle import Bundle  # noqa: E402
from pocketdiffusion.bundle.paths import check_paths  # noqa: E402
from pocketdiffusion.cli import main  # noqa: E402
from pocketdiffusion.errors import BundleError, InvalidRequest  # noqa: E402
from pocketdiffusion.tensors import TensorSpec  # noqa: E402
from pocketdiffusion_export import read_back  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import Made, export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402
from pocketdiffusion_export.quant import RECIPES  # noqa: E402
from pocketdiffusion_export.registry import lookup  # noqa: E402
from pocketdiffusion_export.targets import TARGETS  # noqa: E402
from pocketdiffusion_export.targets.coreml_program import Program  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

PACKAGES = {
    "text_encoder": "TextEncoder.mlpackage",
    "unet": "Unet.mlpackage",
    "vae_decoder": "VAEDecoder.mlpackage",
    "vae_encoder": "VAEEncoder.mlpackage",
}


@pytest.fixture(scope="module")
def both(tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """One int8 export to ONNX and Core ML."""
    folder = tmp_path_factory.mktemp("coreml") / "both"
    plan = make_plan(tiny, folder, target="onnx,coreml", recipe="int8", size="32x32", preset=preset)
    onnx, apple = export(plan, lambda line: None).bundles
    return onnx, apple


@pytest.fixture(scope="module")
def made(both: tuple[Made, Made]) -> Made:
    return both[1]


class Unit(Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


class Model:
    """Stands in for coremltools' MLModel."""

    def __init__(self, path: str, compute_units: Unit) -> None:
        self.program = Program(Path(path))

    def get_spec(self) -> Any:
        return self.program.spec

    def predict(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.program.run(feeds)


@pytest.fixture
def on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(__version__="9.0", ComputeUnit=Unit, models=SimpleNamespace(MLModel=Model))
    monkeypatch.setattr(coreml, "_engine", lambda: engine)
    monkeypatch.setattr(read_back, "needed", lambda format: False)


def test_files_lie_where_apple_s_tools_look(made: Made) -> None:
    folder = made.destination
    assert {name: entry.graph for name, entry in made.manifest.components.items()} == PACKAGES
    for name in PACKAGES.values():
        parts = {file.relative_to(folder / name).as_posix() for file in (folder / name).rglob("*") if file.is_file()}
        data = "Data/com.apple.CoreML"
        assert parts == {"Manifest.json", f"{data}/model.mlmodel", f"{data}/weights/weight.bin"}
    for name in ("merges.txt", "vocab.json"):
        assert (folder / name).read_bytes() == (folder / "tokenizer" / name).read_bytes()
    check_paths([entry.path for entry in made.manifest.files], "manifest.json")


def test_the_runtime_opens_the_bundle(made: Made) -> None:
    bundle = Bundle.open(made.destination)
    assert bundle.manifest == made.manifest
    assert bundle.graph("unet") == made.destination.resolve() / "Unet.mlpackage"


def test_graphs_have_apple_s_names_and_layouts(made: Made) -> None:
    wanted = {
        "text_encoder": ({"input_ids": (1, 16)}, {"last_hidden_state", "pooled_outputs", "clip_skip_1", "clip_skip_2"}),
        "unet": (
            {"sample": (2, 4, 16, 16), "timestep": (2,), "encoder_hidden_states": (2, 32, 1, 16)},
            {"noise_pred"},
        ),
        "vae_decoder": ({"z": (1, 4, 16, 16)}, {"image"}),
        "vae_encoder": ({"x": (1, 3, 32, 32)}, {"latent"}),
    }
    for name, entry in made.manifest.components.items():
        spec = ct.models.MLModel(str(made.destination / entry.graph), skip_model_load=True).get_spec()
        assert (spec.WhichOneof("Type"), spec.specificationVersion) == ("mlProgram", 7)
        inputs, outputs, precision = coreml.package_description(spec)
        assert ({key: found.shape for key, found in inputs.items()}, set(outputs)) == wanted[name]
        assert {found.dtype for found in (*inputs.values(), *outputs.values())} == {"float32"}
        assert precision == ("float32" if name.startswith("vae") else "float16")
        assert described(inputs, outputs) == (dict(entry.inputs), dict(entry.outputs))
    assert made.manifest.components["unet"].inputs == {
        "sample": TensorSpec("float32", ("batch", 4, 16, 16)),
        "timestep": TensorSpec("float32", ()),
        "encoder_hidden_states": TensorSpec("float32", ("batch", 16, 32)),
    }


def test_nothing_claims_that_core_ml_was_run(made: Made) -> None:
    manifest = made.manifest
    assert {entry.sqnr_db for entry in manifest.components.values()} == {None}
    assert {entry.min_sqnr_db for entry in manifest.components.values()} == {RECIPES["int8"].min_sqnr_db}
    assert manifest.golden_image is not None
    assert (manifest.golden_image.psnr_db, manifest.golden_image.min_psnr_db) == (None, 25)
    assert {item.engine for item in made.measured} == {"read back in torch"}
    readme = (made.destination / "README.md").read_text(encoding="utf-8")
    for text in (made.notes[0], readme):
        assert "Not run: Core ML runs on macOS only. Checked: structure, inputs and outputs; every weight" in text
    assert "not generated with this bundle; `golden.png` is the source's" in readme


def test_programs_compute_what_the_source_does(both: tuple[Made, Made]) -> None:
    figures = [{item.component: item.sqnr_db for item in made.measured} for made in both]
    for name, figure in figures[1].items():
        assert figure >= 25 and abs(figure - figures[0][name]) < 1, name


def test_every_weight_is_compared_with_the_source_s(made: Made) -> None:
    figures = json.loads((made.destination / "weights.json").read_text(encoding="utf-8"))
    quantized = json.loads((made.destination / "quantization.json").read_text(encoding="utf-8"))
    assert figures.keys() == PACKAGES.keys()
    for name, report in quantized.items():
        for weight, figure in report["quantized"].items():
            assert abs(figures[name][weight] - figure) < 0.2
        assert set(report["quantized"]) <= set(figures[name])


def test_size(both: tuple[Made, Made]) -> None:
    onnx, apple = (
        sum(entry.size for entry in made.manifest.files if "weight.bin" in entry.path or "onnx" in entry.path)
        for made in both
    )
    assert apple < onnx


def test_the_runtime_generates_with_it(made: Made, on_macos: None) -> None:
    pipe = Pipeline.from_pretrained(made.destination, device="coreml:cpu")
    golden = made.manifest.golden_image
    assert golden is not None
    images = pipe(golden.prompt, num_images_per_prompt=3, seed=golden.seed, num_inference_steps=2).images
    assert [np.asarray(image).shape for image in images] == [(32, 32, 3)] * 3
    with pytest.raises(InvalidRequest, match="64x32 was asked; tiny is fixed to 32x32"):
        pipe(golden.prompt, width=64)


def test_verify_where_core_ml_is(made: Made, on_macos: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made.destination), "--device", "coreml:cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checks"]
    assert {check["subject"] for check in found} == {*PACKAGES, "image"}
    assert all(check["figure"] >= check["wanted"] >= 25 for check in found)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is here")
def test_verify_where_it_is_not(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made.destination)]) == 1
    error = capsys.readouterr().err
    assert "coreml" in error and "no engine is installed" in error and "on macOS only" in error


def test_an_export_where_core_ml_is_runs_it(tiny: Path, preset: Path, tmp_path: Path, on_macos: None) -> None:
    plan = make_plan(tiny, tmp_path / "bundle", target="coreml", recipe="fp32", size="32x32", preset=preset)
    (found,) = export(plan, lambda line: None).bundles
    assert {item.engine for item in found.measured} == {"coreml"} and found.notes == ()
    assert all((entry.sqnr_db or 0) >= 60 for entry in found.manifest.components.values())
    assert found.manifest.golden_image is not None and (found.manifest.golden_image.psnr_db or 0) >= 50
    assert not (found.destination / "weights.json").exists()


def test_a_weight_that_was_written_wrongly_is_seen(made: Made, tmp_path: Path) -> None:
    entry, package = made.manifest.components["unet"], tmp_path / "Unet.mlpackage"
    shutil.copytree(made.destination / entry.graph, package)
    source = {name: weight.astype(np.float32) for name, weight in dict(Program(package).weights()).items()}
    names = {
        name.removesuffix("_linear"): weight.T if name.endswith("_linear") else weight
        for name, weight in source.items()
    }
    assert min(read_back.compare(package, entry, names).values()) == 200
    file = package / "Data/com.apple.CoreML/weights/weight.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    file.write_bytes(bytes(data))
    assert min(read_back.compare(package, entry, names).values()) < 20
    with pytest.raises(ExportError, match="Unet.mlpackage takes or gives something else than the manifest says"):
        read_back.compare(package, replace(entry, outputs={}), names)


@pytest.fixture(scope="module")
def chunked(tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same as `made`, with its UNet in two."""
    folder = tmp_path_factory.mktemp("coreml") / "chunked"
    plan = make_plan(tiny, folder, target="coreml", recipe="int8", size="32x32", preset=preset, chunk_unet=True)
    (found,) = export(plan, lambda line: None).bundles
    return found


def test_a_unet_in_two_chunks_has_apple_s_names(made: Made, chunked: Made) -> None:
    entry = chunked.manifest.components["unet"]
    assert entry == replace(made.manifest.components["unet"], graph="UnetChunk1.mlpackage")
    sizes = {name: 0 for name in ("UnetChunk1.mlpackage", "UnetChunk2.mlpackage")}
    for file in chunked.manifest.files:
        if (name := file.path.partition("/")[0]) in sizes:
            sizes[name] += file.size
    assert not (chunked.destination / "Unet.mlpackage").exists()
    assert min(sizes.values()) > 0.25 * sum(sizes.values())
    specs = [
        coreml.package_description(ct.models.MLModel(str(chunked.destination / name), skip_model_load=True).get_spec())
        for name in sizes
    ]
    (first, handed, _), (second, outputs, _) = specs
    assert list(outputs) == ["noise_pred"] and {"sample", "timestep"} <= first.keys()
    assert set(handed) == {name for name in second if name.startswith("state_")}
    assert set(second) - set(handed) <= {"timestep", "encoder_hidden_states"}
    assert {spec.dtype for spec in (*handed.values(), *second.values())} == {"float32"}


def test_chunks_compute_what_the_whole_does_bit_for_bit(made: Made, chunked: Made) -> None:
    feeds = {
        name: np.random.default_rng(0).normal(size=(2, *spec.shape[1:])).astype(np.float32)
        for name, spec in made.manifest.components["unet"].inputs.items()
        if spec.shape
    }
    found = [
        read_back.open_session(bundle.destination / bundle.manifest.components["unet"].graph).run(
            {**feeds, "timestep": np.float32(500)}
        )["out_sample"]
        for bundle in (made, chunked)
    ]
    assert np.array_equal(*found)


def test_every_weight_of_both_chunks_is_compared(made: Made, chunked: Made) -> None:
    figures = [
        json.loads((bundle.destination / "weights.json").read_text(encoding="utf-8")) for bundle in (made, chunked)
    ]
    assert figures[0] == figures[1]


def test_verify_runs_both_chunks(chunked: Made, on_macos: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(chunked.destination), "--device", "coreml:cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checks"]
    assert all(check["figure"] >= check["wanted"] >= 25 for check in found)


def test_only_core_ml_has_chunks() -> None:
    with pytest.raises(ExportError, match="onnx graphs have no chunks, coreml's have; give --part-size"):
        make_plan("source", "bundle", chunk_unet=True)


def test_without_its_manifest_it_is_no_bundle(made: Made, tmp_path: Path) -> None:
    """Folders of ml-stable-diffusion lack the numbers and the scheduler that the runtime needs: they are not read."""
    folder = tmp_path / "bundle"
    shutil.copytree(made.destination, folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "size", "words"),
    [
        ("fp16", "dynamic", "coreml graphs are fixed to one image size, the size is free; give one, e.g. --size"),
        ("fp16", "64x64,32x32", "fixed to one image size, 2 sizes were asked for; give one"),
        ("int4", "64x64", "recipe int4 can't be written for coreml; choose fp32, fp16, int8, palette4, palette6"),
        ("w8a8", "64x64", "recipe w8a8 can't be written for coreml"),
    ],
)
def test_what_core_ml_can_not_have(recipe: str, size: str, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        make_plan("source", "bundle", target="coreml", recipe=recipe, size=size)


def test_without_coremltools_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pocketdiffusion_export.targets.coreml", raising=False)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ExportError, match="the target coreml needs coremltools .*; install: pip install"):
        lookup(TARGETS, "target", "coreml")


def test_the_same_export_gives_the_same_bytes(made: Made, tiny: Path, preset: Path, tmp_path: Path) -> None:
    plan = make_plan(tiny, tmp_path / "again", target="coreml", recipe="int8", size="32x32", preset=preset)
    (again,) = export(plan, lambda line: None).bundles
    assert [entry for entry in again.manifest.files if ".mlpackage" in entry.path] == [
        entry for entry in made.manifest.files if ".mlpackage" in entry.path
    ]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp16", "palette4", "palette6", "palette-mixed"])
def test_every_recipe(recipe: str, tiny: Path, preset: Path, tmp_path: Path) -> None:
    plan = make_plan(tiny, tmp_path / "bundle", target="coreml", recipe=recipe, size="32x32", preset=preset)
    (found,) = export(plan, lambda line: None).bundles
    figures = json.loads((found.destination / "weights.json").read_text(encoding="utf-8"))
    least = {"fp16": 70, "palette4": 15, "palette6": 25, "palette-mixed": 8}[recipe]
    assert min(min(weights.values()) for weights in figures.values()) >= least
    assert {entry.weights for entry in found.manifest.components.values()} == {RECIPES[recipe].weights}


@pytest.mark.slow
def test_sdxl(preset: Path, tmp_path: Path, on_macos: None) -> None:
    from .test_family_sdxl import make

    make(tmp_path / "source")
    plan = make_plan(tmp_path / "source", tmp_path / "bundle", target="coreml", size="32x32", preset=preset)
    (found,) = export(plan, lambda line: None).bundles
    second = ct.models.MLModel(str(found.destination / "TextEncoder2.mlpackage"), skip_model_load=True).get_spec()
    assert {"hidden_embeds", "pooled_outputs"} <= {output.name for output in second.description.output}
    assert all((entry.sqnr_db or 0) >= 60 for entry in found.manifest.components.values())
    assert found.manifest.golden_image is not None and (found.manifest.golden_image.psnr_db or 0) >= 50
