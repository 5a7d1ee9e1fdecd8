"""Batches of pictures and prompts. Batch `i` of a seed is always the same, so a resumed run needs no memory of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from sticker_train.compose import is_thing, pair, several
from sticker_train.pack import Bytes, Pictures
from sticker_train.words import prompt_for, with_style


@dataclass(frozen=True)
class Batch:
    """Pictures and their prompts."""

    pixels: Bytes
    """(n, side, side, 4)."""
    prompts: list[str]


class Sampler:
    """Draws batches in which no two pictures show the same concept."""

    def __init__(self, pictures: Pictures, seed: int, *, composed: float = 0.0) -> None:
        """`composed` is the share of pictures that are pasted together from several."""
        self.pictures, self.seed, self.composed = pictures, seed, composed
        concepts: defaultdict[str, list[int]] = defaultdict(list)
        things: defaultdict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(pictures.rows):
            concepts[row.concept].append(index)
            if is_thing(row):
                things[row.style].append(index)
        self._concepts = list(concepts.values())
        self._things = {style: places for style, places in things.items() if len(places) > 1}

    def batch(self, step: int, size: int) -> Batch:
        """At most as many pictures as there are concepts."""
        random = np.random.default_rng((self.seed, step))
        concepts = random.permutation(len(self._concepts))[:size]
        drawn = [self._draw(int(concept), random) for concept in concepts]
        return Batch(np.stack([pixels for pixels, _ in drawn]), [prompt for _, prompt in drawn])

    def _draw(self, concept: int, random: np.random.Generator) -> tuple[Bytes, str]:
        if self._things and random.random() < self.composed:
            return self._composed(random)
        index = int(random.choice(self._concepts[concept]))
        return self.pictures.pixels[index], prompt_for(self.pictures.rows[index], random)

    def _composed(self, random: np.random.Generator) -> tuple[Bytes, str]:
        """Things of one style, so that a style word fits the whole."""
        style = str(random.choice(list(self._things)))
        a, b = (int(index) for index in random.choice(self._things[style], 2, replace=False))
        rows, pixels = self.pictures.rows, self.pictures.pixels
        if random.random() < 0.3:
            picture, text = several(rows[a], pixels[a], random)
        else:
            picture, text = pair((rows[a], rows[b]), (pixels[a], pixels[b]), random)
        return picture, with_style(text, style, random) if random.random() < 0.3 else text


def on_white(pixels: Bytes, device: str) -> torch.Tensor:
    """(n, side, side, 4) uint8 to (n, 3, side, side) in [-1, 1]."""
    rgb = torch.from_numpy(np.ascontiguousarray(pixels[..., :3])).to(device)
    return rgb.permute(0, 3, 1, 2).float() / 127.5 - 1
