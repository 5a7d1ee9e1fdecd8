"""Exported graphs against their torch source: each component on every engine, and the whole image.

SQNR is 10 log10(sum of reference² / sum of error²) in dB over all samples of an output; the worst channel is the same
over one channel of it. PSNR of a component takes the reference's range as its peak; PSNR of images takes 255.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketdiffusion import backends
from pocketdiffusion.backends.base import Session, SessionOptions
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export import read_back
from pocketdiffusion_export.component import ComponentSpec, Feeds
from pocketdiffusion_export.errors import ExportError

ENGINES = ("onnxruntime", "openvino", "coreml")
"""Best first: the first that opens a format must be there, and makes the golden image."""
MAX_BYTES_FAST = 512 << 20
"""Larger components are opened compact on all engines but the first: OpenVINO would hold their weights as float32, and
beside that what its kernels want, 7.1 GB for an int8 UNet of Stable Diffusion 1.5 where compact it is 5.6."""
MAX_DB = 200.0
"""Stands for equal to the last bit."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How near one output is to the source."""

    sqnr_db: float
    psnr_db: float
    worst_channel_db: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One component on one engine."""

    component: str
    engine: str
    outputs: Mapping[str, Figures]

    @property
    def sqnr_db(self) -> float:
        """Of the worst output."""
        return min(figures.sqnr_db for figures in self.outputs.values())


def open_session(graph: Path, engine: str) -> Session:
    """A graph on the CPU in float32, or read back where no engine opens it. Raises BackendError."""
    if engine == read_back.ENGINE:
        return read_back.open_session(graph)
    large = sum(file.stat().st_size for file in graph.parent.iterdir()) > MAX_BYTES_FAST
    compact = large and engine != ENGINES[0]
    return backends.load(engine).open(graph, "cpu", SessionOptions(weights="compact" if compact else "fast"))


def engines(format: str) -> tuple[str, ...]:
    """Installed engines that open a graph format, or that it is read back in torch, where none can be installed.

    Raises ExportError when the first of them is missing.
    """
    if read_back.needed(format):
        return (read_back.ENGINE,)
    able = [name for name in ENGINES if format in backends.load(name).formats]
    found = tuple(name for name in able if "cpu" in backends.load(name).devices())
    if able[0] not in found:
        raise ExportError(
            f"verifying {format} graphs needs {able[0]}; install it: pip install 'pocketdiffusion[export,cpu]'"
        )
    return found


def references(spec: ComponentSpec, samples: Sequence[Feeds]) -> list[dict[str, AnyArray]]:
    """The source's outputs for each sample. Raises ExportError when the source itself gives NaN or infinity."""
    outputs = [spec.run_reference(feeds) for feeds in samples]
    for output in outputs:
        for name, array in output.items():
            if not np.isfinite(array).all():
                raise ExportError(
                    f"the source's {spec.name} gives NaN or infinity in '{name}'; its weights are damaged"
                )
    return outputs


def measure(
    name: str, graph: Path, engine: str, samples: Sequence[Feeds], expected: Sequence[Mapping[str, AnyArray]]
) -> Measured:
    """Run every sample on an engine and compare with the source."""
    session = open_session(graph, engine)
    found = [session.run(feeds) for feeds in samples]
    session.close()
    outputs = {key: compare([out[key] for out in expected], [out[key] for out in found]) for key in expected[0]}
    return Measured(name, engine, outputs)


def compare(expected: Sequence[AnyArray], found: Sequence[AnyArray]) -> Figures:
    """Figures over all samples of one output. Channels: axis 1 of images, the last axis of everything else."""
    channel = 1 if expected[0].ndim == 4 else expected[0].ndim - 1
    signal, noise, peak, count = 0.0, 0.0, 0.0, 0
    for want, got in zip(expected, found, strict=True):
        if want.shape != got.shape:
            raise ExportError(f"an output has shape {got.shape}, its source {want.shape}; the graph was traced wrongly")
        axes = tuple(axis for axis in range(want.ndim) if axis != channel)
        signal = signal + np.square(want, dtype=np.float64).sum(axes)
        noise = noise + np.square(want.astype(np.float64) - got).sum(axes)
        peak, count = max(peak, float(np.ptp(want))), count + want.size
    return Figures(
        sqnr_db=decibel(float(np.sum(signal)), float(np.sum(noise))),
        psnr_db=decibel(peak**2, float(np.sum(noise)) / count),
        worst_channel_db=min(map(decibel, np.atleast_1d(signal).tolist(), np.atleast_1d(noise).tolist())),
    )


def image_psnr(expected: AnyArray, found: AnyArray) -> float:
    """PSNR in dB of uint8 images of one shape."""
    return decibel(255.0**2, float(np.square(expected.astype(np.float64) - found).mean()))


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise), at most `MAX_DB`; -MAX_DB for NaN, which is never near to anything."""
    if math.isnan(noise) or math.isinf(noise):
        return -MAX_DB
    if noise == 0:
        return MAX_DB
    return max(-MAX_DB, min(MAX_DB, 10 * math.log10(signal / noise))) if signal > 0 else -MAX_DB


def floor_for(measured: float, demanded: float) -> float:
    """What another machine must reach: what the recipe demands, or a decibel less than an accepted lower figure."""
    return demanded if measured >= demanded else float(math.floor(measured - 1))
