"""Records with figures that can be checked by hand, for the tests of the benchmark's outputs."""

from __future__ import annotations

from collections.abc import Sequence

from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.record import FAILED, OK, MemoryPeaks, Quality, Rate, Record, Run, Span

MACHINE = {"cpu": "Tester 1", "usable_cores": 2}


def make_run(pictures: Sequence[Sequence[float]], *, start: float = 0.5, rss: int = 300_000_000) -> Run:
    """A process that loads for `start` seconds and then takes these steps for each picture, and 0.1 s to decode."""
    spans, at = [Span("import", 0.0, start)], start
    for steps in pictures:
        begin = at
        for seconds in steps:
            spans.append(Span("step", at, seconds))
            at += seconds
        spans += [Span("vae_decode", at, 0.1), Span("image", begin, at + 0.1 - begin)]
        at += 0.1
    peaks = MemoryPeaks(rss=rss, anonymous=rss // 2)
    return Run(at + 0.05, tuple(spans), peaks, joules=10.0, energy_source="rapl:package-0")


def make_record(runs: Sequence[Run] | None = None, case: Case | None = None, **changes: object) -> Record:
    """A measured record, with every optional part filled."""
    values: dict[str, object] = {
        "case": case or Case("random:sd15", recipe="int8", device="openvino:cpu", width=512, height=512, steps=2),
        "status": OK,
        "started": "2026-11-21T09:00:00+00:00",
        "machine": MACHINE,
        "configuration": {"engine": "openvino", "precision": "float32", "threads": 2},
        "runs": (make_run([[1.0, 2.0], [2.0, 4.0]]),) if runs is None else tuple(runs),
        "quality": Quality("fp32", 35.25, 0.9912, {"unet": 43.0, "vae_decoder": 55.0}, random_weights=True),
        "rate": Rate(1.6e12, 8e11, 1.6e12, "float32 2048x2048x2048"),
        "flags": ("the machine was busy: load 3.1 on 2 cores",),
    }
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def make_failed() -> Record:
    """A record that says why there is nothing in it; its text tries to break every format."""
    case = Case('it\'s, "odd"|x\n;--', peer="onnxstream")
    nothing = {"runs": (), "quality": None, "rate": None, "flags": (), "configuration": {}}
    return make_record(**nothing, case=case, status=FAILED, error="ended with 1: a | b\n'quoted', \"twice\"")  # type: ignore[arg-type]
