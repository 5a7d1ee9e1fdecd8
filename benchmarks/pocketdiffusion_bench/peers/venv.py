"""A peer's own virtual environment: looked for always, made only on request, because that needs a network.

It lies in the cache folder, below "bench/peers", named after its requirements and the Python that made it. A file that
is written last says that it is whole; a folder without it is made anew. Limit: two processes must not set up the same
environment at the same time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketdiffusion.atomic import replace_file
from pocketdiffusion.bundle.paths import cache_dir
from pocketdiffusion_bench.errors import BenchError

Say = Callable[[str], None]

READY = "ready.json"
VENV = ("-m", "venv")
PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet")


class PeerUnavailable(BenchError):
    """A peer's environment is not here, or can't be made."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed for a peer."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    """Requirements of one `pip install` after another, in this order."""

    @property
    def folder(self) -> Path:
        """Where it lies, made or not."""
        facts = json.dumps([self.installs, sys.version_info[:2], sys.platform])
        return cache_dir() / "bench" / "peers" / f"{self.name}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"

    @property
    def interpreter(self) -> Path:
        """Its Python, made or not."""
        return self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    def python(self) -> Path:
        """Its Python. Raises PeerUnavailable with the way to make it."""
        if not (self.folder / READY).is_file():
            raise PeerUnavailable(f"{self.name} is not set up here; run the command with --set-up-peers, once")
        return self.interpreter

    def set_up(self, say: Say) -> None:
        """Make it, unless it is whole already; pip downloads what is not on this machine.

        Raises PeerUnavailable with pip's last line; then nothing is kept.
        """
        if (self.folder / READY).is_file():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"setting up {self.name} in {self.folder}")
        try:
            self._run([sys.executable, *VENV, str(self.folder)])
            for requirements in self.installs:
                say(f"installing {', '.join(requirements)}")
                self._run([str(self.interpreter), *PIP, *requirements])
            replace_file(self.folder / READY, json.dumps({"installs": self.installs}).encode())
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _run(self, command: Sequence[str]) -> None:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if ended.returncode != 0:
            raise PeerUnavailable(f"{self.name} can't be installed: {reason(ended.stdout)}")


def reason(output: str) -> str:
    """The line of a failed pip that says most: its last error, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("WARNING")]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no message"])[-1]
