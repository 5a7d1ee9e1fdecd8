"""A handful of synthetic pictures in the form of the training data."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("apple", "book", "cat", "dog", "tree", "car", "fish", "box", "cherry", "star")
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
SIDE = 128


def write_source(folder: Path) -> Path:
    """Two sets of the same ten things: a coloured square on white, whose place tells the things apart."""
    folder.mkdir(parents=True)
    rows = []
    for style, (colour, rgb) in zip(("fluent3d", "noto"), COLOURS.items(), strict=True):
        with zipfile.ZipFile(folder / f"{style}.zip", "w") as archive:
            for index, name in enumerate(NAMES):
                archive.writestr(f"{name}.webp", _picture(index, rgb))
                rows.append(_row(style, name, colour, held_out=index == 9 and style == "noto"))
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _picture(index: int, rgb: tuple[int, int, int]) -> bytes:
    pixels = np.full((SIDE, SIDE, 4), (255, 255, 255, 0), np.uint8)
    top, left = 8 + 20 * (index // 4), 8 + 28 * (index % 4)
    pixels[top : top + 40, left : left + 24] = (*rgb, 255)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", lossless=True, exact=True)
    return out.getvalue()


def _row(style: str, name: str, colour: str, *, held_out: bool) -> dict[str, object]:
    return {
        "id": f"{style}/{name}",
        "set": style,
        "file": f"{style}.zip",
        "member": f"{name}.webp",
        "concept": name,
        "group": "objects",
        "caption": name,
        "article": "an" if name == "apple" else "a",
        "keywords": ["thing", "object", name],
        "colors": [[colour, 0.9]],
        "core": True,
        "split": "val" if held_out else "train",
    }
