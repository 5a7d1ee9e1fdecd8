"""Stable Diffusion 1.x and 2.x and whatever is conditioned like them: one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.component import Component
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.families import Conditioning
from pocketdiffusion.families.guidance import scale_input, takes_scale
from pocketdiffusion.prompt import SplitPrompts, encode_prompts, split_prompts
from pocketdiffusion.prompt.tokenizer import ClipTokenizer
from pocketdiffusion.request import SIZE_IDS, Request
from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion.timing import Timings


class StableDiffusion:
    """Conditioning by the hidden states of one text encoder."""

    denoiser = "unet"
    schedules: Mapping[str, str] = {}

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    @cached_property
    def tokenizer(self) -> ClipTokenizer:
        """The bundle's tokenizer, read on first use."""
        return ClipTokenizer.from_bundle(self._bundle)

    def prepare(self) -> None:
        """Read the tokenizer."""
        _ = self.tokenizer

    def split(self, request: Request, components: Mapping[str, Component]) -> SplitPrompts:
        """The prompts and, with guidance by two passes, the negative ones. Raises InvalidRequest."""
        for name in SIZE_IDS:
            if getattr(request, name) is not None:
                raise InvalidRequest(
                    name, f"{name} was given; only SDXL models take it, {self._bundle.manifest.name} is none"
                )
        negatives = request.negative_prompt or ("",) * len(request.prompt)
        return split_prompts(
            self.tokenizer,
            request.prompt,
            negatives if request.guided and not takes_scale(components[self.denoiser]) else None,
            weighting=request.weighting,
            long_prompt=request.long_prompt,
        )

    def condition(
        self, request: Request, split: SplitPrompts, components: Mapping[str, Component], timings: Timings
    ) -> Conditioning:
        """Text encoder states, (images, tokens, width) float32, for the prompts and, with guidance, the negatives."""
        encoder = components["text_encoder"]
        scale = scale_input(request, components[self.denoiser])

        def run(ids: AnyArray) -> Mapping[str, AnyArray]:
            return encoder.run({"input_ids": ids}, timings)

        with encoder.use():
            encoded = encode_prompts(self.tokenizer, run, split, clip_skip=request.clip_skip)
        negative = None if encoded.negative is None else _inputs(encoded.negative, request)
        return Conditioning(_inputs(encoded.positive, request) | scale, negative, tuple(encoded.messages))


def _inputs(states: Array, request: Request) -> dict[str, Array]:
    return {"encoder_hidden_states": np.repeat(states, request.num_images_per_prompt, axis=0)}
