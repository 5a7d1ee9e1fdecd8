"""The runtime on an exported fp32 bundle makes the images of Diffusers' own pipelines, seed for seed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.verify import psnr_db  # noqa: E402
from pocketdiffusion_export.export import export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

STEPS = 20
DB = 50.0


@pytest.fixture(scope="module")
def ours(tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("runtime") / "fp32"
    export(make_plan(tiny, folder, recipe="fp32", preset=preset), lambda line: None)
    return Pipeline.from_pretrained(folder, device="onnxruntime:cpu")


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(tiny), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    yield pipe


def generators(*seeds: int) -> list[Any]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def compare(ours: Pipeline, theirs: Any, count: int = 1, **fields: Any) -> None:
    seeds = list(range(7, 7 + count))
    common = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "num_images_per_prompt": count, **fields}
    expected = theirs("red apple", generator=generators(*seeds), output_type="np", **common).images
    found = ours("red apple", seed=7, output_type="np", **common).images
    for a, b in zip(expected, found, strict=True):
        assert psnr_db(np.round(a * 255), np.round(b * 255)) >= DB


SCHEDULERS = [
    ("DDIMScheduler", {}),
    (
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("LCMScheduler", {"clip_sample": False}),
]


@pytest.mark.parametrize(("name", "change"), SCHEDULERS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SCHEDULERS)])
def test_every_scheduler_makes_the_same_image(
    ours: Pipeline, theirs: Any, monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any]
) -> None:
    cls = getattr(diffusers, name)
    facts = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
    scheduler = cls.from_config({**facts, "clip_sample": False, **change})
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    monkeypatch.setattr(ours, "scheduler_config", {**scheduler.config, "_class_name": name})
    compare(ours, theirs)


@pytest.mark.parametrize(
    "fields",
    [
        {"count": 3},
        {"negative_prompt": "cat"},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"eta": 0.8},
        {"width": 48, "height": 24},
        {"num_inference_steps": 1},
    ],
    ids=str,
)
def test_every_parameter_means_the_same(ours: Pipeline, theirs: Any, fields: dict[str, Any]) -> None:
    compare(ours, theirs, **fields)


def test_tcd_makes_the_same_image(ours: Pipeline, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart, because Diffusers' pipeline hands its own default eta, 0, to a class whose default is 0.3."""
    facts = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.TCDScheduler.from_config(facts)
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    monkeypatch.setattr(ours, "scheduler_config", {**scheduler.config, "_class_name": "TCDScheduler"})
    compare(ours, theirs, eta=0.3)


def test_clip_skip_means_the_same(ours: Pipeline, theirs: Any) -> None:
    compare(ours, theirs, clip_skip=1, guidance_scale=1.0)  # Diffusers leaves the negative prompt's layers in


def test_the_callback_sees_the_same_latents(ours: Pipeline, theirs: Any) -> None:
    seen: dict[str, list[Any]] = {"ours": [], "theirs": []}

    def keep(whose: str) -> Any:
        def callback(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen[whose].append((index, float(timestep), np.asarray(given["latents"]).copy()))
            return given

        return callback

    common = {"num_inference_steps": 5, "guidance_scale": 5.0}
    theirs("cat", generator=generators(3), callback_on_step_end=keep("theirs"), **common)
    ours("cat", seed=3, callback_on_step_end=keep("ours"), **common)
    for (i, t, a), (j, u, b) in zip(seen["theirs"], seen["ours"], strict=True):
        assert (i, t) == (j, u)
        np.testing.assert_allclose(b, a, atol=2e-4)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_is_the_same(ours: Pipeline, theirs: Any, strength: float) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "strength": strength, "output_type": "np"}
    expected = pipe("red apple", image=picture, generator=generators(5), **common).images[0]
    found = ours("red apple", image=picture, seed=5, **common).images[0]
    assert psnr_db(np.round(expected * 255), np.round(found * 255)) >= DB
