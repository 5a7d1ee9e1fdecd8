"""SDXL: the exported components and whole images against Diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.errors import BundleUnsupported  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.families.sdxl import FAMILY  # noqa: E402
from pocketdiffusion_export.source import load  # noqa: E402

from . import family_sources as tiny  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def make(folder: Path) -> Any:
    return tiny.sdxl(folder)


def test_every_component_equals_its_source(made: Any) -> None:
    names = {"text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"}
    assert {item.component for item in made.measured} == names
    assert min(item.sqnr_db for item in made.measured) >= 60


def test_names_are_optimums(made: Any) -> None:
    components = made.manifest.components
    assert list(components["unet"].inputs) == [
        "sample",
        "timestep",
        "encoder_hidden_states",
        "text_embeds",
        "time_ids",
    ]
    states = [f"hidden_states.{index}" for index in range(5)]
    assert list(components["text_encoder_2"].outputs) == ["text_embeds", "last_hidden_state", *states]
    assert list(components["text_encoder"].outputs)[:2] == ["last_hidden_state", "pooler_output"]
    assert made.manifest.numbers.latent_scale == 0.13025


@pytest.mark.parametrize("device", tiny.DEVICES)
@pytest.mark.parametrize("fields", [{}, {"negative_prompt": "cat"}], ids=str)
def test_the_same_image(ours: dict[str, Pipeline], theirs: Any, device: str, fields: dict[str, Any]) -> None:
    assert tiny.compare(ours[device], theirs, guidance_scale=5.0, **fields) >= 50


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 1.0},
        {"width": 48, "height": 24},
        {"original_size": (100, 64), "crops_coords_top_left": (8, 4), "target_size": (48, 40)},
    ],
    ids=str,
)
def test_every_parameter_means_the_same(ours: dict[str, Pipeline], theirs: Any, fields: dict[str, Any]) -> None:
    assert tiny.compare(ours["onnxruntime:cpu"], theirs, **{"guidance_scale": 5.0, **fields}) >= 50


def test_clip_skip_counts_from_the_penultimate_layer(ours: dict[str, Pipeline], theirs: Any) -> None:
    pipe = ours["onnxruntime:cpu"]
    assert tiny.compare(pipe, theirs, clip_skip=1, guidance_scale=1.0) >= 50
    with pytest.raises(BundleUnsupported, match="clip_skip=5"):
        pipe("cat", seed=0, clip_skip=5)


def test_no_negative_prompt_is_zeros_or_the_empty_text_as_the_model_says(
    ours: dict[str, Pipeline], theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ours["onnxruntime:cpu"]
    common = {"seed": 1, "num_inference_steps": 4, "output_type": "latent"}
    zeros, empty = (pipe("cat", negative_prompt=text, **common).images for text in (None, ""))
    assert not np.allclose(zeros, empty)
    monkeypatch.setattr(type(pipe._family), "_zeros_for_empty", False)
    assert np.array_equal(pipe("cat", **common).images, empty)


def test_several_prompts_and_long_ones(ours: dict[str, Pipeline]) -> None:
    pipe = ours["onnxruntime:cpu"]
    long = "red apple and a cat, " * 8
    together = pipe(["red apple", long], seed=3, num_inference_steps=4, num_images_per_prompt=2, output_type="np")
    alone = pipe(long, seed=6, num_inference_steps=4, output_type="np")
    np.testing.assert_allclose(together.images[3], alone.images[0], atol=1e-4)


def test_image_to_image(ours: dict[str, Pipeline], theirs: Any) -> None:
    pipe = tiny.seeded(diffusers.StableDiffusionXLImg2ImgPipeline, **theirs.components)
    fields = {"image": tiny.PICTURE, "strength": 0.6, "guidance_scale": 5.0}
    assert tiny.compare(ours["onnxruntime:cpu"], pipe, **fields) >= 50


def test_inpaint(ours: dict[str, Pipeline], theirs: Any) -> None:
    pipe = tiny.seeded(diffusers.StableDiffusionXLInpaintPipeline, **theirs.components)
    fields = {"image": tiny.PICTURE, "mask_image": tiny.MASK, "strength": 0.6, "guidance_scale": 5.0}
    assert tiny.compare(ours["onnxruntime:cpu"], pipe, only_theirs=tiny.SIZE, **fields) >= 50


def test_optimum_loads_the_bundle(twins: Any) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    pipe = optimum.ORTStableDiffusionXLPipeline.from_pretrained(str(twins.folder / "bundle"))
    pipe.set_progress_bar_config(disable=True)
    assert tiny.compare(twins.ours["onnxruntime:cpu"], pipe, guidance_scale=5.0, **tiny.SIZE) >= 50


def test_align_your_steps_takes_the_table_of_sdxl(ours: dict[str, Pipeline], theirs: Any) -> None:
    generation = ours["onnxruntime:cpu"].stream("cat", seed=0, schedule="Align Your Steps", num_inference_steps=10)
    sigmas = [step.sigma for step in generation]
    np.testing.assert_allclose(sigmas, [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113])


def test_a_refiner_is_refused(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = diffusers.configuration_utils.FrozenDict(
        {**theirs.unet.config, "projection_class_embeddings_input_dim": 5 * 8 + 24}
    )
    monkeypatch.setattr(theirs.unet, "_internal_dict", config)
    with pytest.raises(ExportError, match="refiners can't be exported"):
        FAMILY.components(theirs)


def test_a_refiners_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLImg2ImgPipeline"}', encoding="utf-8")
    with pytest.raises(ExportError, match="an SDXL refiner only refines what a base model made: export the base model"):
        load(str(tmp_path))
