"""How alike two pictures are: structural similarity (Wang et al. 2004, "Image quality assessment"), in numpy."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pocketdiffusion.tensors import AnyArray

WINDOW = 7
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(first: AnyArray, second: AnyArray) -> float:
    """Mean structural similarity of two uint8 pictures (h, w, 3), in [-1, 1], over 7x7 windows of each channel."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    mean_a, mean_b = _means(a), _means(b)
    spread_a = unbiased * (_means(a * a) - mean_a**2)
    spread_b = unbiased * (_means(b * b) - mean_b**2)
    common = unbiased * (_means(a * b) - mean_a * mean_b)
    light = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return float((light * (2 * common + C2) / (spread_a + spread_b + C2)).mean())


def _means(values: AnyArray) -> AnyArray:
    means: AnyArray = sliding_window_view(values, (WINDOW, WINDOW), axis=(0, 1)).mean((-2, -1))  # type: ignore[call-overload]
    return means
