"""Quality presets and computed steps through the pipeline, on the fake engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pocketdiffusion import cli
from pocketdiffusion.backends.fake import FakeBackend
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.presets import PRESETS

PICTURE = np.zeros((1, 32, 32, 3), np.float32)
MASK = np.concatenate([-np.ones((1, 32, 16, 3), np.float32), np.ones((1, 32, 16, 3), np.float32)], axis=2)


def passes(backend: FakeBackend) -> int:
    return sum(graph.startswith("unet") for graph, _ in backend.runs)


def test_exact_is_the_default_and_computes_every_step(pipe: Pipeline, backend: FakeBackend) -> None:
    result = pipe("a cat", seed=0, num_inference_steps=25)
    assert passes(backend) == 25
    assert result.messages == ()
    assert "Computed steps" not in result.parameters[0].extra
    assert np.array_equal(pipe("a cat", seed=0, num_inference_steps=25, preset="exact").latents, result.latents)


@pytest.mark.parametrize("name", ["balanced", "fast"])
@pytest.mark.parametrize("sampler", [None, "euler a"])
def test_a_preset_computes_few_steps_and_says_so(
    pipe: Pipeline, backend: FakeBackend, name: str, sampler: str | None
) -> None:
    exact = pipe("a cat", seed=0, num_inference_steps=25, sampler=sampler).latents
    backend.runs.clear()
    result = pipe("a cat", seed=0, num_inference_steps=25, sampler=sampler, preset=name)
    expected = PRESETS[name].steps(stochastic=sampler is not None)
    assert expected is not None and passes(backend) == expected
    assert result.messages == (f"{25 - expected} of the denoiser's 25 answers were forecast, not computed",)
    assert result.parameters[0].extra["Computed steps"] == str(expected)
    assert result.parameters[0].extra["Guidance hold"] == f"{PRESETS[name].guidance_hold:g}"
    assert len(result.timings.samples["step"]) == 25
    assert not np.array_equal(result.latents, exact)


def test_what_the_caller_gives_goes_before_the_preset(pipe: Pipeline, backend: FakeBackend) -> None:
    pipe("a cat", seed=0, num_inference_steps=25, preset="fast", computed_steps=11)
    assert passes(backend) == 11


def test_runs_do_not_remember_each_other_and_a_batch_is_its_images(pipe: Pipeline) -> None:
    fields: dict[str, Any] = {"num_inference_steps": 20, "preset": "balanced", "output_type": "latent"}
    batch = pipe(["a cat", "a dog"], seed=5, **fields).images
    alone = pipe("a dog", seed=6, **fields).images
    np.testing.assert_allclose(alone[0], batch[1], atol=1e-6)
    assert np.array_equal(pipe("a dog", seed=6, **fields).images, alone)


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 12), (0.1, 2)])
def test_a_starting_picture_has_its_own_steps_computed(
    pipe: Pipeline, backend: FakeBackend, strength: float, steps: int
) -> None:
    pipe("a cat", seed=0, num_inference_steps=25, image=PICTURE, strength=strength, computed_steps=5)
    assert passes(backend) == min(5, steps)


def test_inpaint_keeps_what_is_masked(pipe: Pipeline, backend: FakeBackend) -> None:
    result = pipe(
        "a cat", seed=0, num_inference_steps=25, image=PICTURE, mask_image=MASK, preset="balanced", output_type="np"
    )
    assert passes(backend) == PRESETS["balanced"].computed_steps
    np.testing.assert_allclose(result.images[0, :, :16], 0.5, atol=1e-6)


def test_heun_skips_both_of_its_calls(pipe: Pipeline, backend: FakeBackend) -> None:
    pipe("a cat", seed=0, num_inference_steps=15, sampler="heun")
    assert passes(backend) == 29
    backend.runs.clear()
    pipe("a cat", seed=0, num_inference_steps=15, sampler="heun", computed_steps=5)
    assert passes(backend) == 9


def test_distilled_samplers_compute_every_step(pipe: Pipeline, backend: FakeBackend) -> None:
    result = pipe("a cat", seed=0, num_inference_steps=8, sampler="lcm", preset="fast")
    assert passes(backend) == 8
    assert result.messages == ("preset fast left out no step: lcm needs all of its steps",)
    with pytest.raises(InvalidRequest, match="lcm needs all of its steps"):
        pipe("a cat", seed=0, sampler="lcm", computed_steps=5)


def test_a_preset_is_chosen_on_the_command_line(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a cat", "--steps", "20", "--preset", "balanced", "-o", "cat.png"]) == 0
    forecast = 20 - (PRESETS["balanced"].computed_steps or 20)
    assert forecast > 0 and f"{forecast} of the denoiser's 20 answers were forecast" in capsys.readouterr().err
