"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def replace_file(target: Path, *data: bytes | memoryview) -> None:
    """Write `data`, one part after the other, as `replacing` does. Raises OSError, leaving nothing."""
    with replacing(target) as stream:
        stream.writelines(data)


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file beside `target`, readable too, which is flushed to the disk and takes its place at the scope's end.

    Raises OSError. After an exception in the scope, as after its own, nothing is left of it.
    """
    part = target.with_name(f".{secrets.token_hex(8)}.part")  # short, whatever the length of the target's name
    try:
        with open(part, "x+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
