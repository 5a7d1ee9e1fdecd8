"""Assembling a bundle: atomic, and harmless to what it replaces. Needs no torch."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocketdiffusion_export import write
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.write import assembled

WRITER = """
import sys, time
from pathlib import Path
from pocketdiffusion_export.write import assembled
for version in range(1, 10**6):
    with assembled(Path(sys.argv[1])) as folder:
        for index in range(6):
            (folder / f"{index}").write_text(str(version))
            if version == 1: print(flush=True)
        (folder / "manifest.json").write_text(str(version))
"""


def fill(folder: Path, text: str) -> None:
    for name in ("unet.onnx", "manifest.json"):
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture(params=["exchange", "two renames"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(write, "_exchange", lambda one, other: False)


def test_a_new_bundle_replaces_the_old_one(how: None, tmp_path: Path) -> None:
    for version in ("one", "two"):
        with assembled(tmp_path / "deep/bundle") as folder:
            fill(folder, version)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["bundle"]
    assert (tmp_path / "deep/bundle/unet.onnx").read_text(encoding="utf-8") == "two"


def test_an_error_leaves_the_old_bundle(how: None, tmp_path: Path) -> None:
    with assembled(tmp_path / "bundle") as folder:
        fill(folder, "old")
    with pytest.raises(ZeroDivisionError), assembled(tmp_path / "bundle") as folder:
        fill(folder, "new")
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle/unet.onnx").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_only_bundles_are_replaced(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "precious"
    if kind == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("words", encoding="utf-8")
    elif kind == "file":
        place.write_text("words", encoding="utf-8")
    else:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="choose"), assembled(place):
        pass
    assert place.exists() and not list(tmp_path.glob(".precious*"))


def test_a_failure_leaves_no_folder_that_was_made_on_the_way(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), assembled(tmp_path / "deep/deeper/bundle"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words", encoding="utf-8")
    message = "can't write beside .*; choose another destination"
    with pytest.raises(ExportError, match=message), assembled(tmp_path / "file/bundle"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions, which root does not have")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_place_without_permission_is_one_line(mode: int, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=mode)
    with pytest.raises(ExportError, match="can't write beside"), assembled(tmp_path / "locked/bundle"):
        pass
    (tmp_path / "locked").chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and process ids")
def test_killed_at_any_moment_a_bundle_is_whole_or_absent(tmp_path: Path) -> None:
    bundle, chance = tmp_path / "bundle", random.Random(0)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(bundle)], stdout=subprocess.PIPE, env=environment()
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if bundle.exists():
            assert len({file.read_text(encoding="utf-8") for file in bundle.iterdir()}) == 1
            assert len(list(bundle.iterdir())) == 7
    with assembled(bundle) as folder:
        fill(folder, "last")
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.skipif(os.name != "posix", reason="process ids can be tested there only")
def test_an_old_bundle_that_lost_its_place_comes_back(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lost = tmp_path / f".bundle.old-{ended.pid}"
    lost.mkdir()
    fill(lost, "old")
    with pytest.raises(ZeroDivisionError), assembled(tmp_path / "bundle"):
        raise ZeroDivisionError
    assert (tmp_path / "bundle/unet.onnx").read_text(encoding="utf-8") == "old"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
