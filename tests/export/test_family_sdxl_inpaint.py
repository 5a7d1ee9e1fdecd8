"""SDXL with 9 channels, made for inpainting, against Diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402

from . import family_sources as tiny  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def make(folder: Path) -> Any:
    return tiny.sdxl(folder, diffusers.StableDiffusionXLInpaintPipeline, in_channels=9)


def test_every_component_equals_its_source(made: Any) -> None:
    assert min(item.sqnr_db for item in made.measured) >= 60
    assert made.manifest.tasks == ("inpaint",) and made.manifest.family == "sdxl"
    assert made.manifest.golden_image.psnr_db >= 50


@pytest.mark.parametrize("device", tiny.DEVICES)
@pytest.mark.parametrize("strength", [0.5, 0.9999, 1.0])
def test_the_same_image(ours: dict[str, Pipeline], theirs: Any, device: str, strength: float) -> None:
    given = {"image": tiny.PICTURE, "mask_image": tiny.MASK, "guidance_scale": 5.0, "strength": strength}
    assert tiny.compare(ours[device], theirs, only_theirs=tiny.SIZE, **given) >= 50
