"""Whether a run did what its case asked for. What a case leaves open is not checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketdiffusion_bench.case import Case

QUANTIZED = "int8"
"""Precision of a graph whose layers compute in integers: its recipe asks for that, and no one asks for it by name."""
PLAIN = (
    *("recipe", "threads", "width", "height", "steps", "guidance"),
    *("preset", "decoder", "residency", "vae_tile", "memory_plan"),
)
"""Settings that must be told exactly as they were asked."""


def mismatch(case: Case, used: Mapping[str, Any]) -> str | None:
    """How what was used differs from what was asked, in words; None if it does not.

    `used` is a run's configuration. What it does not tell counts as another thing, for precision and device: a figure
    whose precision is unknown is of no use.
    """
    parts: Mapping[str, Mapping[str, Any]] = used.get("components") or {"the model": used}
    for name, part in parts.items():
        device = _asked_device(case, name)
        if device is not None and not _is_device(device, part.get("device")):
            return f"{name} ran on {part.get('device') or 'an untold device'}, asked for {device}"
        if case.precision is not None and part.get("precision") not in (case.precision, QUANTIZED):
            return f"{name} ran in {part.get('precision') or 'an untold precision'}, asked for {case.precision}"
    for key in PLAIN:
        asked, found = getattr(case, key), used.get(key)
        if asked is not None and found is not None and asked != found:
            return f"ran with {key} {found}, asked for {asked}"
    return None


def wrong_size(case: Case, picture: Path) -> str | None:
    """How a PNG's size differs from the one asked for, by its header; None if it does not."""
    if case.width is None or case.height is None:
        return None
    width, height = png_size(picture)
    if (width, height) == (case.width, case.height):
        return None
    return f"made a picture of {width}x{height}, asked for {case.width}x{case.height}"


def png_size(picture: Path) -> tuple[int, int]:
    """(width, height). Raises ValueError for another kind of file."""
    with picture.open("rb") as file:
        head = file.read(24)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or len(head) < 24:
        raise ValueError(f"{picture.name} is no PNG file")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def pixels_of(picture: Path) -> bytes:
    """A PNG's compressed pixels: equal for equal pictures of one program, whatever else the file tells.

    Raises ValueError for another kind of file.
    """
    png_size(picture)
    content, place, found = picture.read_bytes(), 8, []
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] == b"IDAT":
            found.append(content[place + 8 : place + 8 + length])
        place += length + 12
    return b"".join(found)


def _asked_device(case: Case, component: str) -> str | None:
    """The device asked for a component; None where the choice was left open."""
    from pocketdiffusion.backends.roles import parse_devices, role_value

    device = "auto" if case.device is None else role_value(parse_devices(case.device), component)
    return None if device == "auto" else device.lower()


def _is_device(asked: str, found: Any) -> bool:
    """Whether "openvino:gpu.0" is what "gpu", "openvino" or "openvino:gpu" asks for."""
    engine, _, place = str(found).lower().partition(":")
    allowed = {engine, place, place.partition(".")[0]}
    return asked in allowed | {f"{engine}:{name}" for name in allowed - {engine}}
