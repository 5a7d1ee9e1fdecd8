"""Golden tensors: what a bundle's float32 source computed, how far an answer is from it, what a golden image is of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocketdiffusion.tensors import AnyArray


def golden_inputs(tasks: Sequence[str], width: int, height: int) -> dict[str, AnyArray]:
    """`Request` fields besides the prompt, uint8 (height, width, 3) and (height, width); {} for text-to-image models.

    A ramp of colours, and a mask that is white in the middle; the same everywhere, so that no bundle has to hold them.
    """
    if "text-to-image" in tasks:
        return {}
    rows, columns = np.mgrid[:height, :width]
    red, green = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    picture = np.stack([red, green, np.full_like(red, 128)], axis=-1).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = 255
    return {"image": picture, "mask_image": mask} if "inpaint" in tasks else {"image": picture}


def golden_tensors(file: Path, component: str) -> tuple[dict[str, AnyArray], dict[str, AnyArray]]:
    """A component's inputs and outputs by name, from a bundle's golden file (`Manifest.golden`); empty for none."""
    from safetensors.numpy import load_file

    tensors: dict[str, AnyArray] = load_file(file)
    feeds, expected = (
        {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}
        for start in (f"{component}/in/", f"{component}/out/")
    )
    return feeds, expected


def sqnr_db(reference: AnyArray, found: AnyArray) -> float:
    """Signal to quantization noise ratio, 10 log10(sum ref² / sum (ref - found)²), in dB; inf where they are equal."""
    signal = np.asarray(reference, np.float64)
    noise = float(np.sum((signal - np.asarray(found, np.float64)) ** 2))
    return float("inf") if noise == 0 else 10 * float(np.log10(np.sum(signal**2) / noise))
