"""Hard memory limits: real control groups where they can be made, and trees of plain files that look like others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocketdiffusion_bench import limit
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.limit import ControlGroup, DataLimit, forgotten, make_group, parents
from pocketdiffusion_bench.process import run_process

MB = 10**6
linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")


def allocating(megabytes: int) -> list[str]:
    return [sys.executable, "-c", f"import time; time.sleep(.1); b = b'x' * {megabytes * MB}; time.sleep(.1)"]


@linux
def test_a_process_over_its_limit_is_killed_and_one_below_is_not() -> None:
    group = make_group(None)
    group.close()
    if not isinstance(group, ControlGroup):
        pytest.skip("no control group may be made here")
    over, below = run_process(allocating(200), limit=100 * MB), run_process(allocating(50), limit=100 * MB)
    assert over.killed and over.code == -9
    assert not below.killed and below.code == 0
    assert below.memory.cgroup is not None and 50 * MB < below.memory.cgroup <= 100 * MB
    assert over.note is None
    assert not list(group.folder.parent.glob(f"pocketdiffusion-bench-{os.getpid()}-*"))


@linux
def test_without_control_groups_the_limit_is_another_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "parents", lambda: iter(()))
    over, below = run_process(allocating(300), limit=150 * MB), run_process(allocating(20), limit=150 * MB)
    assert over.code == 1 and over.message == "MemoryError" and not over.killed
    assert below.code == 0 and below.memory.cgroup is None
    assert "RLIMIT_DATA" in (over.note or "") and (below.note or "").count("\n") == 0


def test_elsewhere_a_limit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "parents", lambda: iter(()))
    monkeypatch.setattr(limit.sys, "platform", "darwin")
    assert isinstance(make_group(None), DataLimit)
    with pytest.raises(BenchError, match="needs Linux"):
        make_group(MB)


def tree(tmp_path: Path, own: str, mount: str) -> Path:
    """A stand-in for /proc/self."""
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(own)
    (proc / "mountinfo").write_text(f"20 1 0:1 / /proc rw - proc proc rw\n{mount}\n")
    return proc


def second(folder: Path, *, control: str, processes: str) -> None:
    """The files of a version 2 group."""
    folder.mkdir(parents=True)
    (folder / "cgroup.controllers").write_text("cpu memory\n")
    (folder / "cgroup.subtree_control").write_text(control)
    (folder / "cgroup.procs").write_text(processes)


def test_a_version_1_group_is_found_below_its_mount(tmp_path: Path) -> None:
    (tmp_path / "memory/a/b").mkdir(parents=True)
    mount = f"30 1 0:2 / {tmp_path}/memory rw - cgroup cgroup rw,memory"
    proc = tree(tmp_path, "5:cpu:/x\n4:memory:/a/b\n0::/\n", mount)
    assert list(parents(proc)) == [(1, tmp_path / "memory/a/b")]


def test_in_a_container_the_mounted_part_of_the_tree_is_taken(tmp_path: Path) -> None:
    second(tmp_path / "cgroup", control="memory", processes="")
    mount = f"30 1 0:2 /docker/12 {tmp_path}/cgroup rw - cgroup2 cgroup rw,nsdelegate"
    proc = tree(tmp_path, "0::/docker/12\n", mount)
    assert list(parents(proc)) == [(2, tmp_path / "cgroup")]


def test_a_lone_process_steps_aside_so_that_its_group_can_share_out_memory(tmp_path: Path) -> None:
    folder = tmp_path / "cgroup/scope"
    second(folder, control="", processes=f"{os.getpid()}\n")
    (folder / "pocketdiffusion-bench").mkdir()
    proc = tree(tmp_path, "0::/scope\n", f"30 1 0:2 / {tmp_path}/cgroup rw - cgroup2 cgroup rw")
    assert list(parents(proc, change=False)) == [(2, folder)]
    assert (folder / "cgroup.subtree_control").read_text() == ""
    assert list(parents(proc)) == [(2, folder)]
    assert (folder / "cgroup.subtree_control").read_text() == "+memory"
    assert (folder / "pocketdiffusion-bench/cgroup.procs").read_text() == str(os.getpid())


def test_no_process_of_others_is_moved(tmp_path: Path) -> None:
    folder = tmp_path / "cgroup/scope"
    second(folder, control="", processes=f"{os.getpid()}\n1\n")
    proc = tree(tmp_path, "0::/scope\n", f"30 1 0:2 / {tmp_path}/cgroup rw - cgroup2 cgroup rw")
    assert [found for found in parents(proc)] and not (folder / "pocketdiffusion-bench").exists()


def test_a_system_without_control_groups_has_none(tmp_path: Path) -> None:
    assert list(parents(tmp_path / "absent")) == []


@linux
def test_version_2_limits_memory_and_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files appear with the folder, as the kernel's do."""

    def make(folder: Path) -> None:
        os.mkdir(folder)
        for name in ("memory.max", "memory.swap.max", "cgroup.procs"):
            (folder / name).write_text("max")
        (folder / "memory.events").write_text("low 0\noom 2\noom_kill 1\noom_group_kill 0\n")
        (folder / "memory.peak").write_text("12345\n")

    monkeypatch.setattr(Path, "mkdir", make)
    group = ControlGroup(tmp_path / "group", 64 * MB, version=2)
    assert (group.folder / "memory.max").read_text() == "64000000"
    assert (group.folder / "memory.swap.max").read_text() == "0"
    done = subprocess.run(group.command(["/bin/sh", "-c", "echo $$ done"]), capture_output=True, text=True, check=True)
    assert done.stdout == f"{(group.folder / 'cgroup.procs').read_text().strip()} done\n"
    assert group.killed() and group.peak() == 12345


def test_a_group_without_a_memory_controller_is_not_taken_and_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no memory controller"):
        ControlGroup(tmp_path / "group", MB, version=2)
    assert not (tmp_path / "group").exists()


def test_forgetting_files_harms_none(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/model.onnx").write_bytes(b"weights")
    with forgotten(tmp_path):
        assert (tmp_path / "unet/model.onnx").read_bytes() == b"weights"
    assert (tmp_path / "unet/model.onnx").read_bytes() == b"weights"
