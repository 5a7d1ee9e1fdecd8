"""Child processes that do for this one what might kill it, or what a fresh process must measure.

A child is this Python, isolated from the environment's settings, with this process's module path. It reads its task as
JSON on stdin, calls the `child` of one module, and answers in lines on stdout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable


def program(module: str) -> str:
    """What a child runs: a module's `child(task)`, where the task's "path" is the module path."""
    return (
        "import json, sys; task = json.loads(sys.stdin.read()); sys.path[:] = task['path']; "
        f"from {module} import child; child(task)"
    )


def possible() -> bool:
    """Whether this is a Python that can start another; a frozen program is none."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def start(code: str) -> subprocess.Popen[bytes]:
    """A child that waits for its task. What it says on stderr is dropped."""
    return subprocess.Popen(
        [sys.executable, "-I", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def answer() -> Callable[[str], None]:
    """In a child: what writes one line of its answer. What engines print from now on is none."""
    channel = os.dup(1)
    os.dup2(2, 1)

    def say(line: str) -> None:
        os.write(channel, f"{' '.join(line.split())}\n".encode())

    return say


def ending(code: int) -> str:
    """How a process ended, for people."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
