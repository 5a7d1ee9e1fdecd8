"""One row of plain values for each record: what CSV and SQL show. Raw samples are in JSON, and in SQL's `spans`."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.figures import Figures, figures
from pocketdiffusion_bench.record import MemoryPeaks, Record
from pocketdiffusion_bench.report.jsons import line
from pocketdiffusion_bench.stats import Summary

Plain = str | int | float | None
STATISTICS = ("count", "min", "p50", "p90", "mean", "sd")
TEXT, INTEGER, REAL = "TEXT", "INTEGER", "REAL"

COLUMNS: Mapping[str, str] = {
    "id": TEXT,
    "label": TEXT,
    **{name: TEXT for name in ("model", "peer", "recipe", "device", "precision")},
    **{name: INTEGER for name in ("downsample_keys", "threads", "width", "height", "steps")},
    **{"sampler": TEXT, "guidance": REAL, "preset": TEXT, "decoder": TEXT, "prompt": TEXT, "seed": INTEGER},
    **{"residency": TEXT, "vae_tile": INTEGER, "memory_plan": INTEGER, "memory_limit": INTEGER},
    **{name: TEXT for name in ("status", "error", "started", "flags")},
    "runs": INTEGER,
    **{
        f"{figure}_{statistic}": INTEGER if statistic == "count" else REAL
        for figure in ("image", "step", "first")
        for statistic in STATISTICS
    },
    **{"cold": TEXT, "steps_per_second": REAL, "images_per_minute": REAL},
    **{f"{kind}_bytes": INTEGER for kind in ("rss", "anonymous", "file", "pss", "cgroup")},
    **{"joules_per_image": REAL, "energy_source": TEXT},
    **{"reference": TEXT, "psnr_db": REAL, "ssim": REAL, "sqnr_db": TEXT, "random_weights": INTEGER},
    **{"flops_per_step": REAL, "flops_achieved": REAL, "flops_peak": REAL, "flops_share": REAL, "probe": TEXT},
    "configuration": TEXT,
    "machine": TEXT,
}
"""Column -> SQL type. Seconds, bytes, joules, decibels and FLOP/s; "sqnr_db", "flags", "cold", "configuration" and
"machine" hold JSON."""


def identity(record: Record) -> str:
    """The first 16 hexadecimal digits of the sha256 of its line: equal records have one, wherever they stand."""
    return hashlib.sha256(line(record).encode()).hexdigest()[:16]


def row(record: Record) -> dict[str, Plain]:
    """A value for every column."""
    found = figures(record)
    sources = sorted({run.energy_source for run in record.runs if run.energy_source is not None})
    values = {
        "id": identity(record),
        "label": record.case.label,
        **_case(record.case),
        "status": record.status,
        "error": record.error,
        "started": record.started,
        "flags": _json(record.flags),
        "runs": len(record.runs),
        **_figures(found),
        **_memory(found.memory),
        "energy_source": ", ".join(sources) or None,
        **_quality(record),
        **_rate(record),
        "configuration": _json(record.configuration),
        "machine": _json(record.machine),
    }
    return {name: values[name] for name in COLUMNS}


def write_csv(records: Sequence[Record], stream: TextIO) -> None:
    """A line of column names, then one for each record; an empty cell is a value that is not there."""
    writer = csv.DictWriter(stream, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(record) for record in records)


def _case(case: Case) -> dict[str, Plain]:
    return asdict(case)


def _figures(found: Figures) -> dict[str, Plain]:
    values: dict[str, Plain] = {
        "cold": _json(found.cold),
        "steps_per_second": found.steps_per_second,
        "images_per_minute": found.images_per_minute,
        "joules_per_image": found.joules_per_image,
    }
    summaries: dict[str, Summary | None] = {"image": found.image, "step": found.step, "first": found.first}
    for name, summary in summaries.items():
        values |= {f"{name}_{each}": None if summary is None else getattr(summary, each) for each in STATISTICS}
    return values


def _memory(peaks: MemoryPeaks) -> dict[str, Plain]:
    return {f"{kind}_bytes": value for kind, value in asdict(peaks).items()}


def _quality(record: Record) -> dict[str, Plain]:
    names = ("reference", "psnr_db", "ssim", "sqnr_db", "random_weights")
    if record.quality is None:
        return dict.fromkeys(names)
    values = asdict(record.quality)
    return {**values, "sqnr_db": _json(values["sqnr_db"]), "random_weights": int(values["random_weights"])}


def _rate(record: Record) -> dict[str, Plain]:
    rate = record.rate
    return {
        "flops_per_step": None if rate is None else rate.flops_per_step,
        "flops_achieved": None if rate is None else rate.achieved,
        "flops_peak": None if rate is None else rate.peak,
        "flops_share": None if rate is None else rate.share,
        "probe": None if rate is None else rate.probe,
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
