"""What a record tells of its machine, and what it must not."""

from __future__ import annotations

import getpass
import json
import platform
import sys
import time
from pathlib import Path

import pytest

from pocketdiffusion_bench import machine


def test_it_names_neither_the_machine_nor_its_user_nor_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(machine.describe())
    for secret in (platform.node(), str(Path.home()), sys.prefix, str(Path(__file__).parents[2])):
        assert len(secret) < 3 or secret not in text
    user = getpass.getuser()
    assert len(user) < 4 or user not in text


def test_every_value_is_known_or_none() -> None:
    found = machine.describe()
    assert found["logical_cores"] >= 1 and found["python"] == platform.python_version()
    assert all(value is None or value for name, value in found.items() if name not in ("virtual", "packages"))


def test_a_system_that_tells_nothing_gives_nones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: None)
    monkeypatch.setattr(machine, "parents", lambda change: iter(()))
    assert machine.cpu_seconds() is None and machine.frequency() is None and machine.throttled() is None
    found = machine.describe()
    assert found["isa"] is None and found["governor"] is None and found["memory_limit"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_busy_time_is_counted() -> None:
    before, start = machine.cpu_seconds(), time.perf_counter()
    while time.perf_counter() - start < 0.3:
        pass
    after = machine.cpu_seconds()
    assert before is not None and after is not None
    assert after.busy - before.busy >= 0.2 and after.total - before.total >= 0.2


@pytest.mark.parametrize(
    ("cpuinfo", "isa"),
    [
        (
            "processor: 0\nflags: fpu avx2 avx512f avx512_vnni amx_tile\n\nprocessor: 1\n",
            "avx2 avx512f avx512_vnni amx_tile",
        ),
        ("processor: 0\nFeatures: fp asimd asimddp i8mm bf16\n", "neon dotprod i8mm bf16"),
    ],
)
def test_instruction_sets_are_read_on_both_architectures(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, isa: str
) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: cpuinfo if path == Path("/proc/cpuinfo") else None)
    assert machine.describe()["isa"] == isa.split()


def test_the_revision_is_gits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "benchmarks/pocketdiffusion_bench/machine.py"))
    assert machine.revision() is None
    (tmp_path / ".git/refs/heads").mkdir(parents=True)
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".git/packed-refs").write_text("# pack-refs\nabc123 refs/heads/main\n")
    assert machine.revision() == "abc123"
    (tmp_path / ".git/refs/heads/main").write_text("def456\n")
    assert machine.revision() == "def456"
    (tmp_path / ".git/HEAD").write_text("789abc\n")
    assert machine.revision() == "789abc"
