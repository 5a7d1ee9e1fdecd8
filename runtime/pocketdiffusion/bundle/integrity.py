"""Reading a bundle's files safely, hashing them, and remembering what was verified.

The memory is one small JSON file per bundle in the user's cache. It holds size, modification time, change time, inode
and device of each file; any difference means hashing again. A record that is missing, damaged or can't be written only
costs time. Limit: who can set back a file's change time, or write the cache, defeats it, but not `Bundle.verify_all`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path

from pocketdiffusion.atomic import replace_file
from pocketdiffusion.bundle.manifest import FileEntry, Manifest
from pocketdiffusion.bundle.manifest_json import MANIFEST, dump_manifest
from pocketdiffusion.bundle.paths import check_paths, resolve_inside
from pocketdiffusion.errors import BundleCorrupt, BundleUnsafe

RULES = 1
"""Raised whenever a check becomes stricter: older records then no longer count."""

_CHUNK = 1 << 20
_SETTLED_NS = 100_000_000

Marks = dict[str, list[int]]
"""Path -> what shows that a file is still the same."""


def open_file(root: Path, relative: str) -> FileIO:
    """A bundle's file, opened for reading. `root` must be real. Raises BundleCorrupt, BundleUnsafe.

    Only regular files are opened; a pipe or device put in their place can neither block nor be read.
    """
    real = resolve_inside(root, relative)
    _marks(real, relative)
    flags = os.O_RDONLY
    for name in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    try:
        stream = FileIO(os.open(real, flags), "rb")
    except OSError as error:
        raise BundleCorrupt(relative, f"can't be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise BundleUnsafe(relative, "not a regular file")
    return stream


def read_file(root: Path, relative: str, limit: int) -> bytes:
    """The bytes of a small file. Raises BundleCorrupt (also when it is larger than `limit`), BundleUnsafe."""
    with open_file(root, relative) as stream:
        if os.fstat(stream.fileno()).st_size > limit:
            raise BundleCorrupt(relative, f"larger than {limit} bytes")
        try:
            return stream.readall()
        except OSError as error:
            raise BundleCorrupt(relative, f"can't be read: {error.strerror}") from None


def file_size(root: Path, relative: str) -> int:
    """Bytes of a regular file inside the bundle. Raises BundleCorrupt, BundleUnsafe."""
    return _marks(resolve_inside(root, relative), relative)[0]


def marks(root: Path, files: Iterable[FileEntry]) -> Marks:
    """The marks of all files, after comparing their sizes. Raises BundleCorrupt, BundleUnsafe."""
    found = {}
    for entry in files:
        found[entry.path] = _marks(resolve_inside(root, entry.path), entry.path)
        if found[entry.path][0] != entry.size:
            raise BundleCorrupt(entry.path, f"{found[entry.path][0]} bytes, the manifest says {entry.size}")
    return found


def _marks(real: Path, relative: str) -> list[int]:
    try:
        found = os.lstat(real)
    except FileNotFoundError:
        raise BundleCorrupt(relative, "is missing; fetch or export the bundle again") from None
    except OSError as error:
        raise BundleCorrupt(relative, f"can't be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise BundleUnsafe(relative, "not a regular file")
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def check_hashes(root: Path, files: Iterable[FileEntry]) -> None:
    """Hash every file, several at a time, and compare. Raises BundleCorrupt, BundleUnsafe."""
    from concurrent.futures import ThreadPoolExecutor

    entries = list(files)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for entry, found in zip(entries, pool.map(lambda entry: _hash(root, entry.path), entries), strict=True):
            if found != entry.sha256:
                raise BundleCorrupt(
                    entry.path, f"sha256 is {found[:12]}..., the manifest says {entry.sha256[:12]}...; fetch it again"
                )


def _hash(root: Path, relative: str) -> str:
    digest = hashlib.sha256()
    with open_file(root, relative) as stream:
        try:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise BundleCorrupt(relative, f"can't be read: {error.strerror}") from None
    return digest.hexdigest()


class Records:
    """What was verified before, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "verified"

    def holds(self, root: Path, digest: str, found: Marks) -> bool:
        """Whether exactly these files passed every check before."""
        try:
            recorded = json.loads(self._file(root, digest).read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return bool(recorded == _record(root, digest, found))

    def add(self, root: Path, digest: str, found: Marks) -> None:
        """Remember it, unless a file changed in the last 0.1 s: another write in the same clock tick leaves no mark."""
        newest = max((max(values[1:3]) for values in found.values()), default=0)
        if time.time_ns() - newest < _SETTLED_NS:
            return
        target = self._file(root, digest)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, json.dumps(_record(root, digest, found)).encode())
        except OSError:
            return  # a read-only or full cache costs time, not correctness

    def _file(self, root: Path, digest: str) -> Path:
        key = hashlib.sha256(digest.encode() + os.fsencode(root)).hexdigest()
        return self._folder / f"{key}.json"


def _record(root: Path, digest: str, found: Marks) -> Mapping[str, object]:
    return {"rules": RULES, "digest": digest, "path": str(root), "files": found}


def file_entries(folder: str | Path) -> tuple[FileEntry, ...]:
    """Size and sha256 of every file below `folder` but its manifest.json, sorted by path.

    For writers of bundles. Raises BundleUnsafe for links, pipes, devices and names that not every system has.
    """
    root = Path(folder).resolve()
    paths = []
    for parent, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise BundleUnsafe(path, "not a regular file or folder; a bundle is written with real copies")
        paths += [Path(parent, name).relative_to(root).as_posix() for name in names]
    paths = sorted(path for path in paths if path != MANIFEST)
    check_paths(paths, str(folder))
    return tuple(FileEntry(path, (root / path).stat().st_size, _hash(root, path)) for path in paths)


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file of a bundle, by rename. Raises BundleCorrupt, BundleUnsafe, OSError."""
    data = dump_manifest(manifest)
    replace_file(Path(folder) / MANIFEST, data)
    if hasattr(os, "O_DIRECTORY"):  # a rename lasts once its folder is flushed; Windows has no such call
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)
