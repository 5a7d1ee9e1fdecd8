"""What is evaluated with: captions, and the pictures that no stage was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sticker_train.pack import Pictures, Row
from sticker_train.words import named


def caption_list(rows: Sequence[Row], count: int) -> list[str]:
    """Captions of distinct things, held-out pictures' first, in an order that only the pictures' keys decide."""
    plain = (row for row in rows if _is_plain(row))
    concepts: dict[str, str] = {}
    for row in sorted(plain, key=lambda row: (not row.held_out, hashlib.sha256(row.key.encode()).hexdigest())):
        concepts.setdefault(row.concept, named(row))
    return list(dict.fromkeys(concepts.values()))[:count]


def write_evaluation(pictures: Pictures, folder: Path, count: int) -> int:
    """Write captions.txt, and the held-out pictures as real/LINE-KEY.png; returns how many pictures."""
    captions = caption_list(pictures.rows, count)
    (folder / "real").mkdir(parents=True, exist_ok=True)
    (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8", newline="\n")
    lines = {caption: line for line, caption in enumerate(captions, 1)}
    written = 0
    for row, pixels in zip(pictures.rows, pictures.pixels, strict=True):
        if row.held_out and _is_plain(row) and named(row) in lines:
            file = folder / "real" / f"{lines[named(row)]:04d}-{row.key.replace('/', '-')}.png"
            Image.fromarray(pixels[..., :3]).save(file)
            written += 1
    return written


def _is_plain(row: Row) -> bool:
    return row.core and "skin tone" not in row.caption
