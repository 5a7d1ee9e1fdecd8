"""Figures on sets of pictures and prompts, from a judge's vectors: numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocketdiffusion.tensors import AnyArray, Array

RIDGE = 1e-6
"""Added to covariances' diagonals: sets of fewer pictures than features have singular ones."""


def ranks(seen: Array, read: Array, own: Sequence[int]) -> AnyArray:
    """How many prompts fit each picture better than its own, (n,): 0 where its own is found first.

    `seen` and `read` are unit vectors of pictures (n, width) and of prompts (m, width); `own` is each picture's prompt.
    Prompts that fit as well as its own count as better, so that a judge who can't tell them apart finds nothing.
    """
    cosines = seen @ read.T
    mine = cosines[np.arange(len(seen)), own]
    found: AnyArray = (cosines >= mine[:, np.newaxis]).sum(axis=1) - 1
    return found


def found_within(places: AnyArray, first: int) -> float:
    """The share of pictures whose own prompt is among the `first` best: top-1, top-5."""
    return float((places < first).mean())


def frechet(first: Array, second: Array) -> float:
    """Fréchet distance between two sets of features, (n, width) and (m, width), taken as normal distributions.

    It is what FID is (Heusel et al. 2017, arXiv:1706.08500) with the judge's features in the place of Inception's, so
    its values are not FID's: they compare sets judged by one judge. 0 for equal sets, else above. Each needs 2 rows.
    """
    a, b = (np.asarray(features, np.float64) for features in (first, second))
    spread_a, spread_b = (np.cov(x, rowvar=False) + RIDGE * np.eye(x.shape[1]) for x in (a, b))
    root = _root(spread_a)
    both = _root(root @ spread_b @ root)
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(spread_a + spread_b - 2 * both)
    return max(0.0, float(distance))


def diversity(vectors: Array) -> float:
    """How unlike pictures of one prompt are, vectors (prompts, seeds, width): 1 less the mean cosine of two of them.

    0 where all seeds give the same picture. Each prompt needs 2 seeds.
    """
    seeds = vectors.shape[1]
    cosines = vectors @ vectors.swapaxes(1, 2)
    return float(1 - cosines[:, ~np.eye(seeds, dtype=bool)].mean())


def nearest_db(pictures: AnyArray, known: AnyArray) -> AnyArray:
    """PSNR of each picture (n, ...) to the nearest of the known ones (m, ...), uint8 of equal sizes: (n,) dB."""
    a, b = (np.asarray(given, np.float32).reshape(len(given), -1) / 255 for given in (pictures, known))
    squared = (a**2).sum(1)[:, np.newaxis] + (b**2).sum(1) - 2 * a @ b.T
    error = squared.min(axis=1).clip(1e-10) / a.shape[1]
    found: AnyArray = -10 * np.log10(error)
    return found


def _root(matrix: AnyArray) -> AnyArray:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root: AnyArray = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root
