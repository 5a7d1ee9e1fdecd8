"""What the runners of OpenVINO's peers share: options of a compiled graph, and the names of precisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketdiffusion_bench.peers.runners.protocol import Job

_SHORT = {"float32": "f32", "bfloat16": "bf16"}
"""Torch's names -> OpenVINO's."""


def options(job: Job) -> dict[str, Any]:
    """Properties that every graph of the job is compiled with."""
    threads = job.case["threads"]
    found: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _SHORT[job.settings["precision"]]}
    return found if threads is None else {**found, "INFERENCE_NUM_THREADS": threads}


def precision(compiled: Any) -> str:
    """Torch's name of what a compiled graph computes in; OpenVINO's where torch has none."""
    short: str = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return {short: name for name, short in _SHORT.items()}.get(short, short)
