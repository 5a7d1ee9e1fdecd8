"""`schema.json` and the dataclasses of `record.py` say the same."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import pytest

from pocketdiffusion_bench import record as record_module
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.record import SCHEMA_VERSION, MemoryPeaks, Quality, Rate, Record, Run, Span

from .bench_records import make_failed, make_record

SCHEMA = json.loads((files("pocketdiffusion_bench") / "schema.json").read_text(encoding="utf-8"))
ADDED = {"case": ["downsample_keys", "preset", "decoder", "vae_tile", "memory_plan"]}
"""Fields that older records lack."""
CLASSES = {"case": Case, "run": Run, "span": Span, "memory": MemoryPeaks, "quality": Quality, "rate": Rate}
RESULTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("sd15*.jsonl"))


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("name", [None, *CLASSES])
def test_every_field_is_described_and_required(name):
    part, kind = (SCHEMA, Record) if name is None else (SCHEMA["$defs"][name], CLASSES[name])
    names = [field.name for field in fields(kind)]
    assert list(part["properties"]) == names
    assert part["required"] == [field for field in names if field not in ADDED.get(name, [])]
    assert part["additionalProperties"] is False


def test_states_and_version():
    states = [getattr(record_module, name) for name in ("OK", "FAILED", "KILLED", "UNAVAILABLE")]
    assert SCHEMA["properties"]["status"]["enum"] == states
    assert SCHEMA["properties"]["schema"]["const"] == SCHEMA_VERSION


@pytest.mark.parametrize("record", [make_record(), make_record(quality=None, rate=None), make_failed()])
def test_records_follow_the_schema(validator, record):
    validator.validate(json.loads(json.dumps(record.to_json())))


def test_committed_results_follow_the_schema(validator):
    for file in RESULTS:
        for line in file.read_text(encoding="utf-8").splitlines():
            validator.validate(json.loads(line))


@pytest.mark.parametrize(
    "change",
    [
        {"status": "fine"},
        {"surplus": 1},
        {"schema": 2},
        {"flags": "busy"},
        {"rate": {"flops_per_step": 1.0}},
        {"case": {**make_record().case.to_json(), "width": "512"}},
        {"case": {**make_record().case.to_json(), "memory_limit": 0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_no_record_is_refused(validator, change):
    data = json.loads(json.dumps(make_record().to_json()))
    assert validator.is_valid(data)
    assert not validator.is_valid({**data, **change})
