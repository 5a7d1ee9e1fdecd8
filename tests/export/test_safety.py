"""The CLIP safety checker: graph, preprocessing and decision against Diffusers' and transformers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.backends import SessionOptions  # noqa: E402
from pocketdiffusion.cli import main  # noqa: E402
from pocketdiffusion.safety import Preprocessing, unsafe  # noqa: E402
from pocketdiffusion.timing import Timings  # noqa: E402
from pocketdiffusion.verify import verify  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.source import load  # noqa: E402

from . import family_sources as sources  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

SIDE = 32


def checker() -> Any:
    """Random concepts, with thresholds so near to the scores that random pictures fall on both sides."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = {**shape, "image_size": SIDE, "patch_size": 8, "projection_dim": 16}
    torch.manual_seed(3)
    model = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    for name, tensor in model.named_parameters():
        if "embed" in name or "projection" in name:
            tensor.data.normal_()
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(torch.from_numpy(inputs(random_pixels(32))))[1])
        for part in ("concept", "special_care"):
            embeds = torch.nn.functional.normalize(getattr(model, f"{part}_embeds"))
            cosines = torch.nn.functional.normalize(seen) @ embeds.t()
            getattr(model, f"{part}_embeds_weights").copy_(cosines.quantile(0.97, 0))
    return model


def extractor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def random_pixels(count: int, height: int = 48, width: int = 40) -> np.ndarray:
    """Blurred noise of many colours."""
    random = np.random.default_rng(1)
    small = random.integers(0, 256, (count, 6, 5, 3)).astype(np.uint8)
    resized = [Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC) for pixels in small]
    return np.stack([np.asarray(picture) for picture in resized])


def inputs(pixels: np.ndarray) -> np.ndarray:
    pictures = [Image.fromarray(picture) for picture in pixels]
    return extractor()(pictures, return_tensors="np").pixel_values


def make(folder: Path) -> Any:
    parts = {"safety_checker": checker(), "feature_extractor": extractor()}
    return sources.sd(folder, diffusers.StableDiffusionPipeline, **parts)


@pytest.mark.parametrize("shape", [(32, 32), (48, 40), (40, 48), (33, 97), (512, 512), (20, 24)])
def test_preprocessing_is_clips(shape: tuple[int, int]) -> None:
    pixels = random_pixels(2, *shape)
    found = np.concatenate([Preprocessing(SIDE)(picture) for picture in pixels])
    np.testing.assert_allclose(found, inputs(pixels), atol=1e-5)


@pytest.mark.parametrize("device", sources.DEVICES)
def test_scores_are_diffusers(ours: dict[str, Pipeline], theirs: Any, device: str) -> None:
    pixels = inputs(random_pixels(4))
    with torch.no_grad():
        image = theirs.safety_checker.visual_projection(theirs.safety_checker.vision_model(torch.from_numpy(pixels))[1])
    found = ours[device].components["safety_checker"].run({"clip_input": pixels}, Timings())
    for name, part in (("special_scores", "special_care"), ("concept_scores", "concept")):
        embeds, thresholds = (getattr(theirs.safety_checker, f"{part}_embeds{end}") for end in ("", "_weights"))
        expected = torch.nn.functional.cosine_similarity(image[:, None], embeds[None], dim=-1) - thresholds
        np.testing.assert_allclose(found[name], expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("device", sources.DEVICES)
def test_flags_and_black_pictures_are_diffusers(ours: dict[str, Pipeline], theirs: Any, device: str) -> None:
    pixels = random_pixels(32)
    images = pixels.astype(np.float32) / np.float32(127.5) - 1
    expected, flags = theirs.safety_checker(images=images.copy() + 1, clip_input=torch.from_numpy(inputs(pixels)))
    assert ours[device].safety_checker is not None
    assert ours[device].safety_checker.black_out(images, Timings()) == flags
    assert 0 < sum(flags) < len(flags)
    np.testing.assert_array_equal(images + 1, expected)


@pytest.mark.parametrize("special", [-0.01, 0.0004, 0.0006])
@pytest.mark.parametrize("concept", [-0.02, -0.0097, -0.0093, 0.0004, 0.0006])
def test_the_decision_is_diffusers(special: float, concept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are rounded to three digits, and a special concept lowers the thresholds of the others."""
    from diffusers.pipelines.stable_diffusion import safety_checker as module

    model = checker()
    model.special_care_embeds_weights.data.zero_()
    model.concept_embeds_weights.data.zero_()
    scores = iter([torch.full((1, 3), special), torch.full((1, 17), concept)])
    monkeypatch.setattr(module, "cosine_distance", lambda *_: next(scores))
    _, (expected,) = model(images=np.ones((1, 4, 4, 3)), clip_input=torch.zeros(1, 3, SIDE, SIDE))
    assert unsafe(np.full(3, special, np.float32), np.full(17, concept, np.float32)) == expected


def test_the_bundle_holds_it_and_verifies(made: Any, ours: dict[str, Pipeline]) -> None:
    entry = made.manifest.components["safety_checker"]
    assert list(entry.inputs) == ["clip_input"] and entry.inputs["clip_input"].shape == ("batch", 3, SIDE, SIDE)
    assert min(item.sqnr_db for item in made.measured) >= 60 and made.manifest.golden_image.psnr_db >= 50
    checks = list(verify(ours["onnxruntime:cpu"].bundle, "onnxruntime:cpu", SessionOptions()))
    assert [check.subject for check in checks if not check.passed] == []


def of_diffusers(theirs: Any, prompts: list[str], seeds: range) -> Any:
    generators = [sources.generator(seed) for seed in seeds]
    return theirs(prompts, num_inference_steps=4, generator=generators, output_type="np")


def test_it_runs_by_default_and_says_so(ours: dict[str, Pipeline], theirs: Any) -> None:
    pipe, prompts = ours["onnxruntime:cpu"], ["cat"] * 12
    expected = of_diffusers(theirs, prompts, range(12))
    found = pipe(prompts, seed=0, num_inference_steps=4, output_type="np")
    assert found.nsfw_content_detected == expected.nsfw_content_detected
    assert 0 < sum(found.nsfw_content_detected) < 12, "the test shows nothing: move the thresholds"
    for ours_, theirs_, flag in zip(found.images, expected.images, found.nsfw_content_detected, strict=True):
        assert (ours_.max() == 0) == (theirs_.max() == 0) == flag
    bad = found.nsfw_content_detected.index(True)
    assert found.pixels is not None and found.pixels[bad].max() == 0
    assert (
        f"image {bad + 1} is black: the safety checker takes it for unsafe; try another prompt or seed"
        in found.messages
    )
    assert "safety_checker" in found.configuration
    assert pipe("cat", seed=0, num_inference_steps=1, output_type="latent").nsfw_content_detected is None


def test_it_can_be_switched_off(twins: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = twins.folder / "bundle"
    pipe = Pipeline.from_pretrained(bundle, device="onnxruntime:cpu", safety_checker=None)
    found = pipe(["cat"] * 12, seed=0, num_inference_steps=4)
    assert found.nsfw_content_detected is None and found.pixels.max(axis=(1, 2, 3)).min() > 0
    assert found.messages == ("the model's safety checker is switched off; the pictures were not checked",)
    words = ["generate", "cat", "-m", str(bundle), "--steps", "1", "-o", str(tmp_path / "a.png"), "--json"]
    for flag, expected in (([], list), (["--no-safety-checker"], type(None))):
        assert main([*words, *flag]) == 0
        printed = capsys.readouterr()
        assert isinstance(json.loads(printed.out)["nsfw_content_detected"], expected)
        assert ("switched off" in printed.err) == bool(flag)


@pytest.fixture
def source(twins: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(twins.folder / "source", tmp_path / "source"))


def test_an_index_that_names_none_exports_none(source: Path) -> None:
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (source / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    assert load(str(source)).pipe.safety_checker is None


def test_a_missing_checker_and_a_pickled_one_are_one_line(source: Path) -> None:
    (source / "safety_checker/model.safetensors").rename(source / "safety_checker/pytorch_model.bin")
    with pytest.raises(
        ExportError, match=r"needs model.safetensors; found only pytorch_model.bin \(pickle, never read\)"
    ):
        load(str(source))
    shutil.rmtree(source / "safety_checker")
    with pytest.raises(ExportError, match=r"names a safety_checker, which the folder lacks; .* write \[null, null\]"):
        load(str(source))


def test_the_old_name_of_the_preprocessing_is_known(source: Path) -> None:
    text = (source / "model_index.json").read_text(encoding="utf-8")
    (source / "model_index.json").write_text(
        text.replace("CLIPImageProcessor", "CLIPFeatureExtractor"), encoding="utf-8"
    )
    assert load(str(source)).pipe.feature_extractor.crop_size == {"height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def legacy(twins: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """optimum's folder with the checker as Diffusers' old exporter wrote it, which optimum leaves out."""
    main_export = pytest.importorskip("optimum.exporters.onnx").main_export
    folder, model = tmp_path_factory.mktemp("legacy") / "onnx", checker()
    main_export(str(twins.folder / "source"), folder, task="text-to-image", do_validation=False)
    (folder / "safety_checker").mkdir()
    model.forward = model.forward_onnx
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, SIDE, SIDE, 3)),
        str(folder / "safety_checker/model.onnx"),
        input_names=["clip_input", "images"],
        output_names=["out_images", "has_nsfw_concepts"],
        dynamic_axes={
            "clip_input": {0: "batch", 1: "channels", 2: "height", 3: "width"},
            "images": {0: "batch", 1: "height", 2: "width", 3: "channels"},
        },
        opset_version=14,
        dynamo=False,
    )
    return folder


@pytest.mark.parametrize("device", sources.DEVICES)
def test_graphs_of_the_old_exporter_flag_the_same(legacy: Path, device: str) -> None:
    pipe, model, pixels = Pipeline.from_pretrained(legacy, device=device), checker(), random_pixels(32)
    _, expected = model.forward_onnx(torch.from_numpy(inputs(pixels)), torch.ones(32, 4, 4, 3))
    assert pipe.safety_checker is not None
    found = pipe.safety_checker.black_out(pixels.astype(np.float32) / np.float32(127.5) - 1, Timings())
    assert found == expected.tolist() and 0 < sum(found) < 32
    assert len(pipe("cat", seed=0, num_inference_steps=1).nsfw_content_detected) == 1


def test_optimum_loads_the_bundle(twins: Any) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    pipe = optimum.ORTStableDiffusionPipeline.from_pretrained(str(twins.folder / "bundle"))
    pipe.set_progress_bar_config(disable=True)
    ours = Pipeline.from_pretrained(twins.folder / "bundle", device="onnxruntime:cpu", safety_checker=None)
    assert sources.compare(ours, pipe, guidance_scale=5.0, height=32, width=32) >= 50
