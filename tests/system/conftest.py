"""Tests of the whole program as its users run it: fresh processes, the embedded model, real engines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `pocketdiffusion WORDS` in an own home and working directory; `before` goes in front of the command."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("POCKETDIFFUSION", "XDG", "ORT_"))}
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("runtime", "export"))
    environment = {**kept, "HOME": str(home), "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*words: str, before: tuple[str, ...] = (), code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [*before, sys.executable, "-m", "pocketdiffusion", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
        assert done.returncode == code, done.stderr
        return done

    return run
