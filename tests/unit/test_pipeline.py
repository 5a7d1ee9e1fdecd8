"""The pipeline and its loop on the fake engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pocketdiffusion.backends.fake import FakeBackend
from pocketdiffusion.errors import BundleUnsupported, InvalidRequest, NonFinite
from pocketdiffusion.noise import Generator
from pocketdiffusion.pipeline import Pipeline

Make = Callable[..., Pipeline]


def runs(backend: FakeBackend, name: str) -> list[dict[str, Any]]:
    return [feeds for graph, feeds in backend.runs if graph.startswith(name)]


def test_pictures_have_the_models_size_and_tell_their_seed(pipe: Pipeline) -> None:
    result = pipe("a cat", seed=3)
    assert result.images[0].size == (32, 32)
    assert result.seeds == (3,)
    assert result.latents.shape == (1, 4, 8, 8)
    assert result.configuration["unet"].device == "fake:cpu"


def test_the_same_seed_makes_the_same_picture_and_another_does_not(pipe: Pipeline) -> None:
    first, again, other = (pipe("a cat", seed=seed, output_type="np").images for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("sampler", [None, "euler a", "dpm++ sde"])
def test_each_image_of_a_batch_can_be_made_alone(pipe: Pipeline, sampler: str | None) -> None:
    batch = pipe(["a cat", "a dog"], seed=10, num_images_per_prompt=2, sampler=sampler, output_type="np")
    assert batch.seeds == (10, 11, 12, 13)
    alone = pipe("a dog", seed=13, sampler=sampler, output_type="np")
    np.testing.assert_allclose(alone.images[0], batch.images[3], atol=1e-6)


def test_a_random_seed_is_told_and_reproduces(pipe: Pipeline) -> None:
    first = pipe("a cat", output_type="np")
    assert np.array_equal(first.images, pipe("a cat", seed=first.seeds[0], output_type="np").images)


def test_generator_and_seed_mean_the_same(pipe: Pipeline) -> None:
    by_generator = pipe("a cat", generator=Generator("cpu").manual_seed(0), output_type="np").images
    assert np.array_equal(by_generator, pipe("a cat", seed=0, output_type="np").images)
    assert not np.array_equal(by_generator, pipe("a cat", seed=0, rng="cuda", output_type="np").images)


def test_guidance_batched_and_in_turn_agree(pipe: Pipeline, backend: FakeBackend) -> None:
    batched = pipe("a cat", seed=0, output_type="latent").images
    assert {len(feeds["sample"]) for feeds in runs(backend, "unet")} == {2}
    backend.runs.clear()
    in_turn = pipe("a cat", seed=0, batched_guidance=False, output_type="latent").images
    assert [len(feeds["sample"]) for feeds in runs(backend, "unet")] == [1] * 10
    np.testing.assert_allclose(in_turn, batched, atol=1e-6)


def test_guidance_at_one_runs_a_single_pass(pipe: Pipeline, backend: FakeBackend) -> None:
    pipe("a cat", seed=0, guidance_scale=1.0)
    assert [len(feeds["sample"]) for feeds in runs(backend, "unet")] == [1] * 5
    assert len(runs(backend, "text_encoder")[0]["input_ids"]) == 1


def test_the_guidance_interval_skips_the_unconditional_pass(pipe: Pipeline, backend: FakeBackend) -> None:
    pipe("a cat", seed=0, num_inference_steps=10, guidance_interval=(0.0, 0.5))
    rows = [len(feeds["sample"]) for feeds in runs(backend, "unet")]
    assert rows == [2] * 5 + [1] * 5


def test_held_guidance_skips_the_unconditional_pass_and_goes_on_guiding(pipe: Pipeline, backend: FakeBackend) -> None:
    full = pipe("a cat", seed=0, num_inference_steps=10, output_type="latent").images
    off = pipe("a cat", seed=0, num_inference_steps=10, output_type="latent", guidance_interval=(0.0, 0.5)).images
    backend.runs.clear()
    held = pipe("a cat", seed=0, num_inference_steps=10, output_type="latent", guidance_hold=0.5)
    assert [len(feeds["sample"]) for feeds in runs(backend, "unet")] == [2] * 5 + [1] * 5
    assert held.parameters[0].extra["Guidance hold"] == "0.5"
    assert 0 < np.abs(held.images - full).max() < np.abs(off - full).max()


def test_negative_prompt_rescale_weights_and_clip_skip_change_the_picture(pipe: Pipeline) -> None:
    plain = pipe("a (cat:1.5)", seed=0, output_type="latent").images
    for change in (
        {"negative_prompt": "a dog"},
        {"guidance_rescale": 0.7},
        {"guidance_scale": 5.0},
        {"weighting": True},
        {"clip_skip": 1},
        {"sampler": "euler a"},
        {"schedule": "karras"},
        {"eta": 1.0},
        {"num_inference_steps": 6},
    ):
        assert not np.allclose(plain, pipe("a (cat:1.5)", seed=0, output_type="latent", **change).images), change


def test_long_prompts_are_chunked_or_the_cut_is_said(pipe: Pipeline, backend: FakeBackend) -> None:
    words = "one two three four five six seven"
    assert pipe(words, seed=0).messages == ()
    assert runs(backend, "unet")[0]["encoder_hidden_states"].shape[1] > 8
    cut = pipe(words, seed=0, long_prompt="truncate")
    assert len(cut.messages) == 1 and "left out" in cut.messages[0]


def test_size_follows_the_request(pipe: Pipeline) -> None:
    assert pipe("a cat", seed=0, width=48, height=64).images[0].size == (48, 64)


def test_image_to_image_keeps_more_at_low_strength(pipe: Pipeline, backend: FakeBackend) -> None:
    picture = np.zeros((1, 32, 32, 3), np.float32)
    backend.runs.clear()
    weak = pipe("a cat", seed=0, image=picture, strength=0.2, num_inference_steps=10, output_type="latent").images
    assert len(runs(backend, "unet")) == 2
    strong = pipe("a cat", seed=0, image=picture, strength=1.0, num_inference_steps=10, output_type="latent").images
    assert np.abs(weak).mean() < np.abs(strong).mean()


def test_streaming_previews_and_cancelling(pipe: Pipeline, backend: FakeBackend) -> None:
    generation = pipe.stream("a cat", seed=0)
    step = next(generation)
    assert generation.preview(step).shape == (1, 8, 8, 3)
    assert generation.timestep(step) == 999
    generation.close()
    assert len(runs(backend, "unet")) == 1
    with pytest.raises(RuntimeError, match="closed"):
        _ = generation.result


def test_a_request_holds_every_field(pipe: Pipeline) -> None:
    request = pipe.stream("a cat", seed=3, num_inference_steps=2).request
    assert np.array_equal(pipe.stream(request).result.latents, pipe("a cat", seed=3, num_inference_steps=2).latents)
    with pytest.raises(InvalidRequest, match="guidance_scale was given beside a Request"):
        pipe.stream(request, guidance_scale=2.0)


def test_streaming_to_the_end_equals_calling(pipe: Pipeline) -> None:
    generation = pipe.stream("a cat", seed=0)
    assert [step.index for step in generation] == [0, 1, 2, 3, 4]
    assert np.array_equal(generation.result.latents, pipe("a cat", seed=0).latents)


def test_callback_sees_replaces_and_interrupts(pipe: Pipeline) -> None:
    seen: list[tuple[int, float]] = []

    def zero(pipe: Pipeline, index: int, timestep: float, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, timestep))
        return {"latents": np.zeros_like(given["latents"])}

    def in_place(pipe: Pipeline, index: int, timestep: float, given: dict[str, Any]) -> dict[str, Any]:
        given["latents"][:] = 0
        return given

    assert not pipe("a cat", seed=0, callback_on_step_end=in_place).latents.any()
    plain = pipe("a cat", seed=0).latents
    assert np.array_equal(pipe("a cat", seed=0, callback_on_step_end=lambda *_: {}).latents, plain)
    result = pipe("a cat", seed=0, callback_on_step_end=zero)
    assert seen == [(0, 999.0), (1, 799.0), (2, 599.0), (3, 399.0), (4, 199.0)]
    assert not result.latents.any()

    def stop(pipe: Pipeline, index: int, timestep: float, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 1
        return given

    assert len(pipe("a cat", seed=0, callback_on_step_end=stop).timings.samples["step"]) == 2


def test_tuple_and_array_outputs(pipe: Pipeline) -> None:
    images, flags = pipe("a cat", seed=0, return_dict=False)
    assert images[0].size == (32, 32) and flags is None
    array = pipe("a cat", seed=0, output_type="np").images
    assert array.shape == (1, 32, 32, 3) and 0 <= array.min() <= array.max() <= 1


def test_own_latents_timesteps_and_sigmas(pipe: Pipeline, backend: FakeBackend) -> None:
    unit = Generator("cpu").manual_seed(0).randn((1, 4, 8, 8))
    assert np.array_equal(pipe("a cat", seed=9, latents=unit).latents, pipe("a cat", seed=0).latents)
    backend.runs.clear()
    pipe("a cat", seed=0, timesteps=(900, 500, 100), guidance_scale=1)
    assert [float(feeds["timestep"]) for feeds in runs(backend, "unet")] == [900, 500, 100]
    assert len(pipe("a cat", seed=0, sigmas=(10.0, 1.0, 0.0)).timings.samples["step"]) == 2
    with pytest.raises(InvalidRequest, match="latents are"):
        pipe("a cat", seed=0, latents=unit[:, :, :4])


def test_parameters_say_what_shaped_the_picture(pipe: Pipeline) -> None:
    picture = np.zeros((1, 32, 32, 3), np.float32)
    (found,) = pipe("a cat", seed=3, image=picture, strength=0.5, sampler="DPM++ 2M Karras", rng="cuda").parameters
    assert (found.sampler, found.schedule, found.seed, found.rng) == ("DPM++ 2M", "Karras", 3, "NV")
    assert found.extra["Denoising strength"] == "0.5" and found.extra["Backend"] == "fake:cpu"
    (found,) = pipe("a cat", seed=3, timesteps=(900, 500.5)).parameters
    assert (found.schedule, found.steps, found.extra["Timesteps"]) == (None, 2, "900 500.5")
    assert pipe("a cat", seed=3, sigmas=(10, 1, 0)).parameters[0].extra["Sigmas"] == "10 1 0"


def test_timings_hold_every_stage(pipe: Pipeline) -> None:
    samples = pipe("a cat", seed=0).timings.samples
    assert {"text_encode", "step", "vae_decode", "unet.run", "unet.open"} <= set(samples)
    assert len(samples["step"]) == len(samples["unet.run"]) == 5
    assert sum(samples["step"]) >= sum(samples["unet.run"])


def test_release_closes_each_graph_after_its_stage(make_pipe: Make, backend: FakeBackend) -> None:
    pipe = make_pipe("release")
    kept = make_pipe("keep")("a cat", seed=0).latents
    backend.opened.clear()
    assert np.array_equal(pipe("a cat", seed=0).latents, kept)
    assert backend.closed == ["text_encoder/model.fake", "unet/model.fake", "vae_decoder/model.fake"]
    assert sorted(backend.opened) == sorted(backend.closed)


@pytest.mark.parametrize(
    ("name", "run", "step"), [("text_encoder", 0, None), ("unet", 0, 0), ("unet", 3, 3), ("vae_decoder", 0, None)]
)
def test_nan_is_named_and_never_a_picture(
    pipe: Pipeline, backend: FakeBackend, name: str, run: int, step: int | None
) -> None:
    graphs = dict(backend.graphs)
    graphs[f"{name}/model.fake"] = replace(graphs[f"{name}/model.fake"], nan_from_run=run)
    backend.graphs = graphs
    with pytest.raises(NonFinite, match=name) as caught:
        pipe("a cat", seed=0)
    assert (caught.value.component, caught.value.step) == (name, step)
    assert caught.value.device == "fake:cpu" and caught.value.precision == "float32"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 33}, "multiples of 16"),
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"guidance_scale": float("nan")}, "from 0 to 100"),
        ({"guidance_interval": (0.8, 0.2)}, "0..1"),
        ({"guidance_hold": 1.5}, "guidance_hold is 1.5; it must be from 0 to 1"),
        ({"seed": -1}, "seed"),
        ({"seed": 1, "generator": Generator("cpu").manual_seed(1)}, "both"),
        ({"generator": [1, 2]}, "2 seeds or generators for 1 images"),
        ({"negative_prompt": ["a", "b"]}, "negative"),
        ({"output_type": "jpeg"}, "pil, np, latent"),
        ({"sampler": "no such"}, "euler"),
        ({"schedule": "no such"}, "karras"),
        ({"image": np.zeros((1, 32, 32, 3), np.float32), "strength": 0.01}, "leaves no step"),
    ],
)
def test_bad_requests_are_one_clear_line(pipe: Pipeline, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        pipe("a cat", **{"seed": 0, **fields} if "generator" not in fields else fields)
    assert "\n" not in str(caught.value)


def test_a_task_that_was_not_exported_is_refused(pipe: Pipeline) -> None:
    manifest = replace(pipe.bundle.manifest, tasks=("text-to-image",))
    pipe.bundle = replace(pipe.bundle, manifest=manifest)
    with pytest.raises(BundleUnsupported, match="exported for text-to-image"):
        pipe("a cat", image=np.zeros((1, 32, 32, 3), np.float32))


def test_clip_skip_that_the_bundle_lacks_lists_what_it_has(pipe: Pipeline) -> None:
    with pytest.raises(BundleUnsupported, match="offers clip_skip 0, 1"):
        pipe("a cat", clip_skip=2)


def test_what_only_other_families_take_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="only SDXL models take it"):
        pipe("a cat", seed=0, target_size=(64, 64))
