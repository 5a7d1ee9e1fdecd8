"""Requests: validation and defaults, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketdiffusion.bundle.manifest import Numbers
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.noise import Generator
from pocketdiffusion.request import make_request, resolve

NUMBERS = Numbers(
    width=64,
    height=32,
    latent_channels=4,
    latent_scale=1.0,
    latent_shift=0.0,
    vae_factor=8,
    size_multiple=8,
    text_length=77,
    default_steps=25,
    default_guidance=3.5,
)


def test_defaults_come_from_the_model() -> None:
    request = resolve(make_request("a cat", seed=1), NUMBERS)
    assert (request.width, request.height) == (64, 32)
    assert (request.num_inference_steps, request.guidance_scale) == (25, 3.5)
    assert request.guided and request.task == "text-to-image"


def test_what_is_given_is_kept_also_when_it_is_zero() -> None:
    request = resolve(make_request("a cat", seed=0, guidance_scale=0, width=16), NUMBERS)
    assert (request.width, request.guidance_scale, request.guided) == (16, 0, False)
    assert request.seeds == (0,)


def test_a_starting_picture_gives_the_task_and_keeps_its_proportions() -> None:
    picture = np.zeros((1, 400, 200, 3), np.float32)
    request = resolve(make_request("a cat", seed=1, image=picture), NUMBERS)
    assert (request.task, request.width, request.height) == ("image-to-image", 32, 64)
    assert request.image is not None and request.image.shape == (1, 64, 32, 3)
    assert resolve(make_request("a cat", seed=1, image=picture, width=16, height=8), NUMBERS).width == 16


def test_pictures_come_as_files_pillow_images_and_arrays(tmp_path: Path) -> None:
    pixels = np.full((32, 64, 3), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "white.png")
    for source in (tmp_path / "white.png", str(tmp_path / "white.png"), Image.fromarray(pixels), pixels):
        request = make_request("a cat", seed=1, image=source)
        assert request.image is not None and request.image.shape == (1, 32, 64, 3) and request.image.min() == 1


def test_a_request_can_be_run_again_and_a_generator_goes_on() -> None:
    request = make_request("a cat", seed=1)
    first, again = (request.noise_sources()[0].randn((4,)) for _ in range(2))
    assert np.array_equal(first, again)
    request = make_request("a cat", generator=Generator("cpu").manual_seed(1))
    first, on = (request.noise_sources()[0].randn((4,)) for _ in range(2))
    assert not np.array_equal(first, on)


def test_unknown_parameters_are_refused_with_the_choices() -> None:
    with pytest.raises(InvalidRequest, match="unknown parameter 'stepps'; choose from: prompt, .*num_inference_steps"):
        make_request("a cat", seed=1, stepps=3)
    with pytest.raises(InvalidRequest, match="cpu, cuda"):
        make_request("a cat", seed=1, rng="gpu")


def test_batches_count_prompts_times_images() -> None:
    request = make_request(["a", "b"], negative_prompt="c", num_images_per_prompt=3, seed=5)
    assert request.batch == 6
    assert request.negative_prompt == ("c", "c")
    assert request.seeds == (5, 6, 7, 8, 9, 10)


@pytest.mark.parametrize("steps", [True, "5", 0, 1001, float("inf")])
def test_numbers_are_checked(steps: object) -> None:
    with pytest.raises(InvalidRequest, match="num_inference_steps"):
        make_request("a", seed=0, num_inference_steps=steps)


@pytest.mark.parametrize("count", [True, "5", 2, 1001, 5.5])
def test_computed_steps_are_checked(count: object) -> None:
    with pytest.raises(InvalidRequest, match="computed_steps"):
        make_request("a cat", seed=1, computed_steps=count)


@pytest.mark.parametrize("prompt", [[], [1], ()])
def test_prompts_are_texts(prompt: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        make_request(prompt, seed=0)


def test_strength_follows_the_task_as_in_diffusers() -> None:
    picture = np.zeros((1, 32, 64, 3), np.float32)
    assert resolve(make_request("a", seed=0), NUMBERS).strength is None
    assert resolve(make_request("a", seed=0, image=picture), NUMBERS).strength == 0.8
    assert resolve(make_request("a", seed=0, image=picture, mask_image=picture), NUMBERS).strength == 1.0
    assert resolve(make_request("a", seed=0, image=picture, strength=0.3), NUMBERS).strength == 0.3


@pytest.mark.parametrize("size", [5, (1, 2, 3), (64, "64"), (-1, 64)])
def test_size_ids_are_pairs_of_pixels(size: object) -> None:
    with pytest.raises(InvalidRequest, match="original_size"):
        make_request("a", seed=0, original_size=size)
