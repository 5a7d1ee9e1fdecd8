"""The one entry for sources: a Diffusers folder, a single-file checkpoint, "random:NAME", or "hub:OWNER/NAME".

Each with a tiny VAE, or none. Only the last uses a network, and no pickle is ever read. What each kind takes is said in
its file of `sources/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketdiffusion_export.families import TINY_VAE
from pocketdiffusion_export.sources import diffusers_folder, hub, random, single_file, tiny_vae
from pocketdiffusion_export.sources.base import Loaded
from pocketdiffusion_export.sources.scheduler import rescheduled

__all__ = ["Loaded", "load"]

_NOTHING: Mapping[str, Any] = {}


def load(
    source: str,
    tiny: str | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    scheduler: Mapping[str, Any] = _NOTHING,
) -> Loaded:
    """Load a source as float32. Raises ExportError in one line for everything that is wrong with it.

    The pipeline gets a `tiny_vae` where `tiny` names one, or the source's folder has one. `say` gets a line before each
    long download. Settings of the scheduler win over what the source says.
    """
    loaded = _load(source, say, scheduler)
    if scheduler:
        loaded = rescheduled(loaded, scheduler)
    own = Path(source) / TINY_VAE
    where = tiny if tiny is not None else str(own) if own.is_dir() else None
    if where is None:
        return loaded
    model, hashes = tiny_vae.load(where)
    setattr(loaded.pipe, TINY_VAE, model)
    return replace(loaded, sha256=loaded.sha256 | hashes)


def _load(source: str, say: Callable[[str], None], scheduler: Mapping[str, Any]) -> Loaded:
    if source.startswith(random.PREFIX):
        return random.load(source)
    if source.startswith(hub.PREFIX):
        place, origin = hub.download(source, say)
        return replace(_local(place, scheduler), origin=origin)
    return _local(Path(source), scheduler)


def _local(path: Path, scheduler: Mapping[str, Any]) -> Loaded:
    if path.is_file():
        return single_file.load(path, scheduler.get("prediction_type"))
    return diffusers_folder.load(path)
