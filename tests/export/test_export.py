"""The whole stage on a tiny pipeline with random weights, against torch and Diffusers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")

from pocketdiffusion.bundle import parse_manifest  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import Made, export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402
from pocketdiffusion_export.write import assembled  # noqa: E402

pytestmark = pytest.mark.torch

COMPONENTS = {"text_encoder", "unet", "vae_decoder", "vae_encoder"}


def run(source: Path, destination: Path, preset: Path, recipe: str) -> Made:
    (made,) = export(make_plan(source, destination, recipe=recipe, preset=preset), lambda line: None).bundles
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def fp32(tiny: Path, preset: Path, folder: Path) -> Made:
    return run(tiny, folder / "fp32", preset, "fp32")


@pytest.fixture(scope="module")
def int8(tiny: Path, preset: Path, folder: Path) -> Made:
    return run(tiny, folder / "int8", preset, "int8")


def size(made: Made) -> int:
    return sum(entry.size for entry in made.manifest.files if entry.path.endswith(".onnx"))


def test_fp32_equals_its_source(fp32: Made) -> None:
    assert {(item.component, item.engine) for item in fp32.measured} == {
        (name, engine) for name in COMPONENTS for engine in ("onnxruntime", "openvino")
    }
    assert min(item.sqnr_db for item in fp32.measured) >= 60
    assert fp32.manifest.golden_image is not None
    assert fp32.manifest.golden_image.psnr_db >= 50


def test_int8_is_smaller_and_near_its_source(fp32: Made, int8: Made) -> None:
    assert size(int8) < 0.5 * size(fp32)
    assert 25 <= min(item.sqnr_db for item in int8.measured) < 60
    assert {entry.weights for entry in int8.manifest.components.values()} == {"int8"}


def test_manifest_is_what_the_runtime_reads(fp32: Made, folder: Path) -> None:
    manifest = parse_manifest((folder / "fp32/manifest.json").read_bytes())
    assert manifest == fp32.manifest
    assert set(manifest.components) == COMPONENTS
    assert manifest.source.licence == "CC0-1.0"
    assert set(manifest.source.sha256) == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    numbers = manifest.numbers
    assert (numbers.width, numbers.vae_factor, numbers.size_multiple, numbers.text_length) == (32, 2, 4, 16)
    assert (numbers.default_steps, numbers.default_guidance) == (4, 3.0)
    assert numbers.latent_rgb is not None and len(numbers.latent_rgb) == 5
    assert (folder / "fp32/ATTRIBUTIONS.md").read_text(encoding="utf-8") == "nobody\n"
    assert (folder / "fp32/tokenizer/tokenizer.json").is_file()  # the source has vocab.json and merges.txt only


def test_names_and_free_axes(fp32: Made) -> None:
    components = fp32.manifest.components
    assert list(components["text_encoder"].outputs) == [
        "last_hidden_state",
        "pooler_output",
        "clip_skip_1",
        "clip_skip_2",
    ]
    unet = components["unet"]
    assert {name: spec.shape for name, spec in unet.inputs.items()} == {
        "sample": ("batch", 4, "height", "width"),
        "timestep": (),
        "encoder_hidden_states": ("batch", "length", 32),
    }
    assert unet.inputs["timestep"].dtype == "float32"
    assert list(unet.outputs) == ["out_sample"]
    assert list(components["vae_decoder"].inputs) == ["latent_sample"]
    assert components["vae_encoder"].outputs["latent_parameters"].shape[1] == 8


def test_golden_tensors_are_the_sources(folder: Path, fp32: Made, tiny: Path) -> None:
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    golden = load_file(folder / "fp32/golden.safetensors")
    unet = UNet2DConditionModel.from_pretrained(str(tiny / "unet"), low_cpu_mem_usage=False)
    inputs = [golden[f"unet/in/{name}"] for name in ("sample", "timestep", "encoder_hidden_states")]
    with torch.inference_mode():
        torch.testing.assert_close(unet(*inputs).sample, golden["unet/out/out_sample"], rtol=1e-5, atol=1e-5)


def test_the_same_export_gives_the_same_bytes(
    tiny: Path, preset: Path, folder: Path, tmp_path: Path, int8: Made
) -> None:
    run(tiny, tmp_path / "again", preset, "int8")
    first, second = folder / "int8", tmp_path / "again"
    names = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(second) for file in second.rglob("*") if file.is_file())
    assert [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []


def test_no_path_of_this_machine_is_inside(folder: Path, tiny: Path, fp32: Made) -> None:
    words = [str(tiny).encode(), str(folder).encode(), b"site-packages", b"_name_or_path"]
    files = [file for file in (folder / "fp32").rglob("*") if file.is_file()]
    assert [(file.name, word) for file in files for word in words if word in file.read_bytes()] == []


def test_the_graphs_are_clean(folder: Path, fp32: Made) -> None:
    import onnx

    for name in COMPONENTS:
        model = onnx.load(folder / "fp32" / name / "model.onnx")
        assert not {"Identity", "Constant", "Dropout"} & {node.op_type for node in model.graph.node}
        attends = any(node.op_type == "MultiHeadAttention" for node in model.graph.node)
        own = {("com.microsoft", 1)} if attends else set()
        assert {(item.domain, item.version) for item in model.opset_import} == {("", 17)} | own
        assert attends == (name != "text_encoder")
        stored = [(tuple(item.dims), item.raw_data) for item in model.graph.initializer]
        assert len(stored) == len(set(stored))
        used = {name for node in model.graph.node for name in node.input}
        assert {item.name for item in model.graph.initializer} <= used


@pytest.mark.filterwarnings("ignore")  # optimum and what it imports
def test_optimum_opens_the_bundle(folder: Path, fp32: Made) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    from PIL import Image

    pipe = optimum.ORTStableDiffusionPipeline.from_pretrained(str(folder / "fp32"))
    pipe.set_progress_bar_config(disable=True)
    golden = fp32.manifest.golden_image
    assert golden is not None
    generator = torch.Generator("cpu").manual_seed(golden.seed)
    options = {"num_inference_steps": golden.steps, "guidance_scale": golden.guidance, "generator": generator}
    image = np.asarray(pipe(golden.prompt, height=32, width=32, **options).images[0], np.float64)
    expected = np.asarray(Image.open(folder / "fp32/golden.png"), np.float64)
    assert np.square(image - expected).mean() < 255**2 * 10**-5  # 50 dB


@pytest.mark.parametrize(
    "stage", ["loading", "exporting unet", "verifying vae_decoder", "generating the golden image with the exported"]
)
def test_an_error_at_any_stage_leaves_the_old_bundle(stage: str, tiny: Path, preset: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("old", encoding="utf-8")

    def say(line: str) -> None:
        if line.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(make_plan(tiny, bundle, preset=preset), say)
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
    assert [file.name for file in bundle.iterdir()] == ["manifest.json"]
    assert (bundle / "manifest.json").read_text(encoding="utf-8") == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_full_disk_is_one_line(tiny: Path, preset: Path, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ExportError, match=r"writing .* failed: File too large; nothing was replaced"):
            run(tiny, tmp_path / "bundle", preset, "fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(tiny: Path, preset: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    command = [sys.executable, "-m", "pocketdiffusion_export", str(tiny), str(bundle), "--preset", str(preset)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    for line in process.stderr:
        if "verifying unet" in line:
            process.kill()
    process.stderr.close()
    process.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".bundle.partial-") and not (left / "manifest.json").exists()
    with assembled(bundle):
        assert len(list(tmp_path.iterdir())) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_a_figure_under_its_threshold_stops_the_export(
    tiny: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from pocketdiffusion_export import quant

    hard = replace(quant.RECIPES["int8"], min_sqnr_db=90.0)
    monkeypatch.setitem(quant.RECIPES, "int8", hard)
    with pytest.raises(ExportError, match=r"text_encoder reaches .* demands 90 dB; nothing was written"):
        run(tiny, tmp_path / "bundle", preset, "int8")
    assert list(tmp_path.iterdir()) == []
    lines: list[str] = []
    plan = make_plan(tiny, tmp_path / "bundle", recipe="int8", preset=preset, accept_error=True)
    manifest = export(plan, lines.append).bundles[0].manifest
    assert any(line.startswith("accepted: unet reaches") for line in lines)
    for entry in manifest.components.values():
        assert entry.sqnr_db is not None and entry.min_sqnr_db is not None and entry.min_sqnr_db < entry.sqnr_db


def test_quantization_is_recorded(folder: Path, int8: Made) -> None:
    report = json.loads((folder / "int8/quantization.json").read_text(encoding="utf-8"))
    assert set(report) == COMPONENTS
    assert min(min(item["quantized"].values()) for item in report.values()) >= 32
    assert all("fewer than 1024" in reason for item in report.values() for reason in item["kept_float"].values())
    assert report["vae_encoder"]["kept_float"]  # quant_conv has 64 weights


def environment() -> dict[str, str]:
    import os

    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(root / part) for part in ("runtime", "export"))}
