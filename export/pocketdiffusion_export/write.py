"""Assembles a bundle beside its destination and puts it in place at the end.

Everything is written into a hidden folder next to the destination, the manifest last, and renamed when it is whole.
An old bundle is exchanged with the new one in a single system call on Linux and macOS; elsewhere, two renames leave a
moment with only the old one under its hidden name. What a killed export left behind is removed by the next one to the
same destination.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketdiffusion_export.errors import ExportError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2


@contextmanager
def assembled(destination: Path) -> Iterator[Path]:
    """A new folder that becomes `destination` when the block ends without an error, and is removed when it fails.

    Folders made on the way to it go as well. Raises ExportError when the destination exists and is not a bundle, so
    that no other folder is ever replaced.
    """
    destination = destination.absolute()
    folder = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    made: list[Path] = []
    try:
        check_replaceable(destination)
        made = [parent for parent in destination.parents if not parent.exists()]
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination)
        folder.mkdir()
    except OSError as error:
        _remove_empty(made)
        raise ExportError(f"can't write beside {destination}: {error.strerror}; choose another destination") from None
    try:
        yield folder
        _flush(folder)
        _put_in_place(folder, destination)
    except OSError as error:
        raise ExportError(f"writing {destination} failed: {error.strerror or error}; nothing was replaced") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(made)


def check_holder(folder: Path) -> None:
    """Raise ExportError unless `folder` can hold several bundles: it is free, or a folder and no bundle itself."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"the destination {folder} is a file; several targets need a folder")
    if (folder / "manifest.json").exists():
        raise ExportError(f"the destination {folder} is a bundle; several targets need a folder to hold one for each")


def check_replaceable(destination: Path) -> None:
    """Raise ExportError unless `destination` is free, an empty folder, or a bundle."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise ExportError(f"the destination {destination} is a file or a link; choose a folder")
    if destination.is_dir() and any(destination.iterdir()) and not (destination / "manifest.json").is_file():
        raise ExportError(f"the destination {destination} holds other files and no bundle; choose an empty folder")


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _put_in_place(folder: Path, destination: Path) -> None:
    if not destination.exists():
        folder.rename(destination)
        return
    if _exchange(folder, destination):
        return
    old = folder.with_name(folder.name.replace(".partial-", ".old-"))
    destination.rename(old)
    folder.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically; False where the system or the file system can't."""
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None), "renameat2", None)
        return call is not None and call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0
    if sys.platform == "darwin":
        return bool(ctypes.CDLL(None).renamex_np(*paths, _RENAME_SWAP) == 0)
    return False


def _remove_leftovers(destination: Path) -> None:
    """Folders of exports that no longer run. An old bundle that lost its place comes back first."""
    for old in destination.parent.glob(f".{destination.name}.old-*"):
        if not destination.exists() and not _runs(old):
            old.rename(destination)
    for kind in ("partial", "old"):
        for left in destination.parent.glob(f".{destination.name}.{kind}-*"):
            if not _runs(left):
                shutil.rmtree(left, ignore_errors=True)


def _runs(folder: Path) -> bool:
    """Whether the process that a hidden folder is named after is alive; where that can't be told, it counts as so."""
    number = folder.name.rpartition("-")[2]
    if os.name != "posix" or not number.isdecimal():
        return True
    if int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush(folder: Path) -> None:
    """Bring every file to the disk, so that a power cut after the rename finds them whole."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
