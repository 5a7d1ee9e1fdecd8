"""A progress bar on a terminal's stderr; nothing on a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType

WIDTH = 24


class Progress:
    """Use as a context manager; call `advance` after each step."""

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self._label = label
        self._shown = sys.stderr.isatty() and not quiet
        self._start = time.perf_counter()

    def advance(self, done: int, total: int) -> None:
        """Redraw at `done` of `total`."""
        if not self._shown:
            return
        filled = WIDTH * done // total
        seconds = time.perf_counter() - self._start
        left = seconds / done * (total - done)
        bar = "#" * filled + "-" * (WIDTH - filled)
        sys.stderr.write(f"\r{self._label} [{bar}] {done}/{total} {seconds:.1f}s, {left:.1f}s left \033[K")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
