"""Where the time of a graph goes, node type by node type, as its engine says.

What is profiled is opened with the very settings that the backends use. Profiling itself slows a run down, so that only
shares are of use here and seconds are measured without it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from pocketdiffusion.backends import onnxruntime, openvino
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.session import label, reason
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_bench.errors import BenchError

Feeds = Mapping[str, AnyArray]
RUNS = 3


@dataclass(frozen=True, slots=True)
class NodeTime:
    """All nodes of one type that one kind of kernel ran."""

    kind: str
    """The engine's name, after what it fused: "FullyConnected", "Conv"."""
    kernel: str
    """OpenVINO: implementation and arithmetic, e.g. "brgemm_avx512_bf16"; ONNX Runtime: the provider."""
    count: int
    """In one run; OpenVINO leaves out nodes that took less than a microsecond."""
    seconds: float
    """Of one run, with profiling on."""
    share: float
    """Of all nodes' seconds."""


def profile(backend: str, graph: Path, device: str, options: SessionOptions, feeds: Feeds) -> list[NodeTime]:
    """What one run is made of, the largest part first: the mean of `RUNS` after one that does not count.

    Raises BenchError for an engine that gives no profile, and where the graph can't be opened or run.
    """
    if backend not in PROFILERS:
        raise BenchError(f"{backend} gives no profile of a graph; choose from {', '.join(PROFILERS)}")
    try:
        nodes = list(PROFILERS[backend](graph, device, options, feeds))
    except Exception as error:  # engines raise classes of their own, straight from C++
        raise BenchError(f"{label(graph)} could not be profiled on {backend}:{device}: {reason(error)}") from error
    sums: dict[tuple[str, str], list[float]] = {}
    for kind, kernel, seconds in nodes:
        sums.setdefault((kind, kernel), []).append(seconds)
    total = sum(seconds for _, _, seconds in nodes)
    found = [
        NodeTime(*names, ceil(len(each) / RUNS), sum(each) / RUNS, sum(each) / total if total else 0.0)
        for names, each in sums.items()
    ]
    return sorted(found, key=lambda node: -node.seconds)


Node = tuple[str, str, float]
"""Kind, kernel, seconds."""


def _onnxruntime(graph: Path, device: str, options: SessionOptions, feeds: Feeds) -> Iterable[Node]:
    settings = onnxruntime.session_options(device, options, integer=onnxruntime.quantizes_activations(graph))
    settings.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        settings.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.open_session(graph, device, options, settings)
        for _ in range(RUNS + 1):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return onnxruntime_nodes(events)


def onnxruntime_nodes(events: Iterable[Mapping[str, Any]]) -> Iterable[Node]:
    """The nodes in the profile's events ("dur" and "ts" in microseconds), without those of the first run."""
    listed = list(events)
    warm = min(event["ts"] + event["dur"] for event in listed if event["name"] == "model_run")
    for event in listed:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= warm:
            yield event["args"]["op_name"], event["args"]["provider"], event["dur"] / 1e6


def _openvino(graph: Path, device: str, options: SessionOptions, feeds: Feeds) -> Iterable[Node]:
    core = openvino.shared_core()
    settings = {**openvino.properties(core, graph, device, options), "PERF_COUNT": True}
    compiled = core.compile_model(openvino.read(core, graph, options), device.upper(), settings)
    request = compiled.create_infer_request()
    request.infer(dict(feeds))
    for _ in range(RUNS):
        request.infer(dict(feeds))
        for node in request.get_profiling_info():
            if node.status == node.Status.EXECUTED:
                yield node.node_type, node.exec_type, node.real_time.total_seconds()


PROFILERS: Mapping[str, Callable[[Path, str, SessionOptions, Feeds], Iterable[Node]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""Engine -> the nodes of `RUNS` runs."""
