"""One call: what is to be generated, validated as far as that is possible without a model.

Fields carry Diffusers' names. None means "the model's default"; `resolve` fills it in from the bundle's numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from pocketdiffusion.bundle.manifest import Numbers
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.image import from_image, resize
from pocketdiffusion.noise import DEVICES, Generator, image_generators, random_seed
from pocketdiffusion.presets import DECODERS, PRESETS
from pocketdiffusion.tensors import Array

MAX_SIDE = 4096
MAX_STEPS = 1000
FEWEST_COMPUTED = 3
OUTPUT_TYPES = ("pil", "np", "latent")
LONG_PROMPT = ("chunk", "truncate")
SIZE_IDS = ("original_size", "crops_coords_top_left", "target_size")
STRENGTH = {"image-to-image": 0.8, "inpaint": 1.0}
"""Task -> default of `strength`, as in Diffusers."""
IMAGE_GUIDANCE = 1.5
"""Default of `image_guidance_scale` for models that follow instructions, as in Diffusers."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Parameters of one generation."""

    prompt: tuple[str, ...]
    negative_prompt: tuple[str, ...] | None = None
    """One for each prompt; only used where guidance_scale > 1."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    num_inference_steps: int | None = None
    """1 to 1000."""
    guidance_scale: float | None = None
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); 1 or less switches it off."""
    guidance_rescale: float = 0.0
    """0 to 1: how far the guided output is brought back to the conditional one's deviation (arXiv:2305.08891, 3.4)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the sampling, as fractions, in which guidance is on; outside it the unconditional pass is not run."""
    guidance_hold: float | None = None
    """0 to 1: from this part of the sampling on the unconditional pass is not run, and guidance adds what it last did;
    1 never."""
    batched_guidance: bool = True
    """Both passes of guidance in one batch; False runs them in turn, in half the memory."""
    num_images_per_prompt: int = 1
    seeds: tuple[int, ...]
    """One for each image of the batch."""
    rng: str = "cpu"
    """Whose torch noise the seeds stand for: "cpu" or "cuda"."""
    generators: tuple[Generator, ...] | None = None
    """Sources of noise to go on drawing from, in place of fresh ones of the seeds."""
    latents: Array | None = None
    """Standard-normal start in place of drawn noise, (images, channels, height / vae_factor, width / vae_factor)."""
    sampler: str | None = None
    schedule: str | None = None
    timesteps: tuple[float, ...] | None = None
    """The run's own timesteps, falling, in place of a number of steps."""
    sigmas: tuple[float, ...] | None = None
    """The run's own noise levels, falling, in place of a number of steps."""
    preset: str = "exact"
    """How much work is left out, a name in `presets.PRESETS`: "exact" leaves out nothing, "balanced" and "fast" set
    `computed_steps` and `guidance_hold` where they are not given, and "fast" takes the tiny decoder of a bundle that
    has one."""
    decoder: str | None = None
    """What turns latents into pictures: "full", or "tiny", which is many times faster and draws less detail. None is
    the preset's, or else the full one, unless a memory limit leaves room for the tiny one only."""
    computed_steps: int | None = None
    """3 to 1000: steps at which the denoiser runs, spread over the run; at the others its answer is forecast from
    earlier ones. None or no fewer than the steps there are: all of them."""
    eta: float | None = None
    """Share of fresh noise in stochastic samplers; None is the sampler's own default."""
    clip_skip: int = 0
    """How many of the text encoder's last layers are left out."""
    weighting: bool = False
    """Whether ``(word:1.2)`` in a prompt is a weight (A1111) or plain text (Diffusers)."""
    long_prompt: str = "chunk"
    """What happens past the text encoder's length: "chunk" or "truncate"."""
    image: Array | None = None
    """Starting picture for image-to-image, (1, height, width, 3) in [-1, 1]; scaled to the request's size. In its own
    proportions where only one side is given, and with neither to the model's native area."""
    mask_image: Array | None = None
    """What to repaint of `image`: white; black is kept to the pixel. (1, height, width, 3) in [-1, 1], scaled like
    `image`."""
    strength: float | None = None
    """0 to 1: share of the steps that are run on a starting picture; 0.8, or 1 with a mask."""
    image_guidance_scale: float | None = None
    """For models that change `image` as the prompt tells them (arXiv:2211.09800): how near the result stays to it; 1.5.
    Below 1 it switches guidance off, also that by the prompt, as in Diffusers."""
    best: int | None = None
    """How many of each prompt's images are kept, the best first, by the score of the model's own judge. None keeps all
    in their order and judges nothing."""
    original_size: tuple[int, int] | None = None
    """SDXL: (height, width) in pixels that a training picture with this content had before scaling; the request's."""
    crops_coords_top_left: tuple[int, int] | None = None
    """SDXL: (top, left) of the crop that a training picture went through; (0, 0) centres objects."""
    target_size: tuple[int, int] | None = None
    """SDXL: (height, width) that the picture should seem to be made for; the request's."""
    output_type: str = "pil"
    vae_tile: int | None = None
    """The VAE computes no more than this many pixels squared at a time; None is the pipeline's `vae_tile`."""
    vae_bands: int | None = None
    """The VAE's decoder computes this many rows at a time; None is the pipeline's `vae_bands`."""

    def __post_init__(self) -> None:
        _check_prompts(self.prompt, self.negative_prompt)
        _count("height", self.height, 8, MAX_SIDE)
        _count("width", self.width, 8, MAX_SIDE)
        _count("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _count("num_images_per_prompt", self.num_images_per_prompt, 1, 64)
        self._check_best()
        _between("guidance_scale", self.guidance_scale, 0, 100)
        _between("guidance_rescale", self.guidance_rescale, 0, 1)
        _between("guidance_hold", self.guidance_hold, 0, 1)
        _count("clip_skip", self.clip_skip, 0, 12)
        _between("strength", self.strength, 0, 1)
        _count("computed_steps", self.computed_steps, FEWEST_COMPUTED, MAX_STEPS)
        _between("eta", self.eta, 0, 10)
        _between("image_guidance_scale", self.image_guidance_scale, 0, 100)
        for name in SIZE_IDS:
            if getattr(self, name) is not None:
                _check_pair(name, getattr(self, name), 4 * MAX_SIDE, "whole numbers of pixels, the vertical one first")
        self._check_pictures()
        if self.image_guidance_scale is not None:
            self._check_instruction()
        _check_interval(self.guidance_interval)
        for name in ("sampler", "schedule"):
            if not isinstance(getattr(self, name), str | None):
                raise InvalidRequest(name, f"{name} is {getattr(self, name)!r}; give its name, a text")
        one_of("output_type", self.output_type, OUTPUT_TYPES)
        one_of("preset", self.preset, tuple(PRESETS))
        if self.decoder is not None:
            one_of("decoder", self.decoder, tuple(DECODERS))
        one_of("long_prompt", self.long_prompt, LONG_PROMPT)
        if len(self.seeds) != self.batch:
            raise InvalidRequest("seed", f"{len(self.seeds)} seeds for {self.batch} images; give one for each")

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.prompt) * self.num_images_per_prompt

    @property
    def task(self) -> str:
        """The task follows from which fields are set."""
        if self.image is None:
            return "text-to-image"
        if self.image_guidance_scale is not None:
            return "instruct"
        return "image-to-image" if self.mask_image is None else "inpaint"

    def noise_sources(self) -> tuple[Generator, ...]:
        """One source for each image; fresh ones unless generators were given, so that a request can be run again."""
        if self.generators is not None:
            return self.generators
        return tuple(Generator(self.rng).manual_seed(seed) for seed in self.seeds)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on. Call it on a resolved request."""
        by_image = self.image_guidance_scale is None or self.image_guidance_scale >= 1
        return self.guidance_scale is not None and self.guidance_scale > 1 and by_image

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """One for each condition that a pass adds: the picture's if it guides too, then the prompt's."""
        by_image = () if self.image_guidance_scale is None else (self.image_guidance_scale,)
        return (*by_image, 1.0 if self.guidance_scale is None else self.guidance_scale)

    def _check_best(self) -> None:
        if self.best is None:
            return
        _count("best", self.best, 1, self.num_images_per_prompt)
        if self.output_type == "latent":
            raise InvalidRequest("best", "best was given with output_type 'latent'; a judge needs pictures: pil or np")

    def _check_pictures(self) -> None:
        for name, use in (("mask_image", "repaint"), ("strength", "leave"), ("image_guidance_scale", "change")):
            if self.image is None and getattr(self, name) is not None:
                raise InvalidRequest(name, f"{name} was given without image; give the picture to {use} too")
        if self.latents is not None and not isinstance(self.latents, np.ndarray):
            found = type(self.latents).__name__
            raise InvalidRequest("latents", f"latents are a {found}; give a float32 array of standard normal numbers")

    def _check_instruction(self) -> None:
        for name in ("strength", "mask_image"):
            if getattr(self, name) is not None:
                raise InvalidRequest(
                    name, f"{name} was given; a model that follows instructions takes image and image_guidance_scale"
                )


def resolve(request: Request, numbers: Numbers, tasks: Sequence[str] = ()) -> Request:
    """The same request with every default of the model filled in, and its pictures at the request's size.

    A picture for a model whose only one of `tasks` is "instruct" is one to change by an instruction.
    """
    if tuple(tasks) == ("instruct",) and request.image is not None and request.image_guidance_scale is None:
        request = replace(request, image_guidance_scale=IMAGE_GUIDANCE)
    width, height = _size(request, numbers)
    steps, scale = request.num_inference_steps, request.guidance_scale
    if request.latents is not None and request.task == "image-to-image":
        raise InvalidRequest("latents", "latents were given with image, which is where sampling starts: leave one out")
    return replace(
        request,
        width=width,
        height=height,
        num_inference_steps=numbers.default_steps if steps is None else steps,
        guidance_scale=numbers.default_guidance if scale is None else scale,
        image=None if request.image is None else resize(request.image, width, height),
        mask_image=None if request.mask_image is None else resize(request.mask_image, width, height),
        strength=STRENGTH.get(request.task) if request.strength is None else request.strength,
    )


def make_request(
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    generator: Any = None,
    rng: str = "cpu",
    image: Any = None,
    mask_image: Any = None,
    **fields: Any,
) -> Request:
    """A `Request` from what callers have: one prompt or several, a seed or a generator (or one for each image).

    Without either, a random 32-bit seed is taken; the result tells which. Image i of a batch uses seed + i. `image`
    and `mask_image` are what `image.from_image` takes, or float32 (1, height, width, 3) in [-1, 1].
    """
    callers = {"seeds": "seed", "generators": "generator"}
    known = [callers.get(field.name, field.name) for field in dataclasses.fields(Request)]
    for name in fields:
        if name not in known:
            raise InvalidRequest(name, f"unknown parameter {name!r}; choose from: {', '.join(known)}")
    if seed is not None and generator is not None:
        raise InvalidRequest("seed", "both seed and generator were given; give one of them")
    prompts = _texts(prompt)
    _count("num_images_per_prompt", num_images_per_prompt, 1, 64)
    one_of("rng", rng, DEVICES)
    origin = generator if generator is not None else random_seed() if seed is None else seed
    sources = image_generators(origin, len(prompts) * num_images_per_prompt, rng)
    return Request(
        prompt=prompts,
        negative_prompt=None if negative_prompt is None else _texts(negative_prompt, len(prompts)),
        num_images_per_prompt=int(num_images_per_prompt),
        seeds=tuple(source.initial_seed() for source in sources),
        rng=rng,
        generators=None if generator is None else tuple(sources),
        image=None if image is None else _picture("image", image),
        mask_image=None if mask_image is None else _picture("mask_image", mask_image),
        **{name: value.item() if isinstance(value, np.generic) else value for name, value in fields.items()},
    )


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise InvalidRequest(name, f"{name} is {value!r}; choose one of: {', '.join(choices)}")


def _size(request: Request, numbers: Numbers) -> tuple[int, int]:
    """(width, height) in pixels; what is not given follows from the picture's proportions, or from the model."""
    if request.image is None:
        return request.width or numbers.width, request.height or numbers.height
    own_height, own_width = request.image.shape[1:3]
    if request.width is not None:
        scale = request.width / own_width
    elif request.height is not None:
        scale = request.height / own_height
    else:
        scale = math.sqrt(numbers.width * numbers.height / (own_width * own_height))
    return request.width or _whole(own_width * scale, numbers), request.height or _whole(own_height * scale, numbers)


def _whole(size: float, numbers: Numbers) -> int:
    return max(1, round(size / numbers.size_multiple)) * numbers.size_multiple


def _texts(given: Any, count: int = 1) -> tuple[Any, ...]:
    """Several texts, or one for each of `count`; what is neither is left to be refused."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,) * count


def _picture(name: str, given: Any) -> Array:
    if not (isinstance(given, np.ndarray) and given.dtype == np.float32 and given.ndim == 4):
        return from_image(given)
    if given.size == 0 or given.shape[0] != 1 or given.shape[3] != 3 or not (np.abs(given) <= 1).all():
        raise InvalidRequest(
            name,
            f"{name} is a float32 array {given.shape} with values from {given.min(initial=0):g} to "
            f"{given.max(initial=0):g}; give one picture (1, height, width, 3) in [-1, 1]",
        )
    return given


def _between(name: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidRequest(name, f"{name} is {value!r}; it must be a number from {low} to {high}")
    if not low <= float(value) <= high:
        raise InvalidRequest(name, f"{name} is {value}; it must be from {low} to {high}")


def _count(name: str, value: Any, low: int, high: int) -> None:
    _between(name, value, low, high)
    if not isinstance(value, Integral | None):
        raise InvalidRequest(name, f"{name} is {value}; give a whole number from {low} to {high}")


def _check_prompts(prompts: tuple[str, ...], negatives: tuple[str, ...] | None) -> None:
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidRequest("prompt", f"prompt is {prompts!r}; give a text or a list of texts")
    if negatives is not None and not all(isinstance(negative, str) for negative in negatives):
        raise InvalidRequest("negative_prompt", f"negative_prompt is {negatives!r}; give a text or a list of texts")
    if negatives is not None and len(negatives) != len(prompts):
        raise InvalidRequest(
            "negative_prompt",
            f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each",
        )


def _check_pair(name: str, pair: Any, most: float, meaning: str) -> None:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or None in pair:
        raise InvalidRequest(name, f"{name} is {pair!r}; give two {meaning}")
    for value in pair:
        _between(name, value, 0, most)


def _check_interval(interval: Any) -> None:
    _check_pair("guidance_interval", interval, 1, "numbers from 0 to 1")
    start, stop = interval
    if start > stop:
        raise InvalidRequest("guidance_interval", f"guidance_interval is {start}..{stop}; it must lie in order in 0..1")
