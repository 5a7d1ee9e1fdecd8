"""UNets with parts left out (BK-SDM, tiny-sd, SSD-1B): block by block as deep as their configs say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion_export.sources.architectures import CROSS, UP  # noqa: E402

from . import family_sources as tiny  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

SSD = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownBlock2D", CROSS, CROSS),
    "up_block_types": (UP, UP, "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, [2, 2], [2, 1]],
    "reverse_transformer_layers_per_block": [[1, 2, 3], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
VEGA = SSD | {"transformer_layers_per_block": [1, 1, 2], "reverse_transformer_layers_per_block": None}
SMALL = {"mid_block_type": None}
TINY = {"mid_block_type": None, "down_block_types": (CROSS, CROSS), "up_block_types": (UP, UP)}


def bk(**changes: Any) -> Any:
    return lambda folder: tiny.sd(folder, diffusers.StableDiffusionPipeline, unet_changes=changes)


def xl(**changes: Any) -> Any:
    return lambda folder: tiny.sdxl(folder, **changes)


@pytest.mark.parametrize(
    "make", [bk(**SMALL), bk(**TINY), xl(**SSD), xl(**VEGA)], ids=["bk-sdm-small", "tiny-sd", "ssd-1b", "segmind-vega"]
)
def test_the_same_image(make: Any, preset: Path, tmp_path: Path) -> None:
    twins = tiny.Twins.of(tmp_path, make, preset)
    assert min(item.sqnr_db for item in twins.made.measured) >= 60
    assert twins.made.manifest.golden_image is not None and twins.made.manifest.golden_image.psnr_db >= 50
    for ours in twins.ours.values():
        assert tiny.compare(ours, twins.theirs, guidance_scale=5.0) >= 50
