"""Computing a picture in overlapping tiles: where they lie, and how they are blended. Knows no graph.

Lengths are in cells, those of the latents; arrays are planar, (1, channels, height, width), with some elements to a
cell along each side: 1 in latents, `vae_factor` in pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from pocketdiffusion.tensors import AnyArray, Array

OVERLAP, MARGIN = 4, 16
"""Neighbours share at least tile // OVERLAP cells. Of what a tile shares, the outer tile // MARGIN cells count for
nothing: a convolution saw zeros past them that are not there in the whole picture."""

LEAST = 16
"""Cells along a side, unless a graph is fixed to less: what smaller tiles know of the picture is too little."""
LATITUDE = 1.1
"""How much more work than the least a larger tile may mean."""

Size = tuple[int, int]
"""(height, width)."""
Axes = tuple[int | None, int | None]
"""(height, width) that a graph is fixed to; None where it takes any."""


@dataclass(frozen=True, slots=True)
class Strip:
    """A tile's part of one axis."""

    start: int
    """First cell."""
    weights: Array
    """What each element of the tile counts for in the whole; over all tiles they add up to 1 everywhere."""


def starts(size: int, tile: int) -> list[int]:
    """First cells of the fewest tiles that cover an axis of `size` cells, spread evenly from edge to edge."""
    last = size - tile
    steps = math.ceil(last / (tile - tile // OVERLAP))
    return [round(index * last / max(1, steps)) for index in range(steps + 1)]


def strips(size: int, tile: int, elements: int) -> list[Strip]:
    """The tiles of an axis with weights for `elements` to a cell. They fall linearly where tiles overlap."""
    found = starts(size, tile)
    ramps = [_ramp(tile, elements, after=start > 0, before=start + tile < size) for start in found]
    total = np.zeros(size * elements)
    parts = [slice(start * elements, (start + tile) * elements) for start in found]
    for part, ramp in zip(parts, ramps, strict=True):
        total[part] += ramp
    shares = [(ramp / total[part]).astype(np.float32) for part, ramp in zip(parts, ramps, strict=True)]
    return [Strip(start, share) for start, share in zip(found, shares, strict=True)]


def count(size: Size, tile: Size) -> int:
    """How many tiles cover a picture."""
    return len(starts(size[0], tile[0])) * len(starts(size[1], tile[1]))


def shape(size: Size, area: int, axes: Axes = (None, None)) -> Size | None:
    """The tile, of at most `area` cells, with which to compute a picture; None where `axes` allow none.

    Nearly the least work, and of those shapes the largest: mostly bands, since they overlap along one axis only. A
    picture of 64x64 cells in tiles of 1024 means 1.25 times its work in bands of 16x64, 2.25 times in squares of 32x32.
    """
    heights, widths = (_lengths(*axis) for axis in zip(size, axes, strict=True))
    areas = heights[:, None] * widths
    work = _covered(size[0], heights)[:, None] * _covered(size[1], widths)
    possible = areas <= area
    if not possible.any():
        return None
    good = possible & (work <= LATITUDE * work[possible].min())
    best = np.unravel_index(np.argmax(np.where(good, areas, 0)), areas.shape)
    return int(heights[best[0]]), int(widths[best[1]])


def blended(compute: Callable[[Array], Array], whole: Array, tile: Size, *, taken: int, given: int) -> Array:
    """What `compute` makes of an array (1, c, h, w), from one tile of it at a time: float32 (1, c', h', w').

    `taken` and `given` are the elements to a cell in `whole` and in the answers, which must be of the tile's size. A
    tile as large as the whole gives exactly what `compute` does. No more than the answer and one tile is in memory.
    """
    height, width = (axis // taken for axis in whole.shape[2:])
    canvas: Array | None = None
    for down, across in product(strips(height, tile[0], given), strips(width, tile[1], given)):
        part = compute(np.ascontiguousarray(_area(whole, down.start, across.start, tile, taken)))
        if canvas is None:
            canvas = np.zeros((1, part.shape[1], height * given, width * given), np.float32)
        _area(canvas, down.start, across.start, tile, given)[...] += part * (down.weights[:, None] * across.weights)
    assert canvas is not None  # every axis has a tile
    return canvas


def _lengths(size: int, fixed: int | None) -> AnyArray:
    """The lengths that tiles may have along an axis."""
    lengths = range(min(LEAST, size), size + 1) if fixed is None else range(fixed, fixed + 1)
    return np.array([length for length in lengths if length <= size], np.int64)


def _covered(size: int, lengths: AnyArray) -> AnyArray:
    """The cells of all tiles along an axis together, for each length."""
    return np.array([len(starts(size, length)) * length for length in lengths.tolist()], np.int64)


def _area(array: Array, top: int, left: int, tile: Size, elements: int) -> Array:
    """A view of one tile's part."""
    height, width = tile
    return array[:, :, top * elements : (top + height) * elements, left * elements : (left + width) * elements]


def _ramp(tile: int, elements: int, *, after: bool, before: bool) -> Array:
    """Weights of a tile, not yet shared out: `after` and `before` tell whether it has neighbours there."""
    margin = tile // MARGIN
    length = tile // OVERLAP - 2 * margin
    weights = np.ones(tile * elements, np.float32)
    inside = (np.arange(tile * elements) + 0.5) / elements - margin
    rise = np.clip(inside / max(length, 1), 0, 1).astype(np.float32)
    if after:
        weights = np.minimum(weights, rise)
    if before:
        weights = np.minimum(weights, rise[::-1])
    return weights
