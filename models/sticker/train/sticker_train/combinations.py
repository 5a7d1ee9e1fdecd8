"""Prompts of new combinations, and what they mean in pictures: several things of which one has another colour.

The denoiser is shown several things in their own colours, and single things in others: never both at once. So none of
these was ever shown.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sticker_train.compose import is_thing, pair, several
from sticker_train.pack import Bytes, Pictures, Row
from sticker_train.recolour import can_recolour, recoloured
from sticker_train.words import DEFAULT_STYLE

SEED = 0
COUNTED = 0.3
"""Share of several of one thing."""


def combinations(pictures: Pictures, count: int) -> list[tuple[Bytes, str]]:
    """At most `count` pictures (side, side, 4) with distinct prompts, of the default style's things; as many as can be
    found in ten times as many draws."""
    random = np.random.default_rng(SEED)
    things = [index for index, row in enumerate(pictures.rows) if row.style == DEFAULT_STYLE and is_thing(row)]
    turnable = [index for index in things if can_recolour(pictures.rows[index])]
    found: dict[str, Bytes] = {}
    for _ in range(10 * count):
        if len(found) == count or not turnable:
            break
        a, b = int(random.choice(turnable)), int(random.choice(things))
        row, pixels = _turned(pictures.rows[a], pictures.pixels[a], random)
        if random.random() < COUNTED:
            picture, text = several(row, pixels, random)
        elif pictures.rows[b].concept != row.concept:
            picture, text = pair((row, pictures.rows[b]), (pixels, pictures.pixels[b]), random)
        else:
            continue
        found.setdefault(text, picture)
    return [(picture, text) for text, picture in found.items()]


def _turned(row: Row, pixels: Bytes, random: np.random.Generator) -> tuple[Row, Bytes]:
    """The thing in another colour, which its caption then says."""
    turned, text = recoloured(row, pixels, random)
    article, caption = text.split(" ", 1)
    return replace(row, article=article, caption=caption, colour=""), turned
