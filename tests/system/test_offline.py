"""No network, ever; no file but the output and the cache.

Measured by the kernel, because a guard in Python can't see what engines do.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses strace and unshare")
ENGINES = [("onnxruntime", "onnxruntime:cpu"), ("openvino", "openvino:cpu")]
WRITES = re.compile(r'(?:openat|open|creat|mkdir|mkdirat)\((?:AT_FDCWD, )?"([^"]+)".*?\) = \d')


def traced(run: Run, trace: Path, *words: str) -> list[str]:
    run(*words, before=("strace", "-f", "-s", "300", "-e", "trace=network,%file", "-o", str(trace)))
    return trace.read_text(errors="replace").splitlines()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(("engine", "device"), ENGINES)
def test_a_trace_shows_no_socket_and_no_stray_file(run: Run, tmp_path: Path, engine: str, device: str) -> None:
    pytest.importorskip(engine)
    trace = tmp_path.parent / f"{tmp_path.name}.trace"
    lines = traced(run, trace, "generate", "a cat", "--seed", "1", "--steps", "3", "-o", "out.png", "--device", device)
    sockets = [line for line in lines if re.search(r"\b(socket|connect|sendto|sendmsg|bind)\(", line)]
    assert not [line for line in sockets if "AF_UNIX" not in line]
    writes = [line for line in lines if re.search(r"O_CREAT|O_WRONLY|O_RDWR|\bmkdir|\bcreat\(", line)]
    made = {Path(tmp_path, found[1]) for line in writes if (found := WRITES.search(line))}
    outside = {path for path in made if not str(path).startswith((str(tmp_path), "/dev/", "/proc/"))}
    assert not outside
    strays = {path.name for path in tmp_path.iterdir()} - {"out.png", "home"}
    assert not strays
    inside_home = {str(path.relative_to(tmp_path / "home")) for path in (tmp_path / "home").glob("*/*")}
    assert inside_home == {".cache/pocketdiffusion"}


def test_the_trace_would_show_a_socket(tmp_path: Path) -> None:
    """The control: the same check fails for a program that opens one."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
    subprocess.run(["strace", "-f", "-e", "trace=network", "-o", trace, sys.executable, "-c", code], check=True)
    assert "socket(AF_INET" in trace.read_text()


def test_works_without_a_network_interface(run: Run, tmp_path: Path) -> None:
    unshare = ("unshare", "-rn")
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("unshare -rn is not allowed here")
    pytest.importorskip("onnxruntime")
    for command in (["devices"], ["models"], ["inspect", "sticker"], ["verify", "sticker"]):
        run(*command, before=unshare)
    run("generate", "a cat", "--seed", "1", "-o", "out.png", before=unshare)
    assert (tmp_path / "out.png").exists()
