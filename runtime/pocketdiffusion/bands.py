"""A decoder computed in bands of rows: exactly what the whole graph gives, in a fraction of its memory.

The graph was cut at export where it needs the whole picture: in front of group norms (`pocketdiffusion_export.bands`
tells how). Here one piece after another is opened, runs over all bands and is closed. Between them stand maps, held as
the bands that came out; what a piece has read for the last time is let go at once, so that about one map is in memory
and not two. Mean and variance of a map are summed up while it is made: each row in float32, rows in float64.

Limit: what comes before the first upsampling, attention above all, runs as a whole.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import numpy as np

from pocketdiffusion import memory
from pocketdiffusion.bundle.manifest import BandGraph
from pocketdiffusion.component import Component
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion.timing import Timings

MEAN, VARIANCE = "_mean", "_variance"
"""A piece's inputs with a map's name and one of these hold the map's figures, (1, groups, 1, 1)."""

LEAST = 8
"""Rows of a band: in lower ones most of the work would be for the rows around them."""


@dataclass
class Map:
    """Channels of a picture that is between two pieces, as bands from top to bottom."""

    start: int = 0
    """Row at which the bands begin; those above are gone."""
    bands: list[Array] = field(default_factory=list)
    """Each (1, channels, rows, width)."""
    count: int = 0
    """Values in each channel that were summed up."""
    sums: Array | None = None
    """Sum, and sum of squares, of each channel: (2, channels) float64."""

    @property
    def height(self) -> int:
        """The row after the last."""
        return self.start + sum(int(band.shape[2]) for band in self.bands)

    def append(self, band: Array, *, summed: bool) -> None:
        """Put another band below the others; `summed`: the map's figures will be asked for."""
        kept = _mapped(band.shape)
        kept[...] = band
        self.bands.append(kept)
        if summed:
            rows = np.stack([kept[0].sum(2), np.einsum("crw,crw->cr", kept[0], kept[0])])
            found = rows.sum(2, dtype=np.float64)
            self.sums = found if self.sums is None else self.sums + found
            self.count += kept[0, 0].size

    def rows(self, start: int, stop: int) -> Array:
        """These rows, (1, channels, stop - start, width)."""
        parts, top = [], self.start
        for band in self.bands:
            inside = band[:, :, max(0, start - top) : max(0, stop - top)]
            parts += [inside] if inside.shape[2] else []
            top += band.shape[2]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)

    def drop(self, before: int) -> None:
        """Let bands go that lie above this row."""
        while self.bands and self.start + self.bands[0].shape[2] <= before:
            self.start += self.bands.pop(0).shape[2]

    def figures(self, groups: int) -> tuple[Array, Array]:
        """Mean and variance of each group of channels, (1, groups, 1, 1) float32."""
        assert self.sums is not None  # `append` was told that they will be asked for
        mean, square = self.sums.reshape(2, groups, -1).mean(2) / self.count
        shape = (1, groups, 1, 1)
        variance = np.maximum(square - mean**2, 0.0)
        return mean.reshape(shape).astype(np.float32), variance.reshape(shape).astype(np.float32)


def check(decoder: Component, rows: int) -> None:
    """Raise InvalidRequest where this decoder can't run in bands of so many rows."""
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < LEAST:
        raise InvalidRequest("vae_bands", f"vae_bands is {rows!r}; give at least {LEAST} rows, or None")
    if not decoder.bands:
        raise InvalidRequest(
            "vae_bands",
            f"vae_bands is {rows}, but {decoder.name} was exported in one piece; export it again with --banded-vae, "
            "or give vae_tile",
        )


def run(decoder: Component, feeds: Mapping[str, Array], rows: int, timings: Timings) -> dict[str, Array]:
    """What `decoder.run` gives for one picture, computed in bands of at most `rows` rows.

    Those are the picture's rows; of a map that is enlarged later on a band has as many pixels, and so more rows.
    """
    maps: dict[str, Map] = {name: Map(bands=[array]) for name, array in feeds.items()}
    listed = decoder.entry.bands
    for index, piece in enumerate(decoder.bands):
        later = {name for other in listed[index + 1 :] for name in other.inputs}
        most = rows * math.prod(other.scale for other in listed[index + 1 :])
        with piece.use() as opened:
            _compute(opened, listed[index], maps, most, later, timings)
    return {name: maps[name].rows(0, maps[name].height) for name in decoder.entry.outputs}


def spans(height: int, most: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of the fewest bands of at most `most` rows, about equally high."""
    count = math.ceil(height / most)
    return [(height * index // count, height * (index + 1) // count) for index in range(count)]


def _compute(
    piece: Component, graph: BandGraph, maps: dict[str, Map], most: int, later: Set[str], timings: Timings
) -> None:
    """Run a piece over its maps, `most` rows at a time. Maps that nobody reads `later` are taken out of `maps`."""
    read = [name for name in graph.inputs if name in maps]
    done = [name for name in read if name not in later]
    feeds, made = _figures(graph, maps), {name: Map() for name in graph.outputs}
    height, halo = maps[read[0]].height, graph.halo or 0
    found = spans(height, height if graph.halo is None else most)
    fed = min(height, max(stop - start for start, stop in found) + 2 * halo)  # one for all: engines fix shapes
    tops = [min(max(0, start - halo), height - fed) for start, _ in found]
    for (start, stop), top, next_top in zip(found, tops, [*tops[1:], height], strict=True):
        given = {name: np.ascontiguousarray(maps[name].rows(top, top + fed)) for name in read}
        for name in done:
            maps[name].drop(next_top)
        outputs = piece.run({**feeds, **given}, timings)
        for name, whole in made.items():
            band = outputs.pop(name)[:, :, (start - top) * graph.scale : (stop - top) * graph.scale]
            whole.append(band, summed=f"{name}{MEAN}" in later)
        del given, band  # before the next band is in memory
        memory.trim()
    for name in done:
        del maps[name]
    maps |= made


def _mapped(shape: tuple[int, ...]) -> Array:
    """An array in pages of its own, which go back to the system with it: C libraries keep what is freed in a heap, in
    holes that maps of other sizes do not fill. For the same reason engines' memory is given back after each band.
    """
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape), **private), np.float32).reshape(shape)


def _figures(graph: BandGraph, maps: Mapping[str, Map]) -> dict[str, AnyArray]:
    """The inputs that hold mean and variance of maps."""
    found: dict[str, AnyArray] = {}
    for name, spec in graph.inputs.items():
        source = name.removesuffix(MEAN)
        if source != name and source in maps and isinstance(groups := spec.shape[1], int):
            found[name], found[f"{source}{VARIANCE}"] = maps[source].figures(groups)
    return found
