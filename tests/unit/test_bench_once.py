"""Folders that a command makes once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.once import make_once


def made(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def write(part: Path, text: str) -> list[str]:
    code = f"import pathlib; f = pathlib.Path({str(part)!r}); f.mkdir(); (f / 'x').write_text({text!r})"
    return [sys.executable, "-c", code]


def test_a_folder_is_made_once() -> None:
    first = make_once("thing", ["1"], lambda part: write(part, "one"))
    assert make_once("thing", ["1"], lambda part: write(part, "two")) == first
    assert (first / "x").read_text() == "one"


def test_a_failure_names_the_last_error_and_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    def command(part: Path) -> list[str]:
        code = "import sys; print('Error: no disk', file=sys.stderr); sys.exit('for more, see the log')"
        return [*write(part, "half")[:2], write(part, "half")[2] + "; " + code]

    kept = make_once("other", ["1"], lambda part: write(part, "one"))
    with pytest.raises(BenchError, match="^thing can't be made: Error: no disk$"):
        make_once("thing", ["1"], command)
    assert made(kept) == [kept.name]
    assert "see the log" in capfd.readouterr().err


def test_what_a_killed_process_left_is_removed() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    first = make_once("thing", ["1"], lambda part: write(part, "one"))
    (first.parent / f".{first.name}.part-{ended.pid}").mkdir()
    (first / "x").unlink()
    first.rmdir()
    again = make_once("thing", ["1"], lambda part: write(part, "two"))
    assert (again / "x").read_text() == "two" and made(again) == [again.name]


def test_another_key_replaces_and_another_name_stays() -> None:
    other = make_once("thing-else", ["1"], lambda part: write(part, "else"))
    make_once("thing", ["1"], lambda part: write(part, "one"))
    second = make_once("thing", ["2"], lambda part: write(part, "two"))
    assert made(second) == sorted([second.name, other.name])
