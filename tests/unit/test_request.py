"""Requests: validation and defaults, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.manifest import Numbers
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
    assert request.generators[0].initial_seed() == 0


def test_a_starting_picture_gives_task_and_size() -> None:
    request = resolve(make_request("a cat", seed=1, image=np.zeros((1, 48, 40, 3), np.float32)), NUMBERS)
    assert (request.task, request.width, request.height) == ("image-to-image", 40, 48)


def test_batches_count_prompts_times_images() -> None:
    request = make_request(["a", "b"], negative_prompt="c", num_images_per_prompt=3, seed=5)
    assert request.batch == 6
    assert request.negative_prompt == ("c", "c")
    assert [generator.initial_seed() for generator in request.generators] == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("steps", [True, "5", 0, 1001, float("inf")])
def test_numbers_are_checked(steps: object) -> None:
    with pytest.raises(InvalidRequest, match="num_inference_steps"):
        make_request("a", seed=0, num_inference_steps=steps)


@pytest.mark.parametrize("prompt", [[], [1], ()])
def test_prompts_are_texts(prompt: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        make_request(prompt, seed=0)
