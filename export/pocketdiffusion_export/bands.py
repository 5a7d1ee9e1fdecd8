"""The VAE's decoder once more in pieces that run over bands of a picture, checked against the whole graph.

See `targets/onnx_bands.py` for how it is cut, and `pocketdiffusion.bands` for what runs the pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pocketdiffusion import bands
from pocketdiffusion.backends import SessionOptions, load
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.component import Component
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion.timing import Timings
from pocketdiffusion_export.component import Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.registry import lookup
from pocketdiffusion_export.targets import BAND_CUTTERS

DECODER = "vae_decoder"
MAX_DIFFERENCE = 1e-4
"""Between a pixel in [-1, 1] that was computed in bands and the same computed in one piece."""
BANDS = 5
"""About so many are checked."""


def add_bands(
    folder: Path, entry: ComponentEntry, samples: Sequence[Feeds], engines: Sequence[str]
) -> tuple[ComponentEntry, str]:
    """A decoder's entry with pieces, which are written into the bundle `folder`, and what was measured, for people.

    Raises ExportError for a decoder that can't be cut, and where pieces give another picture than the whole.
    """
    made = replace(entry, bands=lookup(BAND_CUTTERS, "format to cut for bands", entry.format)(folder / entry.graph))
    found = {engine: _difference(folder, made, samples[len(samples) // 2], engine) for engine in engines}
    figures = ", ".join(f"{difference:.1e} ({engine})" for engine, difference in found.items())
    if not max(found.values()) <= MAX_DIFFERENCE:
        raise ExportError(
            f"in bands the decoder differs by {figures} from the whole, more than {MAX_DIFFERENCE:g}; export it without"
        )
    return made, f"Decoded in bands, pixels in [-1, 1] differ by at most {figures} from those decoded in one piece."


def _difference(folder: Path, entry: ComponentEntry, feeds: Feeds, engine: str) -> float:
    """The largest between a picture in bands and in one piece."""
    one = {name: array[:1] for name, array in feeds.items()}
    whole, *pieces = (
        Component(DECODER, folder / graph.graph, graph, backend=load(engine), device="cpu", options=SessionOptions())
        for graph in (*entry.graphs[:1], *entry.pieces)
    )
    expected = _only(whole.run(one))
    whole.close()
    parted = Component(DECODER, folder / entry.graph, entry, backend=load(engine), device="cpu", bands=pieces)
    rows = max(bands.LEAST, expected.shape[2] // BANDS)
    found = _only(bands.run(parted, one, rows, Timings()))
    for piece in pieces:
        piece.close()
    return float(np.abs(expected - found).max())


def _only(outputs: dict[str, AnyArray]) -> AnyArray:
    (output,) = outputs.values()
    return output
