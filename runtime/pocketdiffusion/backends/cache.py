"""Compiled graphs of engines on disk, for backends that can export and import them.

One file an entry: a page that says what it holds and the sha256 of it all, then the engine's bytes, which are mapped
and not read, and hashed once: what was found whole is remembered with the file's size, times and number, as files of
bundles are. An entry counts only if everything in its key is the same: the graph's exact contents, engine, device,
settings, processor. One that is damaged, cut short, or not this user's alone is as good as none, and is written anew.
Nothing here raises for a folder that is read-only, full or missing: such a cache costs time, not correctness. Several
processes may use it at once.

An engine takes such a file almost like a program. The folder is its owner's only, and where the system has owners,
files of others or writable by others are not opened. The sha256 shows damage; it is no seal against who can write as
the user.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import mmap
import os
import platform
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pocketdiffusion.atomic import replacing
from pocketdiffusion.bundle.integrity import Marks, Records
from pocketdiffusion.bundle.paths import cache_dir
from pocketdiffusion.errors import InvalidRequest

LIMIT = "POCKETDIFFUSION_CACHE_LIMIT"
"""The environment variable that bounds the cache: megabytes, 0 for no cache."""
DEFAULT_LIMIT_MB = 4096

_RULES = 1
"""Raised when the form of an entry changes."""
_PAGE = 4096
"""Bytes before the engine's own, which start on a page of memory."""
_CHUNK = 1 << 20
_PASSING = 0.02
"""Seconds in which an engine reads some 10 MB."""
_SUFFIX = ".engine"
_WHOLE: dict[Path, Marks] = {}
"""Entries that this process found whole -> the marks of their files then. Parts of a graph are opened in every step: to
hash them every time takes as long as to import them. `Records` tell it other processes."""
_Key = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One compiled graph."""

    graph: str
    """What the key calls it, for people."""
    engine: str
    device: str
    size: int
    """Bytes on disk."""
    used: float
    """Seconds since the epoch: when it was last written or opened."""
    path: Path


@dataclass(frozen=True, slots=True)
class Found:
    """An entry's contents, checked."""

    facts: Mapping[str, Any]
    """What was stored beside the engine's bytes."""
    data: memoryview
    """The engine's bytes, mapped from the file for as long as something refers to them."""
    path: Path

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A scope in which an engine makes copies of the bytes: what it has read leaves this process's memory soon.

        Otherwise all of it would be there beside the copies: at the peak 2,114 MB for Stable Diffusion 1.5's denoiser
        in w8a8, and not 1,168. Read again it comes again: the system keeps it, if it has room. The engine must not
        write to the bytes.
        """
        done = threading.Event()

        def unload() -> None:
            while not done.wait(_PASSING):
                self._unload()

        thread = threading.Thread(target=unload, name=f"unload {self.path.name}")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._unload()

    def _unload(self) -> None:
        if sys.platform == "linux":  # elsewhere the call means something else
            cast(mmap.mmap, self.data.obj).madvise(mmap.MADV_DONTNEED)


def limit_bytes() -> int:
    """What the cache may hold. Raises InvalidRequest where the environment says no whole number of megabytes."""
    said = os.environ.get(LIMIT, str(DEFAULT_LIMIT_MB))
    if not said.isascii() or not said.isdigit():
        raise InvalidRequest("cache", f"{LIMIT} is '{said[:40]}'; give whole megabytes, e.g. 2000, or 0 for no cache")
    return int(said) * 1_000_000


class EngineCache:
    """The entries in `folder`/engines, by default of the user's cache folder."""

    def __init__(self, folder: Path | None = None, *, limit: int | None = None) -> None:
        """`limit` in bytes; by default the environment's. Raises as `limit_bytes`."""
        self.folder = (cache_dir() if folder is None else folder) / "engines"
        self._limit = limit_bytes() if limit is None else limit
        self._records = Records(self.folder.parent)

    def load(self, key: _Key) -> Found | None:
        """What was stored under exactly this key and is whole; marks it as used."""
        if not self._limit or not _private(self.folder):
            return None
        path = self._file(key)
        try:
            mapped, marks = _map(path)
            hashed = _WHOLE.get(path) == marks or self._records.holds(path, path.stem, marks)
            found = _checked(mapped, key, path, hashed=hashed)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if not hashed:
            self._records.add(path, path.stem, marks)
        _WHOLE[path] = marks
        with suppress(OSError):
            os.utime(path, ns=(time.time_ns(), marks[path.name][1]))
        return found

    def store(self, key: _Key, facts: Mapping[str, Any], export: Callable[[io.BytesIO], object]) -> Path | None:
        """Keep an engine's bytes, and drop what was not used for longest where the limit wants it. Returns the file.

        `export` writes them to a stream, which holds none of them. Not kept is what is larger than the limit, or than
        half of what is free on the disk.
        """
        with suppress(OSError):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            room = min(self._limit, shutil.disk_usage(self.folder).free // 2)
            if not _private(self.folder) or room <= _PAGE:
                return None
            with replacing(self._file(key)) as file:
                written = _Written(file, room)
                export(written)
                written.finish(key, facts)
            self._prune()
            return self._file(key)
        return None

    def drop(self, key: _Key) -> None:
        """Forget an entry that the engine refuses."""
        with suppress(OSError):
            self._file(key).unlink()

    def entries(self) -> list[Entry]:
        """All entries that can be read, the last used first; their contents are not checked."""
        found = [entry for path in self._files() if (entry := _described(path)) is not None]
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Delete all entries, and what an interrupted writer left. Returns the bytes that this freed."""
        freed = 0
        for path in (*self._files(), *self.folder.glob(".*.part")):
            with suppress(OSError):  # on Windows one that is in use stays
                size = path.stat().st_size
                path.unlink()
                freed += size
        return freed

    def _prune(self) -> None:
        files = []
        for path in (*self._files(), *self.folder.glob(".*.part")):
            with suppress(OSError):
                found = path.stat()
                files.append((_used(found), found.st_size, path))
        held = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if held <= self._limit:
                return
            with suppress(OSError):
                path.unlink()
                held -= size

    def _files(self) -> list[Path]:
        return list(self.folder.glob(f"*{_SUFFIX}"))

    def _file(self, key: _Key) -> Path:
        return self.folder / f"{hashlib.sha256(_json(key)).hexdigest()}{_SUFFIX}"


@functools.cache
def processor() -> str:
    """What of this machine's processor compiled code depends on: its kind and, where Linux tells, its features."""
    features = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        named = (line for line in lines if line.startswith(("flags", "Features")))
        features = " ".join(sorted(next(named, "").partition(":")[2].split()))
    return f"{platform.system()} {platform.machine()} {hashlib.sha256(features.encode()).hexdigest()[:16]}"


class _Written(io.BytesIO):
    """What an engine exports to: a file, behind a page that is left free for `finish`.

    OpenVINO asks for this type; it writes, and goes back to what it wrote.
    """

    def __init__(self, file: BinaryIO, room: int) -> None:
        """`room`: bytes that the file may have. It must be readable too."""
        super().__init__()
        self._file, self._room, self._error = file, room, ""
        file.seek(_PAGE)

    def write(self, data: Any, /) -> int:
        """Write to the file. Raises nothing, since that would pass through the engine: `finish` tells of errors."""
        size = memoryview(data).nbytes
        if self._file.tell() + size > self._room:
            self._error = "too large to keep"
        if not self._error:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = str(error)
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As of any stream."""
        return self._file.seek(offset + (_PAGE if whence == os.SEEK_SET else 0), whence) - _PAGE

    def tell(self) -> int:
        """As of any stream."""
        return self._file.tell() - _PAGE

    def finish(self, key: _Key, facts: Mapping[str, Any]) -> None:
        """Write the page. Raises OSError where something did not fit."""
        if self._error:
            raise OSError(self._error)
        size = self._file.seek(0, os.SEEK_END) - _PAGE
        about = {"rules": _RULES, "key": key, "facts": facts, "size": size}
        digest = hashlib.sha256(_json(about))
        self._file.seek(_PAGE)
        while chunk := self._file.read(_CHUNK):
            digest.update(chunk)
        line = _json({"about": about, "sha256": digest.hexdigest()})
        if len(line) >= _PAGE:
            raise OSError("too much to say about an entry")
        self._file.seek(0)
        self._file.write(line.ljust(_PAGE))


def _checked(mapped: memoryview, key: _Key, path: Path, *, hashed: bool) -> Found:
    """Raises ValueError, KeyError or TypeError for what is not whole (unless it was hashed) or not under this key."""
    head = json.loads(bytes(mapped[:_PAGE]))
    about, data = head["about"], mapped[_PAGE:]
    same = about["rules"] == _RULES and _json(about["key"]) == _json(key) and about["size"] == len(data)
    if not same or (not hashed and _digest(about, data) != head["sha256"]):
        raise ValueError("not this entry, or damaged")
    return Found(about["facts"], data, path)


def _digest(about: Mapping[str, Any], data: bytes | memoryview) -> str:
    digest = hashlib.sha256(_json(about))
    digest.update(data)
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _map(path: Path) -> tuple[memoryview, Marks]:
    """Bytes and marks of a file. Raises OSError unless it is this user's regular file, ValueError if empty."""
    flags = os.O_RDONLY
    for name in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or not _own(found):
            raise OSError(f"{path} is not this user's own file")
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)  # engines want it writable
        return memoryview(mapped), {path.name: _marks(found)}
    finally:
        os.close(descriptor)


def _marks(found: os.stat_result) -> list[int]:
    """As `integrity.marks`, with 0 for the time of a file's last change of status, which every use sets."""
    return [found.st_size, found.st_mtime_ns, 0, found.st_ino, found.st_dev]


def _used(found: os.stat_result) -> float:
    """When an entry was last written or opened, in seconds since the epoch."""
    return max(found.st_atime, found.st_mtime)


def _private(folder: Path) -> bool:
    """Whether a folder is there and only its owner, who runs this, can write to it."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and _own(found)


def _own(found: os.stat_result) -> bool:
    if sys.platform == "win32":
        return True  # what lies in a user's own folder there is theirs
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _described(path: Path) -> Entry | None:
    graph, engine, device = "damaged", "", ""
    try:
        found = path.stat()
        with path.open("rb") as stream:
            key = json.loads(stream.read(_PAGE))["about"]["key"]
        graph, engine, device = (str(key.get(name, "")) for name in ("graph", "engine", "device"))
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # listed, so that clearing it surprises nobody
    return Entry(graph, engine, device, size=found.st_size, used=_used(found), path=path)
