"""The export stage's one error class."""

from __future__ import annotations

from pocketdiffusion.errors import PocketDiffusionError


class ExportError(PocketDiffusionError):
    """An export that can't be done, or whose result missed its threshold. The message is one line."""
