"""The table for people: one line a case, doubts and errors as notes under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from pocketdiffusion_bench.figures import Figures, figures
from pocketdiffusion_bench.record import OK, Quality, Record
from pocketdiffusion_bench.stats import Summary

NOTHING = "n/a"
"""Stands for what could not be read."""


def seconds(value: float | None) -> str:
    """Three digits: "0.0123", "1.23", "12.3", "123"."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def megabytes(value: int | None) -> str:
    """10**6 bytes."""
    return NOTHING if value is None else f"{value / 1e6:,.0f}"


def _p50(summary: Summary | None) -> str:
    return NOTHING if summary is None else seconds(summary.p50)


def _step(found: Figures) -> str:
    return NOTHING if found.step is None else f"{seconds(found.step.p50)} / {seconds(found.step.p90)}"


def _quality(record: Record) -> str:
    quality = record.quality
    if quality is None:
        return NOTHING
    if quality.reference == record.case.label:
        cells = ["the reference"]
    else:
        cells = [] if quality.psnr_db is None else [f"{quality.psnr_db:.1f} dB PSNR"]
        cells += [] if quality.ssim is None else [f"{quality.ssim:.4f} SSIM"]
    return ", ".join([*cells, *_sqnr(quality), *(["random weights"] if quality.random_weights else [])]) or NOTHING


def _sqnr(quality: Quality) -> list[str]:
    """The component that lost most."""
    if not quality.sqnr_db:
        return []
    worst = min(quality.sqnr_db, key=lambda name: quality.sqnr_db[name])
    return [f"{quality.sqnr_db[worst]:.1f} dB SQNR ({worst})"]


def _rate(record: Record) -> str:
    rate = record.rate
    return NOTHING if rate is None else f"{rate.achieved / 1e9:,.0f} ({100 * rate.share:.0f} %)"


def _engine(record: Record) -> str:
    """What really ran: "openvino 2026.4.1, bfloat16"."""
    used = record.configuration
    engine = " ".join(str(used[name]) for name in ("engine", "version") if used.get(name))
    return ", ".join([part for part in (engine, str(used.get("precision") or "")) if part]) or NOTHING


COLUMNS: Mapping[str, Callable[[Record, Figures], str]] = {
    "case": lambda record, _: record.case.label,
    "engine": lambda record, _: _engine(record),
    "status": lambda record, _: record.status,
    "s/image": lambda _, found: _p50(found.image),
    "it/s": lambda _, found: seconds(found.steps_per_second),
    "images/min": lambda _, found: seconds(found.images_per_minute),
    "step p50 / p90, s": lambda _, found: _step(found),
    "process start to first picture, s": lambda _, found: _p50(found.first),
    "peak RSS, MB": lambda _, found: megabytes(found.memory.rss),
    "anonymous, MB": lambda _, found: megabytes(found.memory.anonymous),
    "quality": lambda record, _: _quality(record),
    "GFLOP/s (of peak)": lambda record, _: _rate(record),
    "J/image": lambda _, found: seconds(found.joules_per_image),
}
"""Heading -> cell."""


def table(records: Sequence[Record], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """A Markdown table with the named columns of `COLUMNS`, below it notes and the machine; ends with a line break."""
    notes: list[str] = []
    lines = [_line(columns), "|" + "---|" * len(columns)]
    for record in records:
        found = figures(record)
        cells = {name: COLUMNS[name](record, found) for name in columns}
        marks = [_mark(notes, text) for text in _doubts(record, found)]
        cells["case"] = " ".join([cells["case"], *marks])
        lines.append(_line([cells[name] for name in columns]))
    listed = [f"{number}. {_escape(text)}" for number, text in enumerate(notes, 1)]
    machines = list(dict.fromkeys(machine(record.machine) for record in records))
    return "\n".join([*lines, *_paragraph(listed), *_paragraph(machines)]) + "\n"


def write_markdown(records: Sequence[Record], stream: TextIO) -> None:
    """The whole table."""
    stream.write(table(records))


def machine(found: Mapping[str, Any]) -> str:
    """What the records were measured on, in one line; what a system does not tell is left out."""
    values = {
        "cpu": "{}",
        "usable_cores": "{} cores",
        "ram": "{:.0f} GB",
        "system": "{}",
        "python": "Python {}",
        "revision": "revision {:.12}",
    }
    known = {name: found[name] for name in values if found.get(name) is not None}
    if "ram" in known:
        known["ram"] /= 1e9
    parts = [values[name].format(value) for name, value in known.items()]
    return f"Measured on: {', '.join(parts) or 'an unknown machine'}."


def _paragraph(lines: Sequence[str]) -> list[str]:
    return ["", *lines] if lines else []


def _doubts(record: Record, found: Figures) -> list[str]:
    """What a reader must know about a line."""
    cold = " and ".join({"image": "picture", "step": "step"}[name] for name in found.cold)
    return [
        *([record.error] if record.error is not None else []),
        *([f"each process made a single {cold}: its first is what counts"] if cold else []),
        *record.flags,
        *([] if record.status == OK or record.error is not None else [f"{record.status} without a message"]),
    ]


def _mark(notes: list[str], text: str) -> str:
    """The number of a note, which equal ones share."""
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
