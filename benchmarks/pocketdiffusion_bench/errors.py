"""What goes wrong in a benchmark and is the user's to mend."""

from __future__ import annotations

from pocketdiffusion.errors import PocketDiffusionError


class BenchError(PocketDiffusionError):
    """A measurement that can't be made or used. One line: what was asked, what was found, what to do next."""
