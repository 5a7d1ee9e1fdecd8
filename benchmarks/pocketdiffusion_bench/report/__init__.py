"""Records as text: one file a format.

`python -m pocketdiffusion_bench.report FILES... -o FORMAT` turns saved records into any of them; with
`--readme FILE` it writes the tables that the file asks for (see `report.readme`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.record import Record
from pocketdiffusion_bench.report.flat import write_csv
from pocketdiffusion_bench.report.jsons import read, write_json, write_jsonl
from pocketdiffusion_bench.report.markdown import table, write_markdown
from pocketdiffusion_bench.report.sql import write_sql

__all__ = ["FORMATS", "read", "table", "write"]

FORMATS: Mapping[str, Callable[[Sequence[Record], TextIO], None]] = {
    "md": write_markdown,
    "csv": write_csv,
    "json": write_json,
    "jsonl": write_jsonl,
    "sql": write_sql,
}


def write(records: Sequence[Record], format: str, stream: TextIO) -> None:
    """Write records in one of `FORMATS`. Raises BenchError for another."""
    if format not in FORMATS:
        raise BenchError(f"output format '{format}' is unknown; choose from {', '.join(FORMATS)}")
    FORMATS[format](records, stream)
