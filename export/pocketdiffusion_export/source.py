"""The one entry for sources: a Diffusers folder, a single-file checkpoint, or "random:NAME".

Nothing is fetched from a network and no pickle is ever read. What each kind takes is said in its file of `sources/`.
"""

from __future__ import annotations

from pathlib import Path

from pocketdiffusion_export.sources import diffusers_folder, random, single_file
from pocketdiffusion_export.sources.base import Loaded

__all__ = ["Loaded", "load"]


def load(source: str) -> Loaded:
    """Load a source as float32. Raises ExportError in one line for everything that is wrong with it."""
    if source.startswith(random.PREFIX):
        return random.load(source)
    if Path(source).is_file():
        return single_file.load(source)
    return diffusers_folder.load(source)
