"""What the machine can do at most: FLOP/s of matrix products, by the engines that also run the models.

The probe runs a graph of products of square matrices through the backends' own sessions, with the device, precision
and threads of the case, on every engine that has them; the best engine's best run is the peak. It is a peak that can be
reached, not the processor's data sheet. Limit: an engine that lacks a fast kernel for a precision lowers nothing but
its own attempt; where no engine has the precision there is no peak.
"""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketdiffusion.backends import available, load
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.errors import BackendError
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.figures import figures
from pocketdiffusion_bench.matmul_graph import matmul_graph
from pocketdiffusion_bench.record import Rate, Record

SIZE, PRODUCTS = 2048, 4
SECONDS = 1.5
"""How long an engine is tried, after one run that does not count."""
PRECISIONS = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, slots=True)
class Peak:
    """The best of a probe."""

    flops: float
    """FLOP/s; multiplications and additions of int8 count alike."""
    probe: str
    """E.g. "float32 2048x2048x2048 openvino:cpu 2026.4.1"."""


def rate(record: Record, flops_per_step: float, peak: Peak) -> Rate:
    """The record's arithmetic against the peak. Raises BenchError for a record without a step."""
    step = figures(record).step
    if step is None:
        raise BenchError(f"{record.case.label}: no step was measured, so there is no rate")
    return Rate(flops_per_step, flops_per_step / step.p50, peak.flops, peak.probe)


@functools.cache
def peak(precision: str, device: str = "cpu", threads: int | None = None) -> Peak:
    """The best of all engines here on a kind of device ("cpu", "gpu", "cuda" ...); takes some seconds, once.

    Raises BenchError when none has the device in the precision.
    """
    if precision not in PRECISIONS:
        raise BenchError(f"rate: precision '{precision}' is unknown; choose from {', '.join(PRECISIONS)}")
    refusals: list[str] = []
    found: list[Peak] = []
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "matmul.onnx"
        graph.write_bytes(matmul_graph(SIZE, PRODUCTS, _stored(precision)))
        for info in available():
            if info.device == device and "onnx" in info.formats:
                try:
                    found.append(_measure(info.backend, device, graph, precision, threads))
                except BackendError as error:
                    refusals.append(str(error))
    if not found:
        raise BenchError(
            f"rate: no engine here computes in {precision} on {device}: {'; '.join(refusals) or 'none has it'}"
        )
    return max(found, key=lambda each: each.flops)


def _stored(precision: str) -> str:
    return "float32" if precision == "bfloat16" else precision


def _measure(backend: str, device: str, graph: Path, precision: str, threads: int | None) -> Peak:
    engine = load(backend)
    options = SessionOptions(threads, "float32" if precision == "int8" else precision)
    session = engine.open(graph, device, options)
    try:
        if session.precision != precision:
            raise BackendError(f"{backend}:{device} computes in {session.precision}")
        feeds = {"x": np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(session.inputs["x"].dtype)}
        session.run(feeds)
        seconds: list[float] = []
        end = time.perf_counter() + SECONDS
        while not seconds or time.perf_counter() < end:
            start = time.perf_counter()
            session.run(feeds)
            seconds.append(time.perf_counter() - start)
    finally:
        session.close()
    flops = 2 * PRODUCTS * SIZE**3 / min(seconds)
    return Peak(flops, f"{precision} {SIZE}x{SIZE}x{SIZE} {backend}:{device} {engine.version()}")
