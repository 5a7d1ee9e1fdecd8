"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def replace_file(target: Path, *data: bytes | memoryview) -> None:
    """Write `data`, one part after the other, beside `target`, flush it to the disk and rename it into place.

    Raises OSError, leaving nothing.
    """
    part = target.with_name(f".{secrets.token_hex(8)}.part")  # short, whatever the length of the target's name
    try:
        with open(part, "xb") as stream:
            stream.writelines(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
