"""Which paths a bundle may name, where they may lead, and this user's folders.

Limits: hard links are not told apart from files, and a folder that another process changes during a check is not
guarded against; what is opened afterwards is what was named, not what was hashed.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from pocketdiffusion.bundle.strict_json import short
from pocketdiffusion.errors import BundleUnsafe

MAX_PATH_BYTES = 240

_FORBIDDEN = frozenset('<>:"|?*\\')
_CONTROL = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"]
    + [f"{name}{n}" for name in ("com", "lpt") for n in "0123456789¹²³"]
)


def path_problem(path: str) -> str | None:
    """Why `path` may not stand in a bundle, or None.

    Allowed is what means the same file below the bundle on Linux, macOS and Windows: relative, "/" between parts.
    """
    if any(unicodedata.category(char) in _CONTROL for char in path):
        return "control character"
    if len(path.encode("utf-8")) > MAX_PATH_BYTES:
        return f"longer than {MAX_PATH_BYTES} bytes"
    if bad := _FORBIDDEN.intersection(path):
        return f"character {min(bad)}"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "empty, '.' or '..' part, or absolute"
        if part[-1] in ". " or part[0] == " ":
            return "part that begins with a space or ends with a dot or space"
        if part.split(".")[0].rstrip().casefold() in _RESERVED:
            return f"name {short(part)}, which Windows reserves"
    return None


def folded(path: str) -> str:
    """The same string for paths that are one file on a case-insensitive or normalizing file system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def check_paths(paths: Iterable[str], file: str) -> None:
    """Refuse paths that are unsafe alone or clash with each other. `file` names them. Raises BundleUnsafe."""
    seen: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        if problem := path_problem(path):
            raise BundleUnsafe(file, f"path {short(path)} is refused: {problem}")
        key = folded(path)
        if key in seen:
            raise BundleUnsafe(file, f"path {short(path)} is listed twice (upper and lower case count as the same)")
        seen.add(key)
        parts = key.split("/")
        folders.update("/".join(parts[:n]) for n in range(1, len(parts)))
    if both := seen & folders:
        raise BundleUnsafe(file, f"path {short(min(both))} is both a file and a folder")


def resolve_inside(root: Path, relative: str) -> Path:
    """The real path of a bundle's file. Raises BundleUnsafe when links lead out of the bundle.

    `root` must be real (`Path.resolve`). The one way out that is allowed is the Hugging Face cache's own layout,
    ``models--owner--name/snapshots/<revision>/file -> ../../blobs/<hash>``.
    """
    real = Path(os.path.realpath(root / relative))
    if real.is_relative_to(root):
        return real
    blobs = _cache_blobs(root)
    if blobs is not None and real.is_relative_to(blobs):
        return real
    raise BundleUnsafe(relative, "a link leads out of the bundle")


def _cache_blobs(root: Path) -> Path | None:
    for folder in root.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent / "blobs"
    return None


def cache_dir() -> Path:
    """Where disposable files go: POCKETDIFFUSION_CACHE, else pocketdiffusion in the user's cache folder."""
    if given := os.environ.get("POCKETDIFFUSION_CACHE"):
        return Path(given)
    return _user_folder("XDG_CACHE_HOME", ".cache", "Caches") / "pocketdiffusion"


def models_dir() -> Path:
    """Where the user's own bundles lie: POCKETDIFFUSION_MODELS, else pocketdiffusion/models in their data folder."""
    if given := os.environ.get("POCKETDIFFUSION_MODELS"):
        return Path(given)
    return _user_folder("XDG_DATA_HOME", ".local/share", "Application Support") / "pocketdiffusion" / "models"


def _user_folder(variable: str, unix: str, mac: str) -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if given := os.environ.get(variable):
        return Path(given)
    return Path.home() / ("Library/" + mac if sys.platform == "darwin" else unix)
