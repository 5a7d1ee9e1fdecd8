"""A contact sheet: a row for each prompt, a column for each setting, written as one picture file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from pocketdiffusion.tensors import AnyArray

CELL, GAP, LABEL, HEAD = 64, 4, 132, 18
"""Pixels: of a picture's side, between cells, of a prompt's column, of the head line."""
PROMPT_COLUMNS = 2
"""The prompts are laid out in so many columns of rows, so that the sheet is about as wide as high."""
_LETTERS = 22
"""Characters of a prompt's line."""


def contact_sheet(prompts: Sequence[str], columns: Mapping[str, Sequence[AnyArray]], file: Path) -> None:
    """Write the pictures, uint8 (h, w, 3), of each named column; a picture for each prompt, scaled to `CELL`."""
    rows = -(-len(prompts) // PROMPT_COLUMNS)
    block = LABEL + len(columns) * (CELL + GAP)
    sheet = Image.new("RGB", (PROMPT_COLUMNS * block, HEAD + rows * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, prompt in enumerate(prompts):
        left, top = index // rows * block, HEAD + index % rows * (CELL + GAP)
        draw.multiline_text((left + GAP, top + GAP), "\n".join(textwrap.wrap(prompt, _LETTERS)), fill="black")
        for place, (name, pictures) in enumerate(columns.items()):
            x = left + LABEL + place * (CELL + GAP)
            sheet.paste(Image.fromarray(pictures[index]).resize((CELL, CELL), Image.Resampling.LANCZOS), (x, top))
            if index % rows == 0:
                draw.text((x, GAP // 2), name, fill="black")
    sheet.save(file, quality=88)
