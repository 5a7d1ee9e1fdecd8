"""One call: what is to be generated, validated as far as that is possible without a model.

Fields carry Diffusers' names. None means "the model's default"; `resolve` fills it in from the bundle's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.manifest import Numbers
from pocketdiffusion.noise import Generator, image_generators
from pocketdiffusion.tensors import Array

MAX_SIDE = 4096
MAX_STEPS = 1000
OUTPUT_TYPES = ("pil", "np", "latent")
LONG_PROMPT = ("chunk", "truncate")


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
    batched_guidance: bool = True
    """Both passes of guidance in one batch; False runs them in turn, in half the memory."""
    num_images_per_prompt: int = 1
    generators: tuple[Generator, ...]
    """One source of noise for each image of the batch."""
    sampler: str | None = None
    schedule: str | None = None
    eta: float | None = None
    """Share of fresh noise in stochastic samplers; None is the sampler's own default."""
    clip_skip: int = 0
    """How many of the text encoder's last layers are left out."""
    weighting: bool = False
    """Whether ``(word:1.2)`` in a prompt is a weight (A1111) or plain text (Diffusers)."""
    long_prompt: str = "chunk"
    """What happens past the text encoder's length: "chunk" or "truncate"."""
    image: Array | None = None
    """Starting picture for image-to-image, (1, height, width, 3) in [-1, 1]."""
    strength: float = 0.8
    """0 to 1: share of the steps that are run on a starting picture."""
    output_type: str = "pil"

    def __post_init__(self) -> None:
        _check_prompts(self.prompt, self.negative_prompt)
        _between("height", self.height, 8, MAX_SIDE)
        _between("width", self.width, 8, MAX_SIDE)
        _between("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _between("num_images_per_prompt", self.num_images_per_prompt, 1, 64)
        _between("guidance_scale", self.guidance_scale, 0, 100)
        _between("guidance_rescale", self.guidance_rescale, 0, 1)
        _between("clip_skip", self.clip_skip, 0, 12)
        _between("strength", self.strength, 0, 1)
        _between("eta", self.eta, 0, 10)
        _check_interval(self.guidance_interval)
        one_of("output_type", self.output_type, OUTPUT_TYPES)
        one_of("long_prompt", self.long_prompt, LONG_PROMPT)
        if len(self.generators) != self.batch:
            raise InvalidRequest(
                "generator", f"{len(self.generators)} seeds for {self.batch} images; give one for each"
            )

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.prompt) * self.num_images_per_prompt

    @property
    def task(self) -> str:
        """The task follows from which fields are set."""
        return "text-to-image" if self.image is None else "image-to-image"

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on. Call it on a resolved request."""
        return self.guidance_scale is not None and self.guidance_scale > 1


def resolve(request: Request, numbers: Numbers) -> Request:
    """The same request with every default of the model filled in."""
    height, width = request.height, request.width
    if request.image is not None:
        height = request.image.shape[1] if height is None else height
        width = request.image.shape[2] if width is None else width
    steps, scale = request.num_inference_steps, request.guidance_scale
    return replace(
        request,
        height=numbers.height if height is None else height,
        width=numbers.width if width is None else width,
        num_inference_steps=numbers.default_steps if steps is None else steps,
        guidance_scale=numbers.default_guidance if scale is None else scale,
    )


def make_request(
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    generator: Any = None,
    rng: str = "cpu",
    **fields: Any,
) -> Request:
    """A `Request` from what callers have: one prompt or several, a seed or a generator (or one for each image).

    Without either, a random 32-bit seed is taken; the result tells which. Image i of a batch uses seed + i. `rng` says
    whose torch noise a seed stands for: "cpu" or "cuda".
    """
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if isinstance(negative_prompt, str):
        negatives: tuple[str, ...] | None = (negative_prompt,) * len(prompts)
    else:
        negatives = None if negative_prompt is None else tuple(negative_prompt)
    if seed is not None and generator is not None:
        raise InvalidRequest("seed", "both seed and generator were given; give one of them")
    _between("num_images_per_prompt", num_images_per_prompt, 1, 64)
    origin = generator if generator is not None else _random_seed() if seed is None else seed
    return Request(
        prompt=prompts,
        negative_prompt=negatives,
        num_images_per_prompt=num_images_per_prompt,
        generators=tuple(image_generators(origin, len(prompts) * num_images_per_prompt, rng)),
        **fields,
    )


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise InvalidRequest(name, f"{name} is {value!r}; choose one of: {', '.join(choices)}")


def _random_seed() -> int:
    import secrets

    return secrets.randbits(32)


def _between(name: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequest(name, f"{name} is {value!r}; it must be a number from {low} to {high}")
    if not low <= value <= high:
        raise InvalidRequest(name, f"{name} is {value}; it must be from {low} to {high}")


def _check_prompts(prompts: tuple[str, ...], negatives: tuple[str, ...] | None) -> None:
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidRequest("prompt", f"prompt is {prompts!r}; give a text or a list of texts")
    if negatives is not None and len(negatives) != len(prompts):
        raise InvalidRequest(
            "negative_prompt",
            f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each",
        )


def _check_interval(interval: tuple[float, float]) -> None:
    start, stop = interval
    if not 0 <= start <= stop <= 1:
        raise InvalidRequest("guidance_interval", f"guidance_interval is {start}..{stop}; it must lie in order in 0..1")
