"""What was measured, remembered in the cache folder: one small JSON file for each key.

A file that is damaged, of another version, or under the name of another key is as good as none. Nothing here raises for
a folder that is missing, full or read-only: what can't be remembered is measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pocketdiffusion.atomic import replace_file
from pocketdiffusion.bundle.paths import cache_dir

RULES = 1
"""Raised when figures are taken or written in another way: older ones then no longer count."""
KINDS = ("footprints", "tuned")
"""What is measured of one graph; what `tune` found for a bundle at a size."""


class Store:
    """One kind of records, in a folder of that name in the user's cache folder."""

    def __init__(self, kind: str, folder: Path | None = None) -> None:
        self.folder = (cache_dir() if folder is None else folder) / kind

    def get(self, key: Mapping[str, Any]) -> Any:
        """The value that was put under exactly this key, or None."""
        try:
            found = json.loads(self._file(key).read_bytes())
            return found["value"] if found["rules"] == RULES and found["key"] == json.loads(_json(key)) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Remember a value of JSON's types."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._file(key), _json({"rules": RULES, "key": key, "value": value}))

    def files(self) -> list[Path]:
        """All records."""
        return sorted(self.folder.glob("*.json"))

    def clear(self) -> int:
        """Delete all records. Returns the bytes that this freed."""
        freed = 0
        for path in self.files():
            with suppress(OSError):
                size = path.stat().st_size
                path.unlink()
                freed += size
        return freed

    def _file(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(_json(key)).hexdigest()}.json"


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
