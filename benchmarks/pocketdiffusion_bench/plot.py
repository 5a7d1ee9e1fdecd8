"""Pictures of results: latency against memory, and where the time to the first picture goes. Needs matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.figures import figures, stage_seconds
from pocketdiffusion_bench.record import OK, Record

FORMATS = (".png", ".svg")


def plot(records: Sequence[Record], file: Path) -> None:
    """Draw both pictures, one above the other, into a PNG or SVG file, by its ending.

    Cases without a picture are left out. Raises BenchError: another ending, no matplotlib, nothing to draw.
    """
    if file.suffix.lower() not in FORMATS:
        raise BenchError(f"plot to {file}: its ending is unknown; choose from {', '.join(FORMATS)}")
    shown = [record for record in records if record.status == OK and figures(record).image is not None]
    if not shown:
        raise BenchError(f"plot to {file}: no case made a picture, so there is nothing to draw")
    matplotlib = _matplotlib()
    figure = matplotlib.figure.Figure(figsize=(9, 5 + 0.4 * len(shown)), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(4, 1 + 0.4 * len(shown)))
    for axes in (above, below):
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)  # the usual ten are fewer than the stages
    _scatter(above, shown)
    _bars(below, shown)
    # No date inside, so that the same records give the same file.
    metadata = {"Date": None} if file.suffix.lower() == ".svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "pocketdiffusion"}):
        figure.savefig(file, metadata=metadata, dpi=120)


def _matplotlib() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own use of what other packages deprecate
            import matplotlib.figure
    except ImportError:
        raise BenchError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    return matplotlib


def _scatter(axes: Any, records: Sequence[Record]) -> None:
    """Seconds for a picture against peak resident memory; a case whose peak could not be read is not drawn."""
    for record in records:
        found = figures(record)
        if found.image is None or found.memory.rss is None:
            continue
        axes.scatter(found.memory.rss / 1e6, found.image.p50, label=record.case.label)
    axes.set(xlabel="peak RSS, MB", ylabel="s/image", title="Latency and memory (nearer to the corner is better)")
    axes.set(xlim=(0, None), ylim=(0, None))
    if axes.collections:
        axes.legend(fontsize="small")


def _bars(axes: Any, records: Sequence[Record]) -> None:
    """A bar for each case, first case on top, its stages in the order in which they first start."""
    stages = [stage_seconds(record) for record in records]
    names = list(dict.fromkeys(name for stage in stages for name in stage))
    labels = [record.case.label for record in records]
    left = [0.0] * len(records)
    for name in names:
        widths = [stage.get(name, 0.0) for stage in stages]
        axes.barh(range(len(records)), widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(records)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="s", title="From process start to the first picture")
    axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35))
