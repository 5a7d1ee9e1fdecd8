"""The training pictures in one small file, and how it is read.

The file is a stored zip: `rows.jsonl` with what is known about each picture, and one lossless WebP each, RGB already on
white with the matte beside it. The source is a folder with `captions.jsonl` and a zip for each set (= style).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Bytes = npt.NDArray[np.uint8]

FREE_SETS = ("fluent3d", "fluentflat", "noto", "blob", "serenity", "dcss")
"""Those whose licences ask for no credit beside every picture: MIT, Apache-2.0, BSD-2-Clause, CC0."""
ROWS = "rows.jsonl"
_TIME = (2025, 1, 1, 0, 0, 0)
"""Of every member, so that the same pictures make the same bytes."""


class DataError(Exception):
    """The pictures can't be used: one line says what was found and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One picture and the words for it."""

    key: str
    style: str
    """Name of its set."""
    concept: str
    """Equal for the same thing in other sets, and in other skin tones."""
    group: str
    caption: str
    """Natural, lower case, without article or style."""
    article: str
    """"a", "an" or nothing."""
    keywords: tuple[str, ...]
    colour: str
    """The colour of most of it; empty where none has 30 % or the caption names another."""
    core: bool
    """False for symbols, arrows, flags, clocks: what is not drawn for its shape."""
    held_out: bool


@dataclass(frozen=True, slots=True)
class Pictures:
    """A pack in memory."""

    rows: tuple[Row, ...]
    pixels: Bytes
    """(n, side, side, 4): RGB on white, and the matte."""

    def part(self, *, held_out: bool) -> Pictures:
        """Those to train on, or those to judge by."""
        places = [index for index, row in enumerate(self.rows) if row.held_out == held_out]
        return Pictures(tuple(self.rows[index] for index in places), self.pixels[places])


def pack(source: Path, file: Path, sets: Sequence[str] = FREE_SETS, side: int | None = None) -> int:
    """Write the pictures of some sets to `file`, scaled to `side` pixels unless None; returns how many.

    Raises DataError for a folder without captions or without one of the sets.
    """
    captions = source / "captions.jsonl"
    if not captions.is_file():
        raise DataError(f"{source} holds no captions.jsonl; give the folder with the captions and a zip for each set")
    found = [json.loads(line) for line in captions.read_text(encoding="utf-8").splitlines()]
    known = {entry["set"] for entry in found}
    if missing := set(sets) - known:
        raise DataError(f"{source} has no set {', '.join(sorted(missing))}; it has {', '.join(sorted(known))}")
    chosen = [entry for entry in found if entry["set"] in sets]
    archives = {name: zipfile.ZipFile(source / name) for name in sorted({entry["file"] for entry in chosen})}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as out:
        lines = "".join(json.dumps(asdict(row_of(entry))) + "\n" for entry in chosen)
        out.writestr(zipfile.ZipInfo(ROWS, _TIME), lines)
        for entry in chosen:
            picture = archives[entry["file"]].read(entry["member"])
            out.writestr(zipfile.ZipInfo(f"{entry['id']}.webp", _TIME), _prepared(picture, entry, side))
    for archive in archives.values():
        archive.close()
    return len(chosen)


def row_of(entry: Mapping[str, Any]) -> Row:
    """A line of captions.jsonl as a row."""
    name, share = (entry["colors"] or [["", 0.0]])[0]
    return Row(
        key=entry["id"],
        style=entry["set"],
        concept=entry["concept"],
        group=entry["group"],
        caption=entry["caption"],
        article=entry["article"],
        keywords=tuple(entry["keywords"]),
        colour=name if share >= 0.3 and not entry.get("color_conflict") else "",
        core=entry["core"],
        held_out=entry["split"] == "val",
    )


def read_pack(file: Path, side: int) -> Pictures:
    """All pictures at `side` pixels. Raises DataError for a file that `pack` did not write."""
    try:
        with zipfile.ZipFile(file) as archive:
            lines = archive.read(ROWS).decode().splitlines()
            rows = tuple(_row(json.loads(line)) for line in lines)
            pixels = np.stack([_decoded(archive.read(f"{row.key}.webp"), side) for row in rows])
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is no pack of pictures ({error}); make one with the stage `pack`") from None
    return Pictures(rows, pixels)


def _row(entry: dict[str, Any]) -> Row:
    return Row(**entry | {"keywords": tuple(entry["keywords"])})


def _prepared(data: bytes, entry: Mapping[str, Any], side: int | None) -> bytes:
    """The member's bytes as they are, unless it must be scaled or given a matte."""
    inked = entry["set"] == "gameicons"  # black on white without a matte: the ink is one
    if side is None and not inked:
        return data
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    if inked:
        picture.putalpha(Image.fromarray(255 - np.asarray(picture)[..., 0]))
    if side is not None:
        picture = _scaled(picture, side)
    out = io.BytesIO()
    picture.save(out, "WEBP", lossless=True, exact=True, method=6)
    return out.getvalue()


def _decoded(data: bytes, side: int) -> Bytes:
    return np.asarray(_scaled(Image.open(io.BytesIO(data)).convert("RGBA"), side))


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    """Channel by channel, because Pillow scales RGBA as if its colours were not on white yet."""
    if picture.size == (side, side):
        return picture
    bands = [
        band.resize((side, side), Image.Resampling.BOX if side < band.width else Image.Resampling.BICUBIC)
        for band in picture.split()
    ]
    return Image.merge("RGBA", bands)
