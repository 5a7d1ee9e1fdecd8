"""The whole benchmark on the embedded model, as its users run it. No timing decides."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocketdiffusion_bench.flags import covered
from pocketdiffusion_bench.limit import ControlGroup, make_group
from pocketdiffusion_bench.record import Record
from pocketdiffusion_bench.report import read

pytest.importorskip("onnxruntime")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("runtime", "benchmarks"))}
QUICK = ("--steps", "2", "--size", "64x64", "--runs", "1", "--no-warm-up", "--device", "onnxruntime:cpu")


def bench(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pocketdiffusion_bench", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=280)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Record:
    file = tmp_path_factory.mktemp("bench") / "result.jsonl"
    bench("sticker", *QUICK, "--output", str(file))
    (record,) = read([file])
    return record


def test_a_record_tells_time_memory_and_what_was_used(measured: Record) -> None:
    (run,) = measured.runs
    names = {span.name for span in run.spans}
    assert {"python", "import", "load", "prepare", "tokenise", "step", "vae_decode", "save", "end", "image"} <= names
    assert {"open:text_encoder", "open:unet", "open:vae_decoder"} <= names
    assert len(measured.samples("step")) == 4 and len(measured.samples("image")) == 2
    assert measured.configuration["device"] == "onnxruntime:cpu"
    assert (measured.configuration["width"], measured.configuration["steps"]) == (64, 2)
    assert len(measured.configuration["bundle"]) == 64
    assert measured.configuration["left_out"] == {}
    assert run.memory.rss is None or 50e6 < run.memory.rss < 2e9


def test_a_record_of_a_preset_tells_what_the_picture_says_was_left_out(tmp_path: Path) -> None:
    file = tmp_path / "result.jsonl"
    bench("sticker", *QUICK, "--images", "1", "--steps", "8", "--preset", "balanced", "--output", str(file))
    (record,) = read([file])
    assert record.configuration["left_out"] == {"Computed steps": "5", "Guidance hold": "0.7"}


def test_stages_follow_on_each_other_from_the_processs_creation_to_its_end(measured: Record) -> None:
    (run,) = measured.runs
    line = [span for span in run.spans if span.name != "image" and not span.name.startswith("open:")]
    assert line[0].start == 0 and line[-1].name == "end"
    for before, after in itertools.pairwise(line):
        assert before.start + before.seconds <= after.start + 1e-6, (before, after)
    assert line[-1].start + line[-1].seconds == pytest.approx(run.seconds, abs=1e-6)
    assert covered(run) <= run.seconds + 1e-6


def test_no_path_of_this_machine_is_in_a_record(measured: Record) -> None:
    text = json.dumps(measured.to_json())
    assert str(ROOT) not in text and str(Path.home()) + os.sep not in text and sys.prefix not in text


def test_a_hard_limit_kills_and_the_table_says_where() -> None:
    group = make_group(None)
    group.close()
    if not isinstance(group, ControlGroup):
        pytest.skip("no control group may be made here")
    done = bench("sticker", *QUICK, "--images", "1", "--memory-limit", "60MB,2GB")
    head, _, small, large, *_ = done.stdout.splitlines()
    assert head.startswith("| case |") and "| killed |" in small and "| ok |" in large
    assert "killed by its memory limit of 60 MB; it was at: " in done.stdout
    assert "run 1 of 1: sticker" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_ending_the_benchmark_ends_the_process_that_it_measures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pocketdiffusion_bench", "sticker", "--steps", "900", "--no-warm-up"]
    parent = subprocess.Popen(command, env={**ENVIRONMENT, "TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("events.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.terminate()
    parent.communicate(timeout=60)
    assert parent.returncode == 143
    assert not list(tmp_path.iterdir())  # it ended in order: the measured process is waited for before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sticker", "--device", "nope"], "device 'nope' is not here"),
        (["sticker", "--size", "65x65"], "try 64"),
        (["nope"], "no model 'nope'"),
        (["sticker", "--recipe", "fp16"], "sticker is stored as int8"),
        (["sticker", "--precision", "bfloat16", "--device", "onnxruntime:cpu"], "asked for bfloat16"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    done = bench(*words, "--steps", "1", code=1)
    assert done.stdout == "" and message in done.stderr and done.stderr.count("\n") == 1
