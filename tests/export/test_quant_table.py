"""The figures of the table of recipes: structural similarity, likeness of picture lists, the list of prompts."""

from __future__ import annotations

import numpy as np
import pytest

from pocketdiffusion_bench.recipes import EQUAL_DB, PROMPTS, compare
from pocketdiffusion_bench.similarity import ssim


def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (32, 40, 3), np.uint8)
    return first, np.clip(first.astype(int) + rng.integers(-30, 31, first.shape), 0, 255).astype(np.uint8)


def test_ssim_is_scikit_image_s() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    first, second = pictures()
    assert ssim(first, second) == pytest.approx(metrics.structural_similarity(first, second, channel_axis=2), abs=1e-9)


def test_equal_pictures_are_as_like_as_can_be() -> None:
    first, second = pictures()
    assert ssim(first, first) == 1.0 and ssim(first, 255 - first) < 0
    found = compare([first, first], [first, second])
    assert found.psnr[0] == EQUAL_DB and 20 < found.psnr[1] < 30 and found.ssim[1] < 1


def test_there_are_fifty_different_prompts() -> None:
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 50 and all(prompts)
