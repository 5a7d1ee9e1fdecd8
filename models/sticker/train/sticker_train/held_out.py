"""What is evaluated with: captions, and the pictures that no stage was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sticker_train.combinations import combinations
from sticker_train.pack import Bytes, Pictures, Row
from sticker_train.words import named

THUMBNAIL = 32
"""Pixels along a side of training.npy's pictures."""
COMBINATIONS = 300


def caption_list(rows: Sequence[Row], count: int) -> list[str]:
    """Captions of distinct things, held-out pictures' first, in an order that only the pictures' keys decide."""
    plain = (row for row in rows if _is_plain(row))
    concepts: dict[str, str] = {}
    for row in sorted(plain, key=lambda row: (not row.held_out, hashlib.sha256(row.key.encode()).hexdigest())):
        concepts.setdefault(row.concept, named(row))
    return list(dict.fromkeys(concepts.values()))[:count]


def write_evaluation(pictures: Pictures, folder: Path, count: int) -> int:
    """Write captions.txt and the held-out pictures as real/LINE-KEY.png; returns how many.

    Also combinations.txt with combinations/LINE-pasted.png, and training.npy: small pictures of all that is trained on,
    uint8 (n, 32, 32, 3), in which a generated one is looked for.
    """
    captions = caption_list(pictures.rows, count)
    _new(folder / "real")
    _write_lines(folder / "captions.txt", captions)
    lines = {caption: line for line, caption in enumerate(captions, 1)}
    written = 0
    for row, pixels in zip(pictures.rows, pictures.pixels, strict=True):
        if row.held_out and _is_plain(row) and named(row) in lines:
            _save(pixels, folder / "real" / f"{lines[named(row)]:04d}-{row.key.replace('/', '-')}.png")
            written += 1
    trained = pictures.part(held_out=False)
    np.save(folder / "training.npy", np.stack([_thumbnail(pixels) for pixels in trained.pixels]))
    _new(folder / "combinations")
    made = combinations(trained, COMBINATIONS)
    _write_lines(folder / "combinations.txt", [text for _, text in made])
    for line, (pixels, _) in enumerate(made, 1):
        _save(pixels, folder / "combinations" / f"{line:04d}-pasted.png")
    return written


def _new(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _save(pixels: Bytes, file: Path) -> None:
    Image.fromarray(pixels[..., :3]).save(file)


def _thumbnail(pixels: Bytes) -> Bytes:
    picture = Image.fromarray(pixels[..., :3]).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(picture)


def _is_plain(row: Row) -> bool:
    return row.core and "skin tone" not in row.caption
