"""The one entry for sources: a Diffusers folder, a single-file checkpoint, or "random:NAME"; with a tiny VAE, or none.

Nothing is fetched from a network and no pickle is ever read. What each kind takes is said in its file of `sources/`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pocketdiffusion_export.families import TINY_VAE
from pocketdiffusion_export.sources import diffusers_folder, random, single_file, tiny_vae
from pocketdiffusion_export.sources.base import Loaded

__all__ = ["Loaded", "load"]


def load(source: str, tiny: str | None = None) -> Loaded:
    """Load a source as float32. Raises ExportError in one line for everything that is wrong with it.

    The pipeline gets a `tiny_vae` where `tiny` names one, or the source's folder has one.
    """
    loaded = _load(source)
    own = Path(source) / TINY_VAE
    where = tiny if tiny is not None else str(own) if own.is_dir() else None
    if where is None:
        return loaded
    model, hashes = tiny_vae.load(where)
    setattr(loaded.pipe, TINY_VAE, model)
    return replace(loaded, sha256=loaded.sha256 | hashes)


def _load(source: str) -> Loaded:
    if source.startswith(random.PREFIX):
        return random.load(source)
    if Path(source).is_file():
        return single_file.load(source)
    return diffusers_folder.load(source)
