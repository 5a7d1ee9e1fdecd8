"""`pocketdiffusion bench --component NAME MODEL`: one graph alone, on each engine: latency, FLOP/s, where time goes.

The graph runs in this process, opened as the pipeline opens it, on the bundle's golden inputs or, at a given size, on
seeded random ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TextIO

from pocketdiffusion.backends import available, choose, load
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.component import Component
from pocketdiffusion.golden import golden_tensors
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion.tuning.shapes import denoiser_rows, entry_at, input_shapes, random_feeds
from pocketdiffusion_bench.case import OURS, Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.flops import graph_flops
from pocketdiffusion_bench.models import provide
from pocketdiffusion_bench.profile import PROFILERS, NodeTime, profile
from pocketdiffusion_bench.report.markdown import seconds
from pocketdiffusion_bench.stats import Summary, summarize

RUNS = 10
TOP = 12
"""Lines of a profile that the table shows."""


@dataclass(frozen=True, slots=True)
class ComponentTimes:
    """One graph on one device. Times are in seconds."""

    component: str
    device: str
    """E.g. "openvino:cpu"."""
    engine: str
    """With its version."""
    precision: str
    """The arithmetic that is really used."""
    inputs: Mapping[str, tuple[int, ...]]
    open: float
    first: float
    """The first run, which pays for what an engine does once."""
    latency: Summary
    """Of the runs after the first."""
    flops: float
    """Operations of one run."""
    nodes: tuple[NodeTime, ...]
    """The largest part first; () for an engine that gives no profile."""

    @property
    def rate(self) -> float:
        """FLOP/s of the median run."""
        return self.flops / self.latency.p50


def devices(bundle: Bundle, component: str, asked: Sequence[str]) -> list[str]:
    """The devices asked for, as "engine:device"; without any, the CPU of each engine here that opens the graph."""
    format = entry_at(bundle, component, None).format
    found = [f"{info.backend}:cpu" for info in available() if info.device == "cpu" and format in info.formats]
    chosen = [str(choose(format, device, component=component)) for device in asked] or found
    if not chosen:
        raise BenchError(
            f"{component} ({format}): no engine here opens it on a CPU; `pocketdiffusion devices` lists all"
        )
    return chosen


def feeds(bundle: Bundle, component: str, size: tuple[int, int] | None, *, rows: int = 1) -> dict[str, AnyArray]:
    """What the graph is run on: golden inputs, or for a size (width, height) in pixels random ones of `rows` rows.

    Raises BundleUnsupported for no such component or a size that it does not take, and BenchError for no golden inputs.
    """
    entry = entry_at(bundle, component, size)
    if size is not None:
        shapes = input_shapes(bundle, component, width=size[0], height=size[1], rows=rows)
        return random_feeds(entry.inputs, shapes)
    golden = bundle.manifest.golden
    found = {} if golden is None else golden_tensors(bundle.file(golden), component)[0]
    if not found:
        raise BenchError(f"{bundle.manifest.name} holds no golden inputs for {component}; give a size")
    return found


def measure(
    bundle: Bundle,
    component: str,
    device: str,
    given: Mapping[str, AnyArray],
    options: SessionOptions,
    *,
    size: tuple[int, int] | None = None,
    runs: int = RUNS,
) -> ComponentTimes:
    """Time `runs` runs after the first, then profile. Raises BenchError, BackendError, NonFinite.

    `size` (width, height) chooses among the graphs of a bundle that has one for each size.
    """
    backend, _, place = device.partition(":")
    entry = entry_at(bundle, component, size)
    graph = bundle.path / entry.graph
    opened = Component(component, graph, entry, backend=load(backend), device=place, options=options)
    opened.expect({name: array.shape for name, array in given.items()})
    start = time.perf_counter()
    precision = opened.session.precision
    open_seconds = time.perf_counter() - start
    first, *samples = [_run(opened, given) for _ in range(runs + 1)]
    opened.close()  # before the profiler's own session, so that the graph is in memory once
    latency = summarize(samples)
    if latency is None:
        raise BenchError(f"{component}: {runs} runs were asked; it takes at least one")
    return ComponentTimes(
        component=component,
        device=device,
        engine=opened.engine,
        precision=precision,
        inputs={name: array.shape for name, array in given.items()},
        open=open_seconds,
        first=first,
        latency=latency,
        flops=graph_flops(graph, {name: array.shape for name, array in given.items()}),
        nodes=tuple(profile(backend, graph, place, options, given)) if backend in PROFILERS else (),
    )


def measure_cases(cases: Sequence[Case], component: str, say: Callable[[str], None]) -> list[ComponentTimes]:
    """One component of each case's bundle, by the case's device, precision, threads, size and guidance; one at a time.

    Cases that differ in nothing of this count once. With guidance the denoiser is fed two rows, as in a step of a
    picture; the size matters only where the case has one. Raises what `devices`, `feeds` and `measure` raise, and
    BenchError for a peer.
    """
    found: dict[tuple[object, ...], ComponentTimes] = {}
    for case in cases:
        if case.peer != OURS:
            raise BenchError(f"--component is for graphs of ours; leave --peer {case.peer} out")
        bundle = Bundle.open(provide(case))
        size = None if case.width is None or case.height is None else (case.width, case.height)
        given = feeds(bundle, component, size, rows=_rows(case, bundle, component))
        for device in devices(bundle, component, [] if case.device is None else [case.device]):
            key = (bundle.path, device, case.precision, case.threads, *(array.shape for array in given.values()))
            if key not in found:
                say(f"{component} of {case.model} on {device}")
                options = SessionOptions(case.threads)
                if case.precision is not None:
                    options = replace(options, precision=case.precision)
                found[key] = measure(bundle, component, device, given, options, size=size)
    return list(found.values())


def _rows(case: Case, bundle: Bundle, component: str) -> int:
    guidance = bundle.manifest.numbers.default_guidance if case.guidance is None else case.guidance
    return denoiser_rows(entry_at(bundle, component, None), guidance)


def write(found: Sequence[ComponentTimes], format: str, stream: TextIO) -> None:
    """Tables ("md") or an array with everything ("json"). Raises BenchError for another format."""
    if format == "md":
        stream.write(markdown(found))
    elif format == "json":
        json.dump([asdict(each) for each in found], stream, indent=1, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
    else:
        raise BenchError(f"--component has no output format '{format}'; choose from md, json")


def markdown(found: Sequence[ComponentTimes]) -> str:
    """A table of latencies, then one of node types for each device that gives a profile."""
    head = "| component | engine | precision | open, s | first run, s | run p50 / p90, s | GFLOP | GFLOP/s |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for each in found:
        times = (
            f"{seconds(each.open)} | {seconds(each.first)} | {seconds(each.latency.p50)} / {seconds(each.latency.p90)}"
        )
        work = f"{each.flops / 1e9:,.2f} | {each.rate / 1e9:,.0f}"
        lines.append(f"| {each.component} | {each.engine}, {each.device} | {each.precision} | {times} | {work} |")
    for each in found:
        lines += _profile(each) if each.nodes else []
    return "\n".join(lines) + "\n"


def _profile(found: ComponentTimes) -> list[str]:
    rest = found.nodes[TOP:]
    lines = ["", f"| {found.component} on {found.device}: nodes | kernel | count | share |", "|---|---|---|---|"]
    lines += [
        f"| {node.kind} | {node.kernel} | {node.count} | {100 * node.share:.1f} % |" for node in found.nodes[:TOP]
    ]
    left = 100 * sum(node.share for node in rest)
    return lines + ([f"| {len(rest)} more | | {sum(node.count for node in rest)} | {left:.1f} % |"] if rest else [])


def _run(component: Component, given: Mapping[str, AnyArray]) -> float:
    start = time.perf_counter()
    component.run(given)
    return time.perf_counter() - start
