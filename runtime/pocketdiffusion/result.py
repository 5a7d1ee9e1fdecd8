"""What a generation gives back, and how it is described."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketdiffusion import image
from pocketdiffusion._version import __version__
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.component import Component
from pocketdiffusion.image.metadata import Parameters
from pocketdiffusion.request import STRENGTH, Request
from pocketdiffusion.sampling.names import sampler_label, schedule_label
from pocketdiffusion.sampling.scheduler import SamplingPlan
from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion.timing import Timings

DIGITAL_SOURCE = {
    "text-to-image": "trainedAlgorithmicMedia",
    "image-to-image": "compositeWithTrainedAlgorithmicMedia",
    "inpaint": "compositeWithTrainedAlgorithmicMedia",
    "instruct": "compositeWithTrainedAlgorithmicMedia",
}
"""IPTC NewsCodes: what a saved picture says about its origin."""

RNG = {"cpu": "CPU", "cuda": "NV"}
"""A1111's words for whose noise was reproduced."""


@dataclass(frozen=True, slots=True)
class ComponentUse:
    """How one graph really ran."""

    engine: str
    """Backend and version, e.g. "onnxruntime 1.31.1"."""
    device: str
    """e.g. "onnxruntime:cpu"."""
    precision: str
    """Arithmetic really used."""
    weights: str
    """How the weights are stored."""
    cached: bool
    """Whether the graph was opened from its engine's cache; False where it was compiled or optimized anew."""

    @classmethod
    def of(cls, component: Component) -> ComponentUse:
        """The use of a component that has run."""
        return cls(component.engine, component.device, component.precision, component.entry.weights, component.cached)


@dataclass(frozen=True, slots=True)
class Result:
    """Pictures and how they came about."""

    images: Any
    """By output_type: a list of PIL images ("pil"), float32 (n, h, w, 3) in [0, 1] ("np"), or latents ("latent")."""
    seeds: tuple[int, ...]
    """One for each image; it makes the same image alone, unless one generator was given for several images."""
    timings: Timings
    """Spans: tokenise, text_encode, step, vae_decode, wait_open, active, and each component's own runs and opening."""
    configuration: Mapping[str, ComponentUse]
    parameters: tuple[Parameters, ...]
    """What saved files say about each image."""
    digital_source: str
    """IPTC digital source type of the images."""
    pixels: AnyArray | None
    """uint8 (n, h, w, 3); None for output_type "latent"."""
    latents: Array
    """Final latents in the denoiser's coordinates."""
    messages: tuple[str, ...] = ()
    nsfw_content_detected: list[bool] | None = None
    """For each image whether the safety checker blacked it out; None where none looked. Diffusers' name."""
    scores: tuple[float, ...] | None = None
    """For each image how well it shows its prompt, in [-1, 1], by the bundle's judge; None where it was not asked."""

    def best(self, scores: Sequence[float], prompts: int, count: int) -> Result:
        """Only the `count` images of each prompt that score highest, best first; each prompt has as many images."""
        each = len(scores) // prompts
        groups = [range(start, start + each) for start in range(0, len(scores), each)]
        kept = [place for group in groups for place in sorted(group, key=lambda i: -scores[i])[:count]]
        flags = self.nsfw_content_detected
        said = f"kept {len(kept)} of {len(scores)} images, scored {_span(scores[i] for i in kept)}"
        left = [score for place, score in enumerate(scores) if place not in kept]
        return replace(
            self,
            images=[self.images[i] for i in kept] if isinstance(self.images, list) else self.images[kept],
            seeds=tuple(self.seeds[i] for i in kept),
            parameters=tuple(self.parameters[i] for i in kept),
            pixels=None if self.pixels is None else self.pixels[kept],
            latents=self.latents[kept],
            messages=(*self.messages, f"{said}; the others {_span(left)}" if left else said),
            nsfw_content_detected=None if flags is None else [flags[i] for i in kept],
            scores=tuple(scores[i] for i in kept),
        )

    def save(self, pattern: str | Path, *, with_prompt: bool = True, quality: int = 95) -> list[Path]:
        """Write the images as PNG, JPEG or WebP by the pattern's suffix; see `image.output_path` for its fields."""
        return image.save_all(self, str(pattern), with_prompt=with_prompt, quality=quality)


def describe(request: Request, plan: SamplingPlan, steps: int, bundle: Bundle, backend: str) -> tuple[Parameters, ...]:
    """What saved files say about each image of a resolved request; `backend` is where the denoiser ran."""
    return tuple(_parameters(index, request, plan, steps, bundle, backend) for index in range(request.batch))


def _parameters(
    index: int, request: Request, plan: SamplingPlan, steps: int, bundle: Bundle, backend: str
) -> Parameters:
    prompt = index // request.num_images_per_prompt
    return Parameters(
        prompt=request.prompt[prompt],
        negative_prompt="" if request.negative_prompt is None else request.negative_prompt[prompt],
        steps=steps,
        sampler=sampler_label(plan.sampler),
        schedule=None if _own_levels(request) else schedule_label(plan.schedule),
        guidance_scale=request.guidance_scale,
        seed=request.seeds[index],
        width=request.width,
        height=request.height,
        model=bundle.manifest.name,
        model_hash=bundle.digest[:10],
        clip_skip=request.clip_skip + 1,  # A1111 counts the layers from the end, Diffusers those left out
        rng=RNG[request.rng if request.generators is None else request.generators[index].device],
        version=f"pocketdiffusion {__version__}",
        extra={**_unusual(request), "Backend": backend, "Quantization": bundle.manifest.recipe},
    )


def _span(scores: Iterable[float]) -> str:
    shown = sorted({f"{score:.3f}": score for score in scores}.items(), key=lambda item: item[1])
    return " to ".join(dict.fromkeys((shown[0][0], shown[-1][0])))


def _own_levels(request: Request) -> dict[str, str]:
    """The levels that stood in place of a schedule."""
    given = {"Timesteps": request.timesteps, "Sigmas": request.sigmas}
    return {key: " ".join(f"{level:.9g}" for level in levels) for key, levels in given.items() if levels is not None}


def _unusual(request: Request) -> dict[str, str]:
    """Parameters beyond A1111's common ones that shaped the picture, where they are not at their defaults."""
    found = _own_levels(request)
    if request.task in STRENGTH:
        found["Denoising strength"] = f"{request.strength:g}"
    if request.image_guidance_scale is not None:
        found["Image CFG scale"] = f"{request.image_guidance_scale:g}"
    if request.eta is not None:
        found["Eta"] = f"{request.eta:g}"
    if request.computed_steps is not None:
        found["Computed steps"] = str(request.computed_steps)
    if request.guidance_hold is not None:
        found["Guidance hold"] = f"{request.guidance_hold:g}"
    if request.decoder == "tiny":
        found["Decoder"] = request.decoder
    if request.guidance_rescale:
        found["Guidance rescale"] = f"{request.guidance_rescale:g}"
    if request.guidance_interval != (0.0, 1.0):
        found["Guidance interval"] = "{:g}-{:g}".format(*request.guidance_interval)
    return found
