from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.quality import EQUAL_DB, compare, component_sqnr, has_random_weights
from pocketdiffusion_bench.similarity import ssim


def picture(seed: int, size: tuple[int, int, int] = (24, 32, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@pytest.fixture
def files(tmp_path):
    first = picture(0)
    off = first.astype(int)
    off[0, 0, 0] += 40 if off[0, 0, 0] < 128 else -40
    for name, array in (("a", first), ("same", first), ("off", off.astype(np.uint8)), ("small", first[:16])):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    return {name: tmp_path / f"{name}.png" for name in ("a", "same", "off", "small", "broken", "absent")}


def test_equal_pictures(files):
    found = compare(files["a"], files["same"], label="fp32", sqnr_db={"unet": 43.0}, random_weights=True)
    assert (found.psnr_db, found.ssim, found.reference) == (EQUAL_DB, pytest.approx(1.0), "fp32")
    assert found.sqnr_db == {"unet": 43.0} and found.random_weights


def test_one_wrong_value(files):
    found = compare(files["off"], files["a"], label="fp32", sqnr_db={}, random_weights=False)
    assert found.psnr_db == pytest.approx(10 * np.log10(255**2 / (40**2 / (24 * 32 * 3))))
    assert found.ssim is not None and 0.9 < found.ssim < 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small", "the picture is 32x16 and the reference's, fp32, is 32x24"),
        ("broken", "is no picture that can be compared"),
        ("absent", "is no picture that can be compared"),
    ],
)
def test_what_can_not_be_compared(files, name, message):
    with pytest.raises(BenchError, match=message):
        compare(files[name], files["a"], label="fp32", sqnr_db={}, random_weights=False)


@pytest.mark.parametrize("seed", [1, 2])
def test_ssim_is_scikit_images(seed):
    metrics = pytest.importorskip("skimage.metrics")
    smooth = np.add.outer(np.arange(40), np.arange(30))[..., None].repeat(3, -1).astype(np.uint8)
    noisy = np.clip(smooth + np.random.default_rng(seed).normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)
    for pair in ((smooth, noisy), (picture(seed), picture(seed + 1))):
        theirs = metrics.structural_similarity(*pair, channel_axis=-1, data_range=255)
        # scikit-image leaves out windows that reach over the edge, as ours does
        assert ssim(*pair) == pytest.approx(theirs, abs=1e-6)


def test_what_the_manifest_says():
    bundle = Bundle.open(find_bundle("sticker"))
    assert component_sqnr(bundle)["unet"] > 30 and set(component_sqnr(bundle)) == set(bundle.manifest.components)
    assert not has_random_weights(bundle)


def test_a_bundle_without_figures(tiny_bundle):
    assert component_sqnr(tiny_bundle) == {}
