"""JSON of whole records, raw samples included: an array, or a line each (`schema.json` describes one record)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.record import SCHEMA_VERSION, Record


def write_json(records: Sequence[Record], stream: TextIO) -> None:
    """One array. NaN and infinity, which JSON lacks, raise ValueError."""
    json.dump([record.to_json() for record in records], stream, indent=1, ensure_ascii=False, allow_nan=False)
    stream.write("\n")


def write_jsonl(records: Sequence[Record], stream: TextIO) -> None:
    """One line for each record, so that files can be appended to and joined."""
    for record in records:
        stream.write(line(record) + "\n")


def line(record: Record) -> str:
    """A record in one line, the same for equal records."""
    return json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False)


def read(files: Iterable[Path]) -> list[Record]:
    """The records of .jsonl files, in their order. Raises BenchError, naming the line, for anything else."""
    return [record for file in files for record in _read(file)]


def _read(file: Path) -> list[Record]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BenchError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BenchError(f"{file} is not text; give a file that `bench -o jsonl` wrote") from None
    return [_parse(file, number, text) for number, text in enumerate(lines, 1) if text.strip()]


def _parse(file: Path, number: int, text: str) -> Record:
    try:
        data = json.loads(text)
        version = data["schema"]
        if version == SCHEMA_VERSION:
            return Record.from_json(data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BenchError(
            f"{file}:{number} is no record ({type(error).__name__}: {error}); give a file that `bench -o jsonl` wrote"
        ) from None
    raise BenchError(f"{file}:{number} has schema {version!r}; this version reads {SCHEMA_VERSION}: measure again")
