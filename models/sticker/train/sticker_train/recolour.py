"""Pictures in colours that they don't have, so that a colour word is learnt apart from the thing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sticker_train.pack import Bytes, Row
from sticker_train.words import COLOURS

HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 120, "cyan": 185, "blue": 220, "purple": 275, "pink": 325}
"""Colour word -> degrees."""
GROUPS = ("animals-nature", "food-drink", "objects", "travel-places", "activities")
"""Groups of things that stay themselves in another colour."""
_SATURATED = 70
"""Of 255; less is taken for white, gray or black."""


def can_recolour(row: Row) -> bool:
    """Whether the picture has one bright colour that its name doesn't say."""
    told = set(row.caption.split()) & set(COLOURS)
    return row.core and row.group in GROUPS and bool(row.article) and row.colour in HUES and not told


def recoloured(row: Row, pixels: Bytes, random: np.random.Generator) -> tuple[Bytes, str]:
    """The picture (side, side, 4) with all hues turned to a drawn colour, and the words for it."""
    colour = str(random.choice([name for name in HUES if name != row.colour]))
    bands: npt.NDArray[Any] = np.asarray(Image.fromarray(pixels[..., :3]).convert("HSV")).astype(np.int32)
    hue, saturation = bands[..., 0], bands[..., 1]
    angles = np.exp(2j * np.pi * hue[saturation > _SATURATED] / 256)
    middle = np.angle(angles.sum()) / (2 * np.pi) * 256 if len(angles) else 0.0
    bands[..., 0] = (hue + round(HUES[colour] / 360 * 256 - middle)) % 256
    turned = np.asarray(Image.fromarray(bands.astype(np.uint8), "HSV").convert("RGB"))
    article = "an" if colour == "orange" else "a"
    return np.concatenate([turned, pixels[..., 3:]], -1), f"{article} {colour} {row.caption}"
