"""Stable Diffusion XL: two text encoders, a pooled text embedding, and ids for sizes and crop (arXiv:2307.01952).

Limits: the same prompt goes to both encoders; no refiner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.component import Component
from pocketdiffusion.errors import BundleUnsupported
from pocketdiffusion.families import Conditioning
from pocketdiffusion.families.guidance import scale_input, takes_scale
from pocketdiffusion.prompt import SplitPrompts, encode_chunks, split_prompts
from pocketdiffusion.prompt.encode import Chunk
from pocketdiffusion.prompt.tokenizer import ClipTokenizer
from pocketdiffusion.request import Request
from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion.timing import Timings

ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")


class StableDiffusionXL:
    """Conditioning by the penultimate states of two encoders, side by side, and by what the second one pools."""

    denoiser = "unet"
    schedules: Mapping[str, str] = {"align_your_steps": "align_your_steps_sdxl"}

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    @cached_property
    def tokenizers(self) -> tuple[ClipTokenizer, ...]:
        """One for each encoder, read on first use."""
        return tuple(ClipTokenizer.from_bundle(self._bundle, folder) for folder in TOKENIZERS)

    def prepare(self) -> None:
        """Read both tokenizers."""
        _ = self.tokenizers

    def split(self, request: Request, components: Mapping[str, Component]) -> SplitPrompts:
        """The prompts, by the first tokenizer, and the negative ones unless zeros stand for them."""
        guided = self._guided(request, components)
        negatives = request.negative_prompt or ("",) * len(request.prompt)
        return split_prompts(
            self.tokenizers[0],
            request.prompt,
            negatives if guided and not self._zeros(request) else None,
            weighting=request.weighting,
            long_prompt=request.long_prompt,
        )

    def condition(
        self, request: Request, split: SplitPrompts, components: Mapping[str, Component], timings: Timings
    ) -> Conditioning:
        """States (images, tokens, both widths), `text_embeds` (images, width) and `time_ids` (images, 6), float32."""
        guided = self._guided(request, components)
        shared = {"time_ids": _time_ids(request)} | scale_input(request, components[self.denoiser])
        rows = self._encode(split.rows, request, components, timings)
        count, copies = len(split.positive), request.num_images_per_prompt
        positive = {name: np.repeat(array[:count], copies, axis=0) for name, array in rows.items()}
        negative = {name: np.repeat(array[count:], copies, axis=0) for name, array in rows.items()}
        if self._zeros(request):
            negative = {name: np.zeros_like(array) for name, array in positive.items()}
        return Conditioning(positive | shared, negative | shared if guided else None, split.messages)

    def _encode(
        self,
        prompts: Sequence[Sequence[Chunk]],
        request: Request,
        components: Mapping[str, Component],
        timings: Timings,
    ) -> dict[str, Array]:
        states: list[Array] = []
        pooled: Array | None = None
        for name, tokenizer in zip(ENCODERS, self.tokenizers, strict=True):
            with components[name].use() as encoder:

                def run(ids: AnyArray, encoder: Component = encoder) -> Mapping[str, AnyArray]:
                    return encoder.run({"input_ids": ids}, timings)

                hidden, pooled = encode_chunks(tokenizer, run, prompts, self._output(name, encoder, request.clip_skip))
            states.append(hidden)
        if pooled is None:
            raise BundleUnsupported(f"{ENCODERS[-1]} has no output 'text_embeds'; export the model again")
        return {"encoder_hidden_states": np.concatenate(states, axis=-1), "text_embeds": pooled}

    def _output(self, name: str, encoder: Component, clip_skip: int) -> str:
        """The output with the state before the last layer, less `clip_skip` layers; optimum's names count from 0."""
        layers = self._bundle.read_json(f"{name}/config.json").get("num_hidden_layers")
        wanted = layers - 1 - clip_skip if isinstance(layers, int) else -1
        output = f"hidden_states.{wanted}"
        if output not in encoder.entry.outputs:
            raise BundleUnsupported(f"clip_skip={clip_skip} needs the output '{output}' of {name}, which it has not")
        return output

    def _guided(self, request: Request, components: Mapping[str, Component]) -> bool:
        """By two passes."""
        return request.guided and not takes_scale(components[self.denoiser])

    def _zeros(self, request: Request) -> bool:
        """Whether zeros stand for a negative prompt that was not given."""
        return request.negative_prompt is None and self._zeros_for_empty

    @property
    def _zeros_for_empty(self) -> bool:
        """Whether no negative prompt means zeros (as Diffusers takes it) or the encoded empty text."""
        return bool(self._bundle.read_json("model_index.json").get("force_zeros_for_empty_prompt", True))


def _time_ids(request: Request) -> Array:
    """Original size, crop and target size, each (height, width) or (top, left), one row for each image."""
    if request.height is None or request.width is None:
        raise ValueError("the request must be resolved")
    size = (request.height, request.width)
    ids = (*(request.original_size or size), *(request.crops_coords_top_left or (0, 0)), *(request.target_size or size))
    return np.tile(np.array(ids, np.float32), (request.batch, 1))
