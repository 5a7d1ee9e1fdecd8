"""The local cache of the Hugging Face hub, read only: nothing is ever downloaded.

Layout: ``models--owner--name/{refs/main, snapshots/<revision>/…}``, where files are links into ``blobs``. The folder is
HF_HUB_CACHE, else ``hub`` in HF_HOME, else ``huggingface/hub`` in XDG_CACHE_HOME or ``~/.cache``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pocketdiffusion.errors import BundleNotFound

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def hub_cache() -> Path:
    """Where downloads of the hub's own tools lie."""
    if given := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given)
    if given := os.environ.get("HF_HOME"):
        return Path(given) / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface" / "hub"


def is_repository(text: str) -> bool:
    """Whether a text has the form "owner/name"."""
    return _REPOSITORY.fullmatch(text) is not None


def find_repository(name: str) -> Path:
    """The newest local snapshot of "owner/name". Raises BundleNotFound."""
    cache = hub_cache()
    folder = cache / f"models--{name.replace('/', '--')}"
    if not folder.is_dir():
        raise BundleNotFound(
            f"no folder {name}, and no such model in the Hugging Face cache {cache}; nothing is downloaded here: "
            f"`hf download {name}` does it, or give a folder's path"
        )
    return snapshot(folder)


def snapshot(folder: Path) -> Path:
    """The snapshot of a ``models--…`` folder that "main" names, else its only one; other folders as they are.

    Raises BundleNotFound.
    """
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return folder
    there = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    revision = _main(folder)
    if revision not in there and len(there) != 1:
        raise BundleNotFound(
            f"{folder} has no snapshot of 'main'; give the path of one of: {', '.join(there) or 'none'}"
        )
    return folder / "snapshots" / (revision if revision in there else there[0])


def _main(folder: Path) -> str:
    try:
        text = (folder / "refs" / "main").read_bytes()[:100].decode("ascii", "replace").strip()
    except OSError:
        return ""
    return text if _REVISION.fullmatch(text) else ""
