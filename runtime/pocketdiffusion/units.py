"""Amounts of memory as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size_in_bytes(text: str) -> int:
    """ "1GB" as 1000000000, "512MiB" as 536870912, plain numbers as bytes. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no amount of memory; write e.g. 800MB, 1.5GB or 512MiB")
    return round(float(found[1]) * UNITS[found[2]])


def megabytes(size: float) -> str:
    """Bytes as whole megabytes: "1,234 MB"."""
    return f"{size / 1e6:,.0f} MB"
