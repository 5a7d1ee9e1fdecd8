"""Pictures of several things, pasted together from single ones: so that combinations are learnt and not only names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sticker_train.pack import Bytes, Row
from sticker_train.words import named, plural

COUNTS = ("", "one", "two", "three", "four")
THINGS = ("animals-nature", "food-drink", "objects", "travel-places", "activities", "fantasy-monster", "fantasy-item")
"""Groups of things that can stand beside others."""
_SMALL = 0.5
"""Side of a thing among several, of the whole picture's."""


def is_thing(row: Row) -> bool:
    """Whether the picture shows something to put beside another."""
    return row.core and row.group in THINGS and len(row.caption.split()) <= 2


def pair(rows: tuple[Row, Row], pixels: tuple[Bytes, Bytes], random: np.random.Generator) -> tuple[Bytes, str]:
    """Two things, (side, side, 4) each, side by side or one above the other, and the words for it."""
    first, second = (named(row, colour=random.random() < 0.5) for row in rows)
    relation = str(random.choice(["next to", "above", "below", "and"]))
    far, near = 0.0, 1 - _SMALL
    middle = float(random.uniform(0.15, 0.35))
    if relation in ("above", "below"):
        places = [(far, middle), (near, middle)]
        places = places if relation == "above" else places[::-1]
    else:
        places = [(middle, far), (middle, near)]
        places = places if random.random() < 0.5 else places[::-1]
    return paste(pixels, places), f"{first} {relation} {second}"


def several(row: Row, pixels: Bytes, random: np.random.Generator) -> tuple[Bytes, str]:
    """Two, three or four of a thing, and the words for it."""
    count = int(random.integers(2, 5))
    cells = [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5)]
    places = {2: [(0.25, 0.0), (0.25, 0.5)], 3: [(0.0, 0.25), (0.5, 0.0), (0.5, 0.5)], 4: cells}[count]
    return paste([pixels] * count, places), f"{COUNTS[count]} {plural(row.caption)}"


def paste(pixels: Sequence[Bytes], places: Sequence[tuple[float, float]]) -> Bytes:
    """Things at half their size on white. Places are (top, left) in parts of the picture; (side, side, 4) uint8."""
    side = pixels[0].shape[0]
    small = int(side * _SMALL)
    canvas = np.full((side, side, 4), (255, 255, 255, 0), np.uint8)
    for picture, (top, left) in zip(pixels, places, strict=True):
        bands = Image.fromarray(picture).split()
        thing = np.stack([np.asarray(band.resize((small, small), Image.Resampling.BOX)) for band in bands], -1)
        y, x = int(top * side), int(left * side)
        canvas[y : y + small, x : x + small] = thing
    return canvas
