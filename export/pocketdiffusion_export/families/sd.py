"""SD 1.x and 2.x, LCM, inpainting, instructions: one CLIP text encoder, a UNet with cross-attention, an AutoencoderKL.

Limit: UNets whose input is the latents alone, or with those of a picture after them, or with a mask and those of a
masked picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from pocketdiffusion.bundle.manifest import Numbers
from pocketdiffusion.golden import golden_inputs
from pocketdiffusion.presets import DECODERS
from pocketdiffusion.safety import COMPONENT as SAFETY_CHECKER
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.component import ComponentSpec, Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families.base import Samples
from pocketdiffusion_export.families.clip import text_encoder
from pocketdiffusion_export.families.judge import judge, judge_samples
from pocketdiffusion_export.families.parts import (
    other_shape,
    tiny_vae_decoder,
    unet,
    unet_feeds,
    unet_inputs,
    vae_decoder,
    vae_encoder,
    vae_factor,
)
from pocketdiffusion_export.families.safety import safety_checker, safety_samples, unchecked
from pocketdiffusion_export.plan import ExportPlan, GoldenPlan

SAMPLING_WORK = 2.9e13
"""UNet weights times latent cells, summed over the steps that make samples: 8 steps of SD 1.5 at 512x512."""
MIN_SAMPLING_STEPS = 4
"""Of one prompt, so that samples come from all noise levels."""

MARKS = {"mask_image": "inpaint", "image_guidance_scale": "instruct"}
"""Parameter of a Diffusers pipeline -> the task of models that are made for it."""

Rgb = tuple[tuple[float, float, float], ...]


class StableDiffusion:
    """The family; see `base.Family`. Related families override what differs."""

    name = "sd"
    tokenizers: Mapping[str, str] = {"text_encoder": "tokenizer"}
    """Text encoder -> its tokenizer."""

    def components(self, pipe: Any) -> tuple[ComponentSpec, ...]:
        """Text encoders, unet, vae_decoder and vae_encoder, with optimum's names of inputs and outputs.

        The tiny decoder, the safety checker and the judge too where the source has them.
        """
        self.check(pipe)
        checker = () if _checker(pipe) is None else (safety_checker(pipe.safety_checker),)
        decoders = (vae_decoder(pipe.vae), *tiny_vae_decoder(pipe))
        return *self.text_encoders(pipe), unet(pipe), *decoders, vae_encoder(pipe.vae), *checker, *judge(pipe)

    def check(self, pipe: Any) -> None:
        """Raise ExportError for what this family does not cover."""
        config, latent = pipe.unet.config, pipe.vae.config.latent_channels
        extra = {None: 0, "inpaint": latent + 1, "instruct": latent}
        if config.in_channels - config.out_channels != extra[_only(pipe)]:
            raise ExportError(
                f"a {type(pipe).__name__} with a UNet of {config.in_channels} input channels can't be exported; known: "
                "4 in a text-to-image pipeline, whose bundle can also repaint, 9 in an inpainting pipeline, and 8 in "
                "an InstructPix2Pix pipeline"
            )

    def tasks(self, pipe: Any) -> tuple[str, ...]:
        """What the bundle can do."""
        only = _only(pipe)
        return (only,) if only else ("text-to-image", "image-to-image", "inpaint")

    def text_encoders(self, pipe: Any) -> tuple[ComponentSpec, ...]:
        """Their graphs."""
        return (text_encoder(pipe.text_encoder),)

    def defaults(self, pipe: Any) -> tuple[int, float]:
        """Steps and guidance: Diffusers' guidance, and those of its LCM pipeline for UNets that take the scale."""
        return (25, 7.5) if pipe.unet.config.time_cond_proj_dim is None else (4, 8.5)

    def samples(self, pipe: Any, prompts: Sequence[str], plan: ExportPlan) -> Samples:
        """Generate prompts with Diffusers and keep what went into each component; fewer and shorter for large models.

        The last sample of each has another batch, size and length, so that axes fixed by tracing are found.
        """
        names, numbers = unet_inputs(pipe.unet.config), self._numbers(pipe, plan)
        denoiser: list[Feeds] = []
        decoder: list[Feeds] = []

        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            denoiser.append(unet_feeds(args, kwargs, names))

        hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
        generated, steps = _sampling(pipe, prompts, numbers)
        try:
            for seed, prompt in enumerate(generated):
                scaled = self.generate(pipe, GoldenPlan(prompt, seed, steps), numbers, "latent")
                decoder.append({"latent_sample": (scaled / numbers.latent_scale + numbers.latent_shift).numpy()})
        finally:
            hook.remove()
        denoiser.append(other_shape(denoiser[-1]))
        decoder.append(other_shape(decoder[-1], 2))  # no more pixels than in one, as decoding takes much memory
        with torch.inference_mode():
            images = [pipe.vae.decode(torch.from_numpy(feeds["latent_sample"])).sample.numpy() for feeds in decoder]
        ids = {name: _ids(getattr(pipe, tokenizer), prompts) for name, tokenizer in self.tokenizers.items()}
        return {
            **ids,
            "unet": denoiser,
            "vae_decoder": decoder,
            DECODERS["tiny"]: [_rescaled(feeds, numbers) for feeds in decoder],
            "vae_encoder": [{"sample": image.clip(-1, 1)} for image in images],
            **({} if _checker(pipe) is None else {SAFETY_CHECKER: safety_samples(pipe, images)}),
            **judge_samples(pipe, ids["text_encoder"], images),
        }

    def numbers(self, pipe: Any, samples: Samples, plan: ExportPlan) -> Numbers:
        """From the source's configs and the plan; the preview's colours are fitted to the decoder."""
        pairs = zip(samples["vae_decoder"], samples["vae_encoder"], strict=True)
        bare = self._numbers(pipe, plan)
        return self._numbers(pipe, plan, _fit_rgb([(d["latent_sample"], e["sample"]) for d, e in pairs], bare))

    def reference_image(self, pipe: Any, golden: GoldenPlan, numbers: Numbers) -> AnyArray:
        """The golden image from Diffusers."""
        image = np.round(self.generate(pipe, golden, numbers, "np")[0].clip(0, 1) * 255).astype(np.uint8)
        given = golden_inputs(self.tasks(pipe), numbers.width, numbers.height)
        if "mask_image" in given:  # the runtime keeps the pixels that Diffusers decodes again
            image = np.where(given["mask_image"][..., np.newaxis] > 0, image, given["image"])
        found: AnyArray = image
        return found

    def generate(self, pipe: Any, golden: GoldenPlan, numbers: Numbers, output: str) -> Any:
        """Diffusers' own generation: a tensor of latents, or float32 pictures in [0, 1]."""
        given = golden_inputs(self.tasks(pipe), numbers.width, numbers.height)
        fixed: dict[str, Any] = {"width": numbers.width, "height": numbers.height}
        if _only(pipe) == "inpaint":
            fixed |= {"strength": 1.0}  # the runtime's default; SDXL's pipeline has 0.9999
        if _only(pipe) == "instruct":
            fixed = {}  # the picture's size is the result's
        with unchecked(pipe):
            return pipe(
                golden.prompt,
                num_inference_steps=numbers.default_steps if golden.steps is None else golden.steps,
                guidance_scale=numbers.default_guidance if golden.guidance is None else golden.guidance,
                generator=torch.Generator("cpu").manual_seed(golden.seed),
                output_type=output,
                **fixed,
                **{name: Image.fromarray(pixels) for name, pixels in given.items()},
            ).images

    def _numbers(self, pipe: Any, plan: ExportPlan, rgb: Rgb | None = None) -> Numbers:
        vae, given, factor = pipe.vae.config, plan.numbers, vae_factor(pipe.vae)
        native = pipe.unet.config.sample_size * factor
        steps, guidance = self.defaults(pipe)
        return Numbers(
            width=native if given.width is None else given.width,
            height=native if given.height is None else given.height,
            latent_channels=vae.latent_channels,
            latent_scale=vae.scaling_factor,
            latent_shift=vae.shift_factor or 0.0,
            vae_factor=factor,
            size_multiple=factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1),
            text_length=pipe.tokenizer.model_max_length,
            default_steps=steps if given.default_steps is None else given.default_steps,
            default_guidance=guidance if given.default_guidance is None else float(given.default_guidance),
            latent_rgb=rgb,
        )


FAMILY = StableDiffusion()


def _only(pipe: Any) -> str | None:
    """The task of a Diffusers pipeline for models that can do nothing else."""
    known = inspect.signature(pipe.__call__).parameters
    return next((task for name, task in MARKS.items() if name in known), None)


def _checker(pipe: Any) -> Any:
    """The source's safety checker, or None; pipelines for SDXL know none."""
    return getattr(pipe, SAFETY_CHECKER, None)


def _rescaled(feeds: Feeds, numbers: Numbers) -> Feeds:
    """A full decoder's latents in the denoiser's scale."""
    return {
        name: (raw - np.float32(numbers.latent_shift)) * np.float32(numbers.latent_scale) for name, raw in feeds.items()
    }


def _sampling(pipe: Any, prompts: Sequence[str], numbers: Numbers) -> tuple[Sequence[str], int]:
    """The prompts to generate and the steps of each: as many as `SAMPLING_WORK` allows, at least one short run."""
    weights = sum(tensor.numel() for tensor in pipe.unet.parameters())
    cells = numbers.width * numbers.height // numbers.vae_factor**2
    steps, allowed = numbers.default_steps, int(SAMPLING_WORK / (weights * cells))
    if allowed >= steps:
        return prompts[: allowed // steps], steps
    return prompts[:1], min(steps, max(MIN_SAMPLING_STEPS, allowed))


def _ids(tokenizer: Any, prompts: Sequence[str]) -> list[Feeds]:
    """Every prompt and the empty one, and three in one batch."""
    length = tokenizer.model_max_length
    texts = ["", *prompts]
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
    rows = [row[np.newaxis].astype(np.int64) for row in ids]
    return [*({"input_ids": row} for row in rows), {"input_ids": np.concatenate(rows[:3])}]


def _fit_rgb(pairs: Sequence[tuple[AnyArray, AnyArray]], numbers: Numbers) -> Rgb:
    """Least squares from latent cells to the mean colour of their pixels; a last row for the offset."""
    cells, colours = [], []
    for latents, image in pairs:
        scaled = (latents - numbers.latent_shift) * numbers.latent_scale
        batch, channels, height, width = scaled.shape
        blocks = image.reshape(batch, 3, height, numbers.vae_factor, width, numbers.vae_factor).mean((3, 5))
        cells.append(scaled.transpose(0, 2, 3, 1).reshape(-1, channels))
        colours.append(blocks.transpose(0, 2, 3, 1).reshape(-1, 3))
    matrix = np.concatenate(cells).astype(np.float64)
    matrix = np.concatenate([matrix, np.ones((len(matrix), 1))], 1)
    solution = np.linalg.lstsq(matrix, np.concatenate(colours).astype(np.float64), rcond=None)[0]
    return tuple((round(r, 5), round(g, 5), round(b, 5)) for r, g, b in solution.tolist())
