"""The judge of a bundle: how well a picture shows its prompt, by two encoders into one space (CLIP, arXiv:2103.00020).

Limits: it reads the tokens of the bundle's own tokenizer, of a prompt the first that its encoder takes; it sees
pictures scaled to one square size, whatever their proportions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.component import Component
from pocketdiffusion.image import resize
from pocketdiffusion.prompt import token_row
from pocketdiffusion.prompt.syntax import parse_weights
from pocketdiffusion.prompt.tokenizer import ClipTokenizer
from pocketdiffusion.request import Request
from pocketdiffusion.tensors import Array
from pocketdiffusion.timing import Timings

TEXT, IMAGE = "judge_text", "judge_image"
COMPONENTS = (TEXT, IMAGE)
"""`input_ids` (n, length) to `text_embeds` (n, width); `pixel_values` (n, 3, side, side), RGB in [-1, 1], to
`image_embeds` (n, width) and `features` (n, any), which compare sets of pictures."""


class Judge:
    """The judge of one bundle."""

    def __init__(self, bundle: Bundle, text: Component, image: Component) -> None:
        self._bundle, self.text, self.image = bundle, text, image

    @classmethod
    def of(cls, bundle: Bundle, components: Mapping[str, Component]) -> Judge | None:
        """The judge of a bundle that holds one."""
        if not set(COMPONENTS) <= components.keys():
            return None
        return cls(bundle, *(components[name] for name in COMPONENTS))

    @cached_property
    def tokenizer(self) -> ClipTokenizer:
        """The bundle's tokenizer, read on first use."""
        return ClipTokenizer.from_bundle(self._bundle)

    @property
    def side(self) -> int:
        """Pixels of the square that it sees."""
        side = self.image.entry.inputs["pixel_values"].shape[-1]
        if not isinstance(side, int):
            raise TypeError("the judge's graph takes pictures of any size; its input must be fixed to one")
        return side

    def scores(self, images: Array, request: Request, timings: Timings) -> Array:
        """How well each picture, (n, height, width, 3) in [-1, 1], shows its prompt: cosines (n,) in [-1, 1].

        Scores rank pictures of one prompt; those of different prompts are not to be compared.
        """
        prompts = [_plain(text) if request.weighting else text for text in request.prompt]
        with timings.span("judge"):
            read = np.repeat(self.read(prompts, timings), request.num_images_per_prompt, axis=0)
            seen, _ = self.see(images, timings)
        scores: Array = (read * seen).sum(axis=1)
        return scores

    def read(self, prompts: Sequence[str], timings: Timings) -> Array:
        """Unit vectors (n, width) of prompts."""
        length = self.tokenizer.length
        rows = [token_row(self.tokenizer, self.tokenizer.encode(text)[: length - 2]) for text in prompts]
        with self.text.use() as component:
            return _unit(component.run({"input_ids": np.array(rows, np.int64)}, timings)["text_embeds"])

    def see(self, images: Array, timings: Timings) -> tuple[Array, Array]:
        """Unit vectors (n, width) and features of pictures (n, height, width, 3) in [-1, 1]."""
        pixels = np.ascontiguousarray(resize(images, self.side, self.side).transpose(0, 3, 1, 2))
        with self.image.use() as component:
            outputs = component.run({"pixel_values": pixels}, timings)
        return _unit(outputs["image_embeds"]), np.asarray(outputs["features"], np.float32)


def _plain(prompt: str) -> str:
    """A prompt without its weights."""
    return " ".join(fragment.text for fragment in parse_weights(prompt))


def _unit(vectors: Array) -> Array:
    unit: Array = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
    return unit
