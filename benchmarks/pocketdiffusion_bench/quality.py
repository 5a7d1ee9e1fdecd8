"""How near a picture is to the reference's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion.verify import psnr_db
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.record import Quality
from pocketdiffusion_bench.similarity import ssim

EQUAL_DB = 99.0
"""Stands for equal pictures, so that figures stay finite."""


def compare(
    picture: Path, reference: Path, *, label: str, sqnr_db: Mapping[str, float], random_weights: bool
) -> Quality:
    """PSNR and SSIM of two picture files of the same size; `label` names the reference's case.

    Raises BenchError for two sizes and for a file that is no picture.
    """
    found, expected = pixels(picture), pixels(reference)
    if found.shape != expected.shape:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (found.shape, expected.shape)]
        raise BenchError(f"the picture is {sizes[0]} and the reference's, {label}, is {sizes[1]}; compare equal sizes")
    return Quality(
        reference=label,
        psnr_db=min(EQUAL_DB, psnr_db(expected, found)),
        ssim=ssim(expected, found),
        sqnr_db=dict(sqnr_db),
        random_weights=random_weights,
    )


def pixels(file: Path) -> AnyArray:
    """A picture file as uint8 (height, width, 3). Raises BenchError."""
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise BenchError(f"{file} is no picture that can be compared: {error}") from None


def component_sqnr(bundle: Bundle) -> dict[str, float]:
    """What the manifest says of each component against torch in float32, in dB; {} for other exporters' bundles."""
    return {name: entry.sqnr_db for name, entry in bundle.manifest.components.items() if entry.sqnr_db is not None}


def has_random_weights(bundle: Bundle) -> bool:
    """Whether a bundle was exported from "random:NAME", so that its pictures mean nothing."""
    return bundle.manifest.source.name.startswith("random:")
