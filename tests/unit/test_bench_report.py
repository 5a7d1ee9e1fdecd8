from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.record import Record
from pocketdiffusion_bench.report import FORMATS, read, table, write
from pocketdiffusion_bench.report.flat import COLUMNS, row
from pocketdiffusion_bench.report.markdown import NOTHING, seconds
from pocketdiffusion_bench.report.readme import fill
from pocketdiffusion_bench.report.sql import literal

from .bench_records import make_failed, make_record, make_run

RECORDS = [make_record(), make_failed()]
ROOT = Path(__file__).resolve().parents[2]


def written(format: str) -> str:
    stream = io.StringIO()
    write(RECORDS, format, stream)
    return stream.getvalue()


def test_unknown_format():
    with pytest.raises(BenchError, match="'xml' is unknown; choose from md, csv, json, jsonl, sql"):
        write(RECORDS, "xml", io.StringIO())


@pytest.mark.parametrize("format", FORMATS)
def test_no_records_are_a_document_too(format):
    stream = io.StringIO()
    write([], format, stream)
    assert (stream.getvalue() == "") == (format == "jsonl")


def test_json_and_lines_hold_whole_records(tmp_path):
    assert [Record.from_json(data) for data in json.loads(written("json"))] == RECORDS
    file = tmp_path / "results.jsonl"
    file.write_text(written("jsonl") + "\n", encoding="utf-8")
    assert read([file, file]) == RECORDS + RECORDS


def test_infinity_is_no_json():
    with pytest.raises(ValueError, match="JSON"):
        write([make_record([make_run([[float("inf")]])])], "jsonl", io.StringIO())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"results.jsonl:1 is no record \(JSONDecodeError"),
        (b"[]", "1 is no record"),
        (b'{"schema": 1}', r"is no record \(KeyError: 'runs'"),
        (b'\n{"schema": 2}', ":2 has schema 2; this version reads 1"),
        (b"\xff\xfe", "is not text"),
    ],
)
def test_damaged_results_are_named(tmp_path, content, message):
    file = tmp_path / "results.jsonl"
    file.write_bytes(content)
    with pytest.raises(BenchError, match=message):
        read([file])
    with pytest.raises(BenchError, match="absent.jsonl can't be read"):
        read([tmp_path / "absent.jsonl"])


def test_csv_gives_every_value_back():
    rows = list(csv.DictReader(io.StringIO(written("csv"))))
    assert list(rows[0]) == list(COLUMNS)
    for found, record in zip(rows, RECORDS, strict=True):
        assert found == {name: "" if value is None else str(value) for name, value in row(record).items()}
    assert rows[0]["step_p50"] == "2.0" and rows[0]["rss_bytes"] == "300000000" and rows[0]["flops_share"] == "0.5"
    assert rows[1]["model"] == RECORDS[1].case.model


def test_sqlite_reads_the_sql_and_reading_it_twice_adds_nothing():
    with sqlite3.connect(":memory:") as database:
        for _ in range(2):
            database.executescript(written("sql"))
        database.row_factory = sqlite3.Row
        rows = [dict(found) for found in database.execute("SELECT * FROM records")]
        assert rows == [row(record) for record in RECORDS]
        query = "SELECT sum(seconds), count(*) FROM spans JOIN records ON record = id WHERE name = 'step'"
        assert tuple(database.execute(query).fetchone()) == (9.0, 4)
    database.close()


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_sql_keeps_every_text(text):
    with sqlite3.connect(":memory:") as database:
        assert database.execute(f"SELECT {literal(text)}").fetchone() == (text,)
    database.close()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_breaks_out_of_its_cell(text):
    line = table([make_record(case=Case(text or "x"))], ["case", "status"]).split("\n")[2]
    assert len(re.split(r"(?<!\\)\|", line)) == 4 and line.endswith("| ok |")


def test_the_table_shows_what_the_record_holds():
    lines = table(RECORDS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:3]]
    shown = dict(zip(cells[0], cells[2], strict=True))
    assert shown == {
        "case": "random:sd15 int8 openvino:cpu steps=2 512x512 [1]",
        "engine": "openvino, float32",
        "status": "ok",
        "s/image": "6.10",
        "it/s": "0.500",
        "images/min": "9.84",
        "step p50 / p90, s": "2.00 / 4.00",
        "process start to first picture, s": "3.60",
        "peak RSS, MB": "300",
        "anonymous, MB": "150",
        "quality": "35.2 dB PSNR, 0.9912 SSIM, 43.0 dB SQNR (unet), random weights",
        "GFLOP/s (of peak)": "800 (50 %)",
        "J/image": "5.00",
    }


def test_doubts_and_errors_are_notes_under_the_table():
    lines = table([*RECORDS, RECORDS[0]]).splitlines()
    assert lines[3].startswith('| onnxstream it\'s, "odd"\\|x ;-- [2] | n/a | failed |')
    assert lines[4].startswith("| random:sd15 int8 openvino:cpu steps=2 512x512 [1] |")
    assert lines[5:] == [
        "",
        "1. the machine was busy: load 3.1 on 2 cores",
        "2. ended with 1: a \\| b 'quoted', \"twice\"",
        "",
        "Measured on: Tester 1, 2 cores.",
    ]


def test_the_machine_stands_below_once():
    described = {
        "cpu": "C",
        "usable_cores": 2,
        "ram": 24e9,
        "system": "Linux 6",
        "python": "3.11.2",
        "revision": "a" * 40,
    }
    lines = table(
        [make_record(machine=described), make_record(machine=described), make_record(machine={})]
    ).splitlines()
    assert lines[-2:] == [
        "Measured on: C, 2 cores, 24 GB, Linux 6, Python 3.11.2, revision aaaaaaaaaaaa.",
        "Measured on: an unknown machine.",
    ]


def test_a_table_of_some_columns():
    assert table(RECORDS[:1], ["case", "it/s"]).splitlines()[0] == "| case | it/s |"


def test_first_pictures_are_marked_in_the_table():
    assert "each process made a single picture: its first" in table([make_record([make_run([[1.0, 1.0]])])])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (0.9996, "1.00"), (1.0, "1.00"), (12.34, "12.3"), (99.96, "100"), (1234.0, "1234")],
)
def test_seconds_have_three_digits(value, text):
    assert seconds(value) == text
    assert seconds(None) == NOTHING


README = "before\n<!-- bench {} -->\nold\n<!-- /bench -->\nafter\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    with (tmp_path / "results.jsonl").open("w", encoding="utf-8") as stream:
        write(RECORDS, "jsonl", stream)
    return tmp_path


def test_tables_of_a_readme_are_made_anew(results):
    text = README.format("results.jsonl") + README.format("results.jsonl results.jsonl | case; peak RSS, MB")
    filled = fill(text, results)
    assert table(RECORDS) in filled and table(RECORDS * 2, ["case", "peak RSS, MB"]) in filled
    assert "old" not in filled and filled.count("before") == filled.count("after") == 2
    assert fill(filled, results) == filled
    assert fill("no marks", results) == "no marks"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench results.jsonl -->\nno end", "has no '<!-- /bench -->'"),
        ("<!-- bench results.jsonl -->\n" + README.format("results.jsonl"), "has no '<!-- /bench -->'"),
        (README.format("absent.jsonl"), "absent.jsonl can't be read"),
        (README.format("results.jsonl | case; colour"), "no column 'colour' in the table; choose from case; engine"),
    ],
)
def test_marks_that_make_no_table(results, text, message):
    with pytest.raises(BenchError, match=message):
        fill(text, results)


def test_the_command_converts_and_checks(results):
    readme = results / "README.md"
    readme.write_text(README.format("results.jsonl"), encoding="utf-8")

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pocketdiffusion_bench.report", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)

    assert run(results / "results.jsonl", "-o", "csv").stdout == written("csv")
    stale = run("--readme", readme, "--check")
    assert stale.returncode == 1 and "differ from the results" in stale.stderr
    assert run("--readme", readme).returncode == 0
    assert table(RECORDS) in readme.read_text(encoding="utf-8")
    assert run("--readme", readme, "--check").returncode == 0
    missing = run(results / "absent.jsonl")
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1


def test_the_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fill(text, ROOT) == text, "run: python -m pocketdiffusion_bench.report --readme README.md"
