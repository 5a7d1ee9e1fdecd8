"""Folders of other exporters: what is read from them, which graphs are taken, and how they are tried."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from pocketdiffusion import Pipeline
from pocketdiffusion.backends import probe as probing
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.probe import Trial, probe
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.models import find_bundle, installed
from pocketdiffusion.bundle.openvino_xml import read_ir
from pocketdiffusion.cli import main
from pocketdiffusion.errors import (
    BackendUnavailable,
    BundleCorrupt,
    BundleNotFound,
    BundleUnsafe,
    BundleUnsupported,
    GraphFailed,
    LoadCrashed,
)

from . import foreign_maker as maker

CPU = "onnxruntime:cpu"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.onnx_folder(tmp_path_factory.mktemp("foreign") / "my model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "my model"))


def config(folder: Path, path: str, **changes: Any) -> None:
    (folder / path).write_text(json.dumps(maker.CONFIGS[path] | changes), encoding="utf-8")


def copies(folder: Path, *suffixes: str, component: str = "unet") -> None:
    for suffix in suffixes:
        shutil.copy(folder / component / "model.onnx", folder / component / f"model{suffix}.onnx")


def test_numbers_come_from_the_configs(folder: Path) -> None:
    bundle = Bundle.open(folder)
    manifest, numbers = bundle.manifest, bundle.manifest.numbers
    assert not bundle.hashed and manifest.name == "my-model" and manifest.family == "sd"
    assert manifest.tasks == ("text-to-image", "image-to-image")
    assert (numbers.width, numbers.height, numbers.vae_factor, numbers.size_multiple) == (16, 16, 2, 4)
    assert (numbers.latent_scale, numbers.latent_shift, numbers.text_length) == (0.5, 0.0, maker.LENGTH)
    assert (numbers.default_steps, numbers.default_guidance) == (25, 7.5)
    assert manifest.components["unet"].inputs["sample"].shape == ("batch", 4, "height", "width")


@pytest.mark.parametrize(
    ("path", "changes", "field", "value"),
    [
        ("vae_decoder/config.json", {"scaling_factor": None}, "latent_scale", 0.18215),
        ("vae_decoder/config.json", {"shift_factor": 0.1}, "latent_shift", 0.1),
        ("vae_decoder/config.json", {"block_out_channels": [8] * 4}, "vae_factor", 8),
        ("unet/config.json", {"block_out_channels": [8] * 3}, "size_multiple", 8),
        ("unet/config.json", {"sample_size": [8, 12]}, "width", 24),
        ("tokenizer/tokenizer_config.json", {"model_max_length": int(1e30)}, "text_length", maker.LENGTH),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "default_steps", 4),
        ("model_index.json", {"_class_name": "LatentConsistencyModelPipeline"}, "default_guidance", 1.0),
        ("model_index.json", {"_name_or_path": "someone/sd-turbo"}, "default_guidance", 1.0),
        ("model_index.json", {"_class_name": "OVStableDiffusionPipeline"}, "default_steps", 25),
    ],
)
def test_each_number_has_its_source(folder: Path, path: str, changes: dict[str, Any], field: str, value: Any) -> None:
    config(folder, path, **changes)
    assert getattr(Bundle.open(folder).manifest.numbers, field) == value


@pytest.mark.parametrize(
    ("path", "changes", "says"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "class 'FluxPipeline'; .*StableDiffusionPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "no graph for text_encoder_2"),
        ("vae_decoder/config.json", {"scaling_factor": "a"}, "vae_decoder/config.json: scaling_factor is 'a'"),
        ("unet/config.json", {"sample_size": -1}, "unet/config.json: sample_size"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps is 0, allowed: a number"),
    ],
)
def test_what_cannot_be_served_is_said(folder: Path, path: str, changes: dict[str, Any], says: str) -> None:
    config(folder, path, **changes)
    with pytest.raises((BundleUnsupported, BundleCorrupt), match=says):
        Bundle.open(folder)


def test_legacy_folders_without_configs_take_stable_diffusions_constants(folder: Path) -> None:
    for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        (folder / name / "config.json").unlink()
    numbers = Bundle.open(folder).manifest.numbers
    assert (numbers.width, numbers.vae_factor, numbers.size_multiple, numbers.latent_scale) == (512, 8, 64, 0.18215)


def test_the_most_precise_variant_is_the_default(folder: Path) -> None:
    copies(folder, "_q4", "_fp16", "_quantized", "_optimized")
    for expected in ("", "_fp16", "_quantized", "_q4", "_optimized"):
        bundle = Bundle.open(folder)
        assert bundle.graph("unet").name == f"model{expected}.onnx"
        assert bool(bundle.notes) == bool(expected)
        bundle.graph("unet").unlink()


def test_a_variant_is_used_or_refused(folder: Path) -> None:
    copies(folder, "_fp16")
    copies(folder, "_fp16", "_q4", component="vae_decoder")
    bundle = Bundle.open(folder, variant="q4")
    assert [bundle.graph(name).name for name in ("unet", "vae_decoder")] == ["model.onnx", "model_q4.onnx"]
    assert any(note.startswith("unet: variant default; there is no q4") for note in bundle.notes)
    assert Bundle.open(folder, variant="fp16").graph("unet").name == "model_fp16.onnx"
    with pytest.raises(
        BundleUnsupported, match="no variant 'int8'; it has .*unet: default, fp16; vae_decoder: default"
    ):
        Bundle.open(folder, variant="int8")


def test_a_bundle_with_a_manifest_has_no_variants(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleUnsupported, match="leave variant out"):
        Bundle.open(tiny_bundle.path, variant="fp16")


def test_the_digest_names_sizes_and_configs(folder: Path) -> None:
    first = Bundle.open(folder).digest
    assert Bundle.open(folder).digest == first
    config(folder, "unet/config.json", act_fn="gelu")
    assert Bundle.open(folder).digest != first


@pytest.mark.skipif(sys.platform == "win32", reason="links")
@pytest.mark.parametrize("external", [False, True])
def test_a_hub_cache_is_read_through_its_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, original: Path
) -> None:
    plain = maker.onnx_folder(tmp_path / "plain", external=external)
    snapshot = maker.cached(plain, tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_bundle("owner/tiny") == find_bundle(tmp_path / "hub/models--owner--tiny") == snapshot
    cached = Pipeline.from_pretrained("owner/tiny", device=CPU)
    assert cached.bundle.manifest.name == "tiny"
    images = [
        pipe("abc", seed=1, num_inference_steps=2, output_type="np").images
        for pipe in (cached, Pipeline.from_pretrained(original, device=CPU))
    ]
    assert (images[0] == images[1]).all()


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_openvino_and_linked_weights_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    snapshot = maker.cached(maker.onnx_folder(tmp_path / "plain", external=True), tmp_path / "hub")
    with pytest.raises(BackendUnavailable, match="openvino does not read weights through a link, and model.onnx_data"):
        Pipeline.from_pretrained(snapshot, device="openvino:cpu")


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        BundleNotFound, match="no such model in the Hugging Face cache .*hub; nothing is downloaded here"
    ):
        find_bundle("owner/missing")
    (tmp_path / "hub/models--owner--two/snapshots/a").mkdir(parents=True)
    (tmp_path / "hub/models--owner--two/snapshots/b").mkdir()
    with pytest.raises(BundleNotFound, match="give the path of one of: a, b"):
        find_bundle("owner/two")


def test_the_models_folder_may_hold_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETDIFFUSION_MODELS", str(folder.parent))
    assert "my model" in [model.name for model in installed()]
    assert find_bundle("my model") == folder


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "unet/model.onnx", tmp_path / "outside.onnx")
    (folder / "unet/model.onnx").symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(BundleUnsafe, match="unet/model.onnx: a link leads out"):
        Bundle.open(folder)


def test_a_graph_that_takes_something_else_is_refused(folder: Path) -> None:
    shutil.copy(folder / "vae_encoder/model.onnx", folder / "unet/model.onnx")
    with pytest.raises(BundleUnsupported, match="unet/model.onnx takes sample; a unet takes sample, timestep"):
        Bundle.open(folder)


def test_a_denoiser_of_another_shape_is_refused(folder: Path) -> None:
    import onnx

    model = onnx.load(str(folder / "unet/model.onnx"))
    model.graph.node[0].attribute[0].ints[:] = [2, 2, 2, 2]
    onnx.save(model, str(folder / "unet/model.onnx"))
    with pytest.raises(GraphFailed, match=r"unet gave \(1, 4, 10, 10\) for latents of \(1, 4, 8, 8\)"):
        Pipeline.from_pretrained(folder, device=CPU)("abc", num_inference_steps=1, seed=1, guidance_scale=1)


def test_inputs_that_change_nothing_are_fed(folder: Path) -> None:
    import onnx

    model = onnx.load(str(folder / "unet/model.onnx"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("return_dict", onnx.TensorProto.BOOL, []))
    onnx.save(model, str(folder / "unet/model.onnx"))
    assert len(Pipeline.from_pretrained(folder, device=CPU)("abc", num_inference_steps=1, seed=1).images) == 1


def test_commands_take_the_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies(folder, "_fp16")
    assert main(["inspect", str(folder), "--variant", "fp16"]) == 0
    assert "there is no fp16 for it" in capsys.readouterr().out
    picture = tmp_path / "a.png"
    assert main(["generate", "abc", "-m", str(folder), "--steps", "1", "--device", CPU, "-o", str(picture)]) == 0
    assert picture.is_file()
    assert main(["verify", str(folder), "--device", CPU]) == 1
    assert "no hashes and no golden tensors to check against" in capsys.readouterr().err


def test_graphs_are_tried_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr("pocketdiffusion.components.probe", lambda trials: tried.append(len(trials)))
    old = 1_600_000_000
    for file in folder.rglob("*"):
        os.utime(file, (old, old))
    monkeypatch.setattr("pocketdiffusion.bundle.integrity._SETTLED_NS", 0)
    for _ in range(3):
        Pipeline.from_pretrained(folder, device=CPU)
    assert tried == [4]
    os.utime(folder / "unet/model.onnx", (old, old + 1))
    Pipeline.from_pretrained(folder, device=CPU)
    assert tried == [4, 4]


def trial(folder: Path) -> Trial:
    return Trial(folder / "unet/model.onnx", "onnxruntime", "cpu", SessionOptions())


@pytest.mark.parametrize(
    ("then", "seconds", "says"),
    [
        ("import os; os.abort()", None, "unet/model.onnx: made the engine end with (signal 6|exit code)"),
        ("import time; time.sleep(60)", 2.0, "unet/model.onnx: kept the engine busy for 2 s"),
        ("sys.exit(3)", None, "unet/model.onnx: made the engine end with exit code 3"),
    ],
)
def test_an_engine_that_dies_or_hangs_is_one_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, then: str, seconds: float | None, says: str
) -> None:
    before, after = probing._CHILD.split("; from")
    patch = (
        f"; import pocketdiffusion.backends.probe as p\ndef die(trial):\n import sys; {then}\np._try = die\nfrom{after}"
    )
    monkeypatch.setattr(probing, "_CHILD", before + patch)
    with pytest.raises(LoadCrashed, match=says):
        probe([trial(folder)], seconds=seconds)


def test_an_engines_refusal_arrives_as_it_is(folder: Path) -> None:
    (folder / "unet/model.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(GraphFailed, match="unet/model.onnx could not be opened on onnxruntime:cpu"):
        probe([trial(folder)])


def test_an_ir_says_what_it_takes_and_gives() -> None:
    text = b"""<net><layers>
    <layer id="0" type="Parameter"><data shape="?,4,1..8,64" element_type="f16"/><output><port id="0" names="9,x/y,x"/>
    </output></layer><layer id="1" type="TensorIterator"><body><layers><layer id="0" type="Parameter"><data shape="1"
    element_type="f32"/><output><port id="0" names="inner"/></output></layer></layers></body>
    <output><port id="2" names="a\\,b"/></output></layer>
    <layer id="2" type="Result"><input><port id="0" precision="I64"><dim>-1</dim><dim>3</dim></port></input></layer>
    </layers><edges><edge from-layer="1" from-port="2" to-layer="2" to-port="0"/></edges></net>"""
    facts = read_ir(text, "a.xml")
    assert facts.inputs == {"x": ("float16", (None, 4, None, 64))}
    assert facts.outputs == {"a,b": ("int64", (None, 3))}
