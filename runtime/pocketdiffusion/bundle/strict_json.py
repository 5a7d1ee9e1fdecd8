"""JSON from untrusted files: bounded in size and depth, one meaning per text.

Refused: invalid UTF-8, lone surrogates, duplicate keys, NaN and infinities, integers of more than 20 characters.
The depth is counted before the parser runs, so deep nesting can't exhaust the stack.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from pocketdiffusion.errors import BundleCorrupt

MAX_BYTES = 64 << 20
MAX_DEPTH = 64

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)
"""A string or a bracket. The closing quote is optional, so that an endless string is one token and not a search."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def load_json(
    data: bytes, file: str | Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH, config: bool = False
) -> Any:
    """The value of a JSON text. `file` is named in errors. Raises BundleCorrupt.

    `config` also takes what Diffusers and transformers write: Infinity, -Infinity and integers of up to 40 characters.
    """
    if len(data) > max_bytes:
        raise BundleCorrupt(file, f"{len(data)} bytes of JSON, at most {max_bytes} are read")
    _check_depth(data, file, max_depth)
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_infinity if config else _constant,
            parse_int=_long_integer if config else _integer,
            parse_float=_finite,
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # also JSONDecodeError, UnicodeError and those of the hooks below
        raise BundleCorrupt(file, f"not valid JSON: {error}") from None
    return value


def short(value: object) -> str:
    """`value` for an error message: escaped, one line, at most 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_depth(data: bytes, file: str | Path, max_depth: int) -> None:
    depth = 0
    for match in _TOKEN.finditer(data):
        first = data[match.start()]
        if first in b"[{":
            depth += 1
            if depth > max_depth:
                raise BundleCorrupt(file, f"JSON nested deeper than {max_depth} levels")
        elif first in b"]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {short(twice)} appears twice")
    return result


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _infinity(text: str) -> float:
    return _constant(text) if text == "NaN" else float(text)


def _integer(text: str, longest: int = 20) -> int:
    if len(text) > longest:
        raise ValueError(f"integer of {len(text)} digits")
    return int(text)


def _long_integer(text: str) -> int:
    return _integer(text, 40)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {short(text)} is out of range")
    return value
