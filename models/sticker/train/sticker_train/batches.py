"""Batches of pictures and prompts. Batch `i` of a seed is always the same, so a resumed run needs no memory of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sticker_train.compose import is_thing, pair, several
from sticker_train.pack import Bytes, Pictures, Row
from sticker_train.recolour import can_recolour, recoloured
from sticker_train.words import DEFAULT_STYLE, SHARES, prompt_for, with_style

RECOLOURED = 0.15
"""How often a picture that can be is shown in another colour."""
RARE = 0.15
"""Weight of flags, clocks, text signs and repetitions in other skin tones beside 1 for the rest."""
UNSAID, SAID = 0.1, 0.9
"""How often a prompt says its style: the default one, and another."""


@dataclass(frozen=True)
class Batch:
    """Pictures and their prompts."""

    pixels: Bytes
    """(n, side, side, 4)."""
    prompts: list[str]
    places: tuple[int | None, ...]
    """Of each picture among the pictures drawn from; None where it was made of others."""


Drawn = tuple[Bytes, str, int | None]
Styled = Callable[[str], float]


class Sampler:
    """Draws batches in which no two pictures show the same concept."""

    def __init__(self, pictures: Pictures, seed: int, *, composed: float = 0.0) -> None:
        """`composed` is the share of pictures that are pasted together from several."""
        self.pictures, self.seed = pictures, seed
        concepts: defaultdict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(pictures.rows):
            concepts[row.concept].append(index)
        self._concepts = list(concepts.values())
        self._composer = Composer(pictures, composed)

    def batch(self, step: int, size: int) -> Batch:
        """At most as many pictures as there are concepts."""
        random = np.random.default_rng((self.seed, step))
        concepts = random.permutation(len(self._concepts))[:size]
        return _batch([self._draw(int(concept), random) for concept in concepts])

    def _draw(self, concept: int, random: np.random.Generator) -> Drawn:
        if self._composer.wanted(random):
            return self._composer.draw(random, styled=lambda style: 0.3)
        index = int(random.choice(self._concepts[concept]))
        return self.pictures.pixels[index], prompt_for(self.pictures.rows[index], random), index


class WeightedSampler:
    """Draws each set as often as `SHARES` says; other styles than the default are nearly always asked for by name."""

    def __init__(self, pictures: Pictures, seed: int, *, composed: float) -> None:
        """`composed` is the share of pictures that are pasted together from several."""
        self.pictures, self.seed = pictures, seed
        self._default = {row.concept for row in pictures.rows if row.style == DEFAULT_STYLE}
        weights = np.array([1.0 if row.core and "skin tone" not in row.caption else RARE for row in pictures.rows])
        styles = np.array([row.style for row in pictures.rows])
        for style in set(styles):
            own = styles == style
            weights[own] *= SHARES.get(str(style), 0.0) / weights[own].sum()
        self._chances: npt.NDArray[np.float64] = weights / weights.sum()
        self._composer = Composer(pictures, composed, SHARES)

    def batch(self, step: int, size: int) -> Batch:
        """Any number of pictures."""
        random = np.random.default_rng((self.seed, step))
        return _batch([self._draw(random) for _ in range(size)])

    def _draw(self, random: np.random.Generator) -> Drawn:
        if self._composer.wanted(random):
            return self._composer.draw(random, styled=lambda style: UNSAID if style == DEFAULT_STYLE else SAID)
        index = int(random.choice(len(self._chances), p=self._chances))
        row, pixels = self.pictures.rows[index], self.pictures.pixels[index]
        styled = self._styled(row)
        if can_recolour(row) and random.random() < RECOLOURED:
            turned, text = recoloured(row, pixels, random)
            return turned, with_style(text, row.style, random) if random.random() < styled else text, None
        return pixels, prompt_for(row, random, styled=styled), index

    def _styled(self, row: Row) -> float:
        if row.style == DEFAULT_STYLE:
            return UNSAID
        return SAID if row.concept in self._default else 0.5


class Composer:
    """Pastes things of one style together, so that a style word fits the whole."""

    def __init__(self, pictures: Pictures, share: float, weights: Mapping[str, float] | None = None) -> None:
        """Styles are drawn by their weights, or all alike."""
        self._pictures, self._share = pictures, share
        things: defaultdict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(pictures.rows):
            if is_thing(row):
                things[row.style].append(index)
        self._things = {style: places for style, places in things.items() if len(places) > 1}
        chances = np.array([1.0 if weights is None else weights.get(style, 0.0) for style in self._things])
        self._chances = chances / chances.sum() if self._things else chances

    def wanted(self, random: np.random.Generator) -> bool:
        """Whether the next picture is to be pasted together."""
        return bool(self._things) and random.random() < self._share

    def draw(self, random: np.random.Generator, *, styled: Styled) -> Drawn:
        """Two things, or several of one; `styled` gives for a style how often its words are said."""
        style = str(random.choice(list(self._things), p=self._chances))
        a, b = (int(index) for index in random.choice(self._things[style], 2, replace=False))
        rows, pixels = self._pictures.rows, self._pictures.pixels
        if random.random() < 0.3:
            picture, text = several(rows[a], pixels[a], random)
        else:
            picture, text = pair((rows[a], rows[b]), (pixels[a], pixels[b]), random)
        return picture, with_style(text, style, random) if random.random() < styled(style) else text, None


def _batch(drawn: list[Drawn]) -> Batch:
    pixels, prompts, places = zip(*drawn, strict=True)
    return Batch(np.stack(pixels), list(prompts), places)


def on_white(pixels: Bytes, device: str) -> torch.Tensor:
    """(n, side, side, 4) uint8 to (n, 3, side, side) in [-1, 1]."""
    rgb = torch.from_numpy(np.ascontiguousarray(pixels[..., :3])).to(device)
    return rgb.permute(0, 3, 1, 2).float() / 127.5 - 1
