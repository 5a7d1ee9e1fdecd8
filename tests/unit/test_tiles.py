"""Where tiles lie and what they count for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketdiffusion.tensors import Array
from pocketdiffusion.tiles import LEAST, MARGIN, OVERLAP, Axes, blended, count, shape, starts, strips

TILES = st.integers(1, 96)
ELEMENTS = st.sampled_from([1, 4, 8])


@given(size=st.integers(1, 300), tile=TILES)
def test_tiles_lie_inside_reach_both_edges_and_overlap_enough(size: int, tile: int) -> None:
    tile = min(tile, size)
    found = starts(size, tile)
    assert found[0] == 0
    assert found[-1] == size - tile
    steps = np.diff(found)
    assert all(0 < step <= tile - tile // OVERLAP for step in steps)
    assert len(found) == 1 or (len(found) - 1) * (tile - tile // OVERLAP) + tile >= size
    assert len(found) < 3 or (len(found) - 2) * (tile - tile // OVERLAP) + tile < size, "fewer would do"


@given(size=st.integers(1, 300), tile=TILES, elements=ELEMENTS)
def test_weights_add_up_to_one_everywhere(size: int, tile: int, elements: int) -> None:
    tile = min(tile, size)
    total = np.zeros(size * elements)
    for strip in strips(size, tile, elements):
        assert strip.weights.shape == (tile * elements,)
        assert strip.weights.dtype == np.float32
        assert (strip.weights >= 0).all()
        total[strip.start * elements : (strip.start + tile) * elements] += strip.weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


@given(size=st.integers(33, 200), tile=st.integers(16, 32), elements=ELEMENTS)
def test_the_rim_next_to_a_neighbour_counts_for_nothing_and_the_pictures_own_edge_for_all(
    size: int, tile: int, elements: int
) -> None:
    first, *_, last = strips(size, tile, elements)
    rim = tile // MARGIN * elements
    assert not first.weights[-rim:].any()
    assert not last.weights[:rim].any()
    assert first.weights[0] == last.weights[-1] == 1


@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    tile=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    scale=st.sampled_from([(1, 1), (1, 4), (4, 1)]),
)
@settings(deadline=None)
def test_what_each_tile_computes_alone_is_the_same_in_tiles(
    size: tuple[int, int], tile: tuple[int, int], scale: tuple[int, int]
) -> None:
    taken, given_ = scale
    tile = (min(size[0], tile[0]), min(size[1], tile[1]))
    whole = np.random.default_rng(0).standard_normal((1, 2, size[0] * taken, size[1] * taken)).astype(np.float32)
    seen: list[tuple[int, ...]] = []

    def compute(part: Array) -> Array:
        seen.append(part.shape[2:])
        assert part.flags.c_contiguous
        return part[:, :, ::taken, ::taken].repeat(given_, 2).repeat(given_, 3)

    wanted = compute(whole)
    seen.clear()
    np.testing.assert_allclose(blended(compute, whole, tile, taken=taken, given=given_), wanted, atol=1e-6)
    assert seen == [(tile[0] * taken, tile[1] * taken)] * count(size, tile)


@given(size=st.tuples(st.integers(1, 130), st.integers(1, 130)), side=st.integers(LEAST, 100))
def test_shapes_keep_to_the_area_and_spare_work(size: tuple[int, int], side: int) -> None:
    tile = shape(size, side * side)
    assert tile is not None
    assert tile[0] * tile[1] <= side * side
    assert all(min(LEAST, whole) <= part <= whole for part, whole in zip(tile, size, strict=True))
    square = (min(size[0], side), min(size[1], side))
    assert work(size, tile) <= 1.1 * work(size, square)
    assert size[0] * size[1] > side * side or tile == size


def work(size: tuple[int, int], tile: tuple[int, int]) -> int:
    return count(size, tile) * tile[0] * tile[1]


def test_bands_take_less_work_than_squares() -> None:
    assert (shape((64, 64), 32 * 32), work((64, 64), (16, 64)), work((64, 64), (32, 32))) == ((16, 64), 5120, 9216)


@pytest.mark.parametrize(
    ("axes", "area", "tile"),
    [
        ((24, 24), 4096, (24, 24)),
        ((24, 24), 575, None),
        ((64, 64), 4096, None),
        ((8, None), 480, (8, 60)),
        ((8, None), 64, None),
        ((None, 40), 4096, (50, 40)),
    ],
)
def test_shapes_of_graphs_that_are_fixed(axes: Axes, area: int, tile: tuple[int, int] | None) -> None:
    assert shape((50, 60), area, axes) == tile


@pytest.mark.parametrize("value", [0.0, 0.25, -1.0])
def test_a_constant_stays_constant(value: float) -> None:
    whole = np.full((1, 3, 61, 47), value, np.float32)
    found = blended(lambda part: part, whole, (24, 16), taken=1, given=1)
    np.testing.assert_allclose(found, value, atol=1e-6)


def test_one_tile_as_large_as_the_whole_changes_no_bit() -> None:
    whole = np.random.default_rng(1).standard_normal((1, 3, 20, 30)).astype(np.float32)
    found = blended(lambda part: part, whole, (20, 30), taken=1, given=1)
    assert found.tobytes() == whole.tobytes()


def test_a_step_between_tiles_becomes_a_ramp() -> None:
    """Each tile is brighter than the one before: no seam is left."""
    shades = iter(range(9))

    def compute(part: Array) -> Array:
        return np.full((1, 1, *(axis * 8 for axis in part.shape[2:])), next(shades), np.float32)

    line = blended(compute, np.zeros((1, 1, 32, 56), np.float32), (32, 32), taken=1, given=8)[0, 0, 0]
    assert (line[0], line[-1]) == (0, 1)
    assert np.abs(np.diff(line)).max() < 0.05
