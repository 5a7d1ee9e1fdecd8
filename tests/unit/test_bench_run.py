"""The parent of the measured processes, with stand-ins for them that do what a broken peer or engine might."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pocketdiffusion_bench import run as run_module
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.limit import ControlGroup, make_group
from pocketdiffusion_bench.record import FAILED, KILLED, OK, Record
from pocketdiffusion_bench.run import Settings, measure, measure_curve

STAND_IN = """
import os, sys, time
from pathlib import Path
from pocketdiffusion_bench.events import START, EventLog
folder, images = Path(sys.argv[1]), int(sys.argv[2])
log = EventLog(folder / "events.jsonl")
log.span("python", float(os.environ[START]), time.perf_counter())
used = {"device": "a:cpu", "precision": "float32"}
step, colours = 0.02, [(1, 2, 3)] * images

def picture(index):
    start = time.perf_counter()
    for _ in range(3):
        with log.timed("step"):
            time.sleep(step if index == 0 else later)
    path = folder / f"{index}.png"
    path.write_bytes((folder.parent / f"{colours[index]}.png").read_bytes())
    log.span("image", start, time.perf_counter())
    log.picture(path)

later = step
"""
DRAW = "\nfor index in range(images):\n    picture(index)\n"
REST = DRAW + "log.configuration(used)\nlog.done(123456)\n"
ONCE = Settings(runs=1, warm_up=False)
Do = Callable[..., Record]


@pytest.fixture
def do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Do:
    """Measures one case by the stand-in, whose middle part is given."""
    for colour in ((1, 2, 3), (9, 9, 9)):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")

    def do(middle: str = "", rest: str = REST, *, settings: Settings = ONCE, case: Case | None = None) -> Record:
        use(monkeypatch, lambda _: STAND_IN + middle + rest)
        (job,) = measure([case or Case("m")], settings, tmp_path, lambda line: None)
        return job.record()

    return do


def use(monkeypatch: pytest.MonkeyPatch, code: Callable[[Case], str]) -> None:
    def command(case: Case, bundle: Path, *, events: Path, image: Path, images: int) -> list[str]:
        return [sys.executable, "-c", code(case), str(events.parent), str(images)]

    monkeypatch.setattr(run_module, "child_command", command)
    monkeypatch.setattr(run_module.models, "provide", lambda case: Path(__file__).parent)


def test_a_sound_process_gives_a_timeline_from_its_creation_to_its_end(do: Do) -> None:
    record = do(settings=Settings(runs=2, images=2))
    assert record.status == OK and len(record.runs) == 2
    (run, _) = record.runs
    assert [span.name for span in run.spans] == ["python", "image", *["step"] * 3, "image", *["step"] * 3, "end"]
    assert run.spans[0].start == 0
    assert run.spans[-1].start + run.spans[-1].seconds == pytest.approx(run.seconds)
    assert run.memory.rss == 123456  # the process's own word, where it has one
    assert len(record.samples("step")) == 12
    assert Record.from_json(json.loads(json.dumps(record.to_json()))).runs == record.runs


@pytest.mark.parametrize(
    ("middle", "asked", "message"),
    [
        ("used['precision'] = 'bfloat16'", {"precision": "float32"}, "ran in bfloat16, asked for float32"),
        ("used['device'] = 'a:gpu'", {"device": "a:cpu"}, "ran on a:gpu, asked for a:cpu"),
        ("used['steps'] = 2", {"steps": 3}, "ran with steps 2, asked for 3"),
        ("", {"width": 16, "height": 16}, "made a picture of 8x8, asked for 16x16"),
        ("images -= 1", {}, "made 1 pictures instead of 2"),
    ],
)
def test_what_ran_otherwise_than_asked_has_failed(do: Do, middle: str, asked: dict[str, Any], message: str) -> None:
    record = do(middle, case=Case("m", **asked))
    assert record.status == FAILED and record.runs == () and message in str(record.error)


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        ("later = 0.0", "a cached result"),
        ("colours[1] = (9, 9, 9)", "2 different pictures"),
        ("time.sleep(.5)", "the stages add up to"),
    ],
)
def test_what_is_doubtful_is_flagged(do: Do, middle: str, message: str) -> None:
    record = do(middle)
    assert record.status == OK and any(message in flag for flag in record.flags)


def test_equal_pictures_are_not_flagged(do: Do) -> None:
    assert not [flag for flag in do().flags if "different pictures" in flag]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("print('first', file=sys.stderr)\nsys.exit('no such device')", "no such device"),
        ("log.begin('load')\nsys.exit(3)", "exit code 3; it was at: load"),
        ("log.begin('open:unet')\nos.kill(os.getpid(), 11)", "signal 11; it was at: open:unet"),
        (DRAW, "exit code 0"),
        ("(folder / 'a').touch()\nfor _ in range(images):\n    log.picture(folder / 'a')\nlog.done(1)", "no PNG"),
        ("(folder / 'events.jsonl').write_text('not JSON\\n')", "an event that can't be read"),
        ("(folder / 'events.jsonl').write_text('{}\\n')", "an event that can't be read"),
        ("log.begin('step')\ntime.sleep(60)", "not done after 2 s, and killed; it was at: st"),  # step, or start
    ],
)
def test_what_goes_wrong_is_told_with_its_place(do: Do, rest: str, message: str) -> None:
    record = do(rest=rest, settings=replace(ONCE, timeout=2.0))
    assert record.status == FAILED and message in str(record.error) and "\n" not in str(record.error)


def test_cases_take_turns_after_a_warm_up_that_does_not_count(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    use(monkeypatch, lambda case: f"{STAND_IN}\n{note}({case.model!r})\n{REST}")
    jobs = measure([Case("A"), Case("B")], Settings(runs=2, images=1), tmp_path, lambda line: None)
    assert (tmp_path / "order").read_text() == "ABABAB"
    assert [len(job.runs) for job in jobs] == [2, 2]


def test_a_case_that_fails_stops_no_other(do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, lambda case: STAND_IN + ("sys.exit('broken')" if case.model == "A" else REST))
    lines: list[str] = []
    jobs = measure([Case("A"), Case("B")], Settings(runs=1), tmp_path, lines.append)
    assert [job.status for job in jobs] == [FAILED, OK]
    assert [line for line in lines if "A" in line] == ["warm-up: A: broken"]


def test_what_was_measured_before_an_interruption_is_kept(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, lambda case: STAND_IN + REST)
    saved: list[Record] = []

    def say(line: str) -> None:
        if line.startswith("run 2 of 2: A"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(
            [Case("A"), Case("B")],
            Settings(runs=2, images=1, warm_up=False),
            tmp_path,
            say,
            lambda jobs: saved.extend(job.record() for job in jobs),
        )
    whole, part = saved
    assert [len(record.runs) for record in saved] == [2, 1] and part.status == OK
    assert "interrupted after 1 of 2 runs" in part.flags and not any("interrupted" in flag for flag in whole.flags)


def test_an_interruption_before_the_first_figure_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(case: Case) -> str:
        raise SystemExit(143)

    use(monkeypatch, stop)
    saved: list[object] = []
    with pytest.raises(SystemExit):
        measure([Case("A")], ONCE, tmp_path, lambda line: None, saved.extend)
    assert not saved


def test_a_program_that_is_not_there_is_a_failed_case(do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "child_command", lambda *args, **kwargs: [str(tmp_path / "absent")])
    monkeypatch.setattr(run_module.models, "provide", lambda case: tmp_path)
    (job,) = measure([Case("A")], ONCE, tmp_path, lambda line: None)
    assert job.status == FAILED and "absent" in str(job.error)


def test_a_model_that_is_not_there_is_a_failed_case(do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case) -> Path:
        raise BenchError("no such model")

    monkeypatch.setattr(run_module.models, "provide", refuse)
    (job,) = measure([Case("A")], Settings(), tmp_path, lambda line: None)
    assert (job.status, job.error, job.runs) == (FAILED, "no such model", [])


@pytest.fixture
def groups() -> None:
    group = make_group(None)
    group.close()
    if not isinstance(group, ControlGroup):
        pytest.skip("no control group may be made here")


@pytest.mark.usefixtures("groups")
def test_a_killed_process_tells_where_it_died(do: Do) -> None:
    hungry = "log.begin('vae_decode')\nfull = b'x' * 200_000_000\n"
    record = do(DRAW + hungry, case=Case("m", memory_limit=100_000_000))
    assert record.status == KILLED
    assert record.error == "killed by its memory limit of 100 MB; it was at: vae_decode"


@pytest.mark.usefixtures("groups")
def test_a_process_that_outlives_the_kill_of_its_child_is_sound(do: Do) -> None:
    """As one that measures graphs for a plan, some of which are too large."""
    child = "import pathlib; pathlib.Path('/proc/self/oom_score_adj').write_text('1000'); full = b'x' * 200_000_000"
    parent = f"import subprocess, sys\nassert subprocess.run([sys.executable, '-c', {child!r}]).returncode == -9\n"
    record = do(parent, case=Case("m", memory_limit=100_000_000))
    assert (record.status, record.error) == (OK, None)


@pytest.mark.usefixtures("groups")
def test_the_curve_finds_the_limit_of_a_process_of_known_size(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, lambda case: f"full = b'x' * 100_000_000{STAND_IN}{REST}")
    (job,) = measure([Case("m")], Settings(runs=1, images=1, warm_up=False), tmp_path, lambda line: None)
    curve = measure_curve(job, Settings(images=1), lambda line: None)
    assert curve.smallest is not None and 100_000_000 < curve.smallest < 130_000_000
    assert {record.status for record in curve.records} == {OK, KILLED}
    assert all(record.runs for record in curve.records if record.status == OK)
