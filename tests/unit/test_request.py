"""Requests: validation and defaults, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
PICTURE = np.zeros((1, 32, 64, 3), np.float32)


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
    for sides in ({"width": 16}, {"height": 32}):
        request = resolve(make_request("a cat", seed=1, image=picture, **sides), NUMBERS)
        assert (request.width, request.height) == (16, 32)
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
    for name in ("seeds", "generators"):  # of `Request`; callers have other names for them
        with pytest.raises(InvalidRequest, match=f"unknown parameter '{name}'; choose from: .* seed, .*generator, "):
            make_request("a cat", **{name: (1,)})
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


@pytest.mark.parametrize("name", ["height", "width", "num_inference_steps", "num_images_per_prompt", "clip_skip"])
@pytest.mark.parametrize("value", [8.0, 8.5])
def test_counts_are_whole_numbers(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is {value}; give a whole number"):
        make_request("a", seed=0, **{name: value})


def test_numpys_numbers_are_numbers() -> None:
    request = make_request(
        "a",
        seed=np.int64(3),
        num_images_per_prompt=np.int32(2),
        num_inference_steps=np.int64(8),
        guidance_scale=np.float32(2),
        guidance_interval=(np.float32(0), np.float32(0.5)),
    )
    found = (request.seeds, request.num_inference_steps, request.guidance_scale)
    assert found == ((3, 4), 8, 2.0)
    assert {type(value) for value in (*request.seeds, request.num_images_per_prompt, *found[1:])} == {int, float}


@pytest.mark.parametrize("prompt", [[], [1], (), None, 3, b"a cat"])
def test_prompts_are_texts(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="^prompt is .*give a text"):
        make_request(prompt, seed=0)
    if prompt is not None:
        with pytest.raises(InvalidRequest, match="negative"):
            make_request("a cat", negative_prompt=prompt, seed=0)


@pytest.mark.parametrize("interval", [None, 0.5, "0:1", (0, 1, 1), (None, 0.5), ("0", "1"), (0.5, 0.2), (0, 2)])
def test_guidance_intervals_are_two_numbers_in_order(interval: Any) -> None:
    with pytest.raises(InvalidRequest, match="guidance_interval"):
        make_request("a", seed=0, guidance_interval=interval)


@pytest.mark.parametrize("name", ["sampler", "schedule"])
def test_names_are_texts(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is 3; give its name"):
        make_request("a", seed=0, **{name: 3})


@pytest.mark.parametrize("name", ["strength", "mask_image", "image_guidance_scale"])
def test_what_belongs_to_a_picture_is_refused_without_one(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} was given without image"):
        make_request("a", seed=0, **{name: PICTURE if name == "mask_image" else 1.0})


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((1, 3, 8, 8), np.float32),
        np.zeros((1, 8, 8, 4), np.float32),
        np.zeros((1, 0, 8, 3), np.float32),
        np.full((1, 8, 8, 3), np.nan, np.float32),
        np.full((1, 8, 8, 3), 255, np.float32),
    ],
)
@pytest.mark.filterwarnings("default")
def test_float_pictures_are_one_picture_in_the_range(picture: np.ndarray) -> None:
    for name in ("image", "mask_image"):
        with pytest.raises(InvalidRequest, match=rf"{name} is a float32 array .*give one picture"):
            make_request("a", seed=0, **{"image": PICTURE, name: picture})


@pytest.mark.parametrize("picture", [3, [PICTURE], b"picture.png"])
def test_what_is_no_picture_is_refused_with_what_is_taken(picture: Any) -> None:
    with pytest.raises(InvalidRequest, match="is no picture; give one PNG, JPEG or WebP file"):
        make_request("a", seed=0, image=picture)


def test_latents_are_an_array_and_no_start_besides_a_picture() -> None:
    with pytest.raises(InvalidRequest, match="latents are a list; give"):
        make_request("a", seed=0, latents=[1.0])
    with pytest.raises(InvalidRequest, match="latents were given with image"):
        resolve(make_request("a", seed=0, latents=np.zeros((1, 4, 4, 8), np.float32), image=PICTURE), NUMBERS)


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
