"""Names of output files from patterns such as ``out/{model}-{seed}.png``.

A pattern is not a format string: only plain fields are filled in, and no attribute or item can be reached. What is
filled in never adds a folder. Prompts are no field, because they are other people's text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pocketdiffusion.errors import InvalidRequest

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FIELDS = ("seed", "index", "width", "height", "steps", "model")

_FIELD = re.compile(r"\{([^{}]*)\}")
_NAME_AND_WIDTH = re.compile(r"([a-z]+)(?::0?([1-9][0-9]?)d?)?", re.ASCII)
_NOT_IN_A_NAME = re.compile(r"[^\w.+-]+")


def image_format(path: str | Path) -> str:
    """Pillow's name of the format that the suffix stands for, or InvalidRequest."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InvalidRequest(
            "output", f"{path}: no image format for suffix {suffix!r}; choose one of: {', '.join(FORMATS)}"
        )
    return FORMATS[suffix]


def check_pattern(pattern: str) -> None:
    """Raise InvalidRequest for a pattern that `output_path` would refuse, or whose folder can't be written to.

    For callers to use before minutes of work, not after.
    """
    folder = output_path(pattern, seed=0, index=0, width=0, height=0, steps=0, model="model").parent
    known = not _FIELD.search(str(Path(pattern).parent))
    if known and not folder.is_dir():
        raise InvalidRequest("output", f"{pattern}: there is no folder {folder}; create it first")
    if known and not os.access(folder, os.W_OK):
        raise InvalidRequest("output", f"{pattern}: the folder {folder} can't be written to; choose another")


def output_path(
    pattern: str, *, seed: int, index: int, width: int = 0, height: int = 0, steps: int = 0, model: str = ""
) -> Path:
    """Fill in the fields of `FIELDS`; ``{index}`` is as given, counted from 0, and ``{index:03}`` pads with zeros.

    "~" at the start is the home folder. Raises InvalidRequest for other fields, stray braces and other suffixes.
    """
    values: dict[str, int | str] = {
        "seed": seed, "index": index, "width": width, "height": height, "steps": steps, "model": _plain(model)
    }  # fmt: skip
    if set("{}\0") & set(_FIELD.sub("", pattern)):
        raise _bad_pattern(pattern, "a brace without its partner, or a NUL character")
    image_format(pattern)
    return Path(_FIELD.sub(lambda field: _filled(pattern, field[1], values), pattern)).expanduser()


def output_paths(
    pattern: str, seeds: Sequence[int], *, width: int = 0, height: int = 0, steps: int = 0, model: str = ""
) -> list[Path]:
    """One path for each image. If the pattern gives two images the same name, -1, -2 ... goes before every suffix."""
    paths = [
        output_path(pattern, seed=seed, index=index, width=width, height=height, steps=steps, model=model)
        for index, seed in enumerate(seeds)
    ]
    if len(set(paths)) == len(paths):
        return paths
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number, path in enumerate(paths, start=1)]


def _filled(pattern: str, field: str, values: dict[str, int | str]) -> str:
    match = _NAME_AND_WIDTH.fullmatch(field)
    if match is None or match[1] not in values:
        raise _bad_pattern(pattern, f"no field {{{field}}}")
    value, width = values[match[1]], match[2]
    if width is None:
        return str(value)
    if isinstance(value, str):
        raise _bad_pattern(pattern, f"{{{field}}} pads a text with zeros")
    return f"{value:0{width}}"


def _plain(text: str) -> str:
    """A text without separators, leading dots or anything else that means something in a path."""
    return _NOT_IN_A_NAME.sub("-", text).lstrip(".-") or "model"


def _bad_pattern(pattern: str, found: str) -> InvalidRequest:
    choices = ", ".join(f"{{{field}}}" for field in FIELDS)
    return InvalidRequest(
        "output", f"output pattern {pattern!r} holds {found}; choose from: {choices}, and {{index:03}} for zeros"
    )
