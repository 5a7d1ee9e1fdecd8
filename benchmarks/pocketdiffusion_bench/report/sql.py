"""SQL that SQLite reads: `pocketdiffusion bench MODEL -o sql | sqlite3 results.db`.

Table `records` has the columns of `flat.COLUMNS`, table `spans` the raw samples. Reading the same text again changes
nothing, so that a database can collect the results of many runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from pocketdiffusion_bench.record import Record
from pocketdiffusion_bench.report.flat import COLUMNS, Plain, identity, row

SPANS = {"record": "TEXT", "run": "INTEGER", "span": "INTEGER", "name": "TEXT", "start": "REAL", "seconds": "REAL"}


def write_sql(records: Sequence[Record], stream: TextIO) -> None:
    """CREATE TABLE and INSERT, in one transaction."""
    columns = ", ".join(f"{name} {kind}" + " PRIMARY KEY" * (name == "id") for name, kind in COLUMNS.items())
    spans = ", ".join(f"{name} {kind}" for name, kind in SPANS.items())
    stream.write("BEGIN;\n")
    stream.write(f"CREATE TABLE IF NOT EXISTS records ({columns});\n")
    stream.write(f"CREATE TABLE IF NOT EXISTS spans ({spans}, PRIMARY KEY (record, run, span));\n")
    for record in records:
        name = identity(record)
        stream.write(_insert("records", list(row(record).values())))
        for number, run in enumerate(record.runs):
            for place, span in enumerate(run.spans):
                values: list[Plain] = [name, number, place, span.name, span.start, span.seconds]
                stream.write(_insert("spans", values))
    stream.write("COMMIT;\n")


def _insert(table: str, values: Sequence[Plain]) -> str:
    return f"INSERT OR IGNORE INTO {table} VALUES ({', '.join(map(literal, values))});\n"


def literal(value: Plain) -> str:
    """A value as SQL. Texts keep every character but NUL, which ends a statement for SQLite."""
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return "'" + value.replace("\0", "").replace("'", "''") + "'"
    return repr(value)
