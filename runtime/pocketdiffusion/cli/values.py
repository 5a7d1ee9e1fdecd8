"""Values of options that are more than a word or a number."""

from __future__ import annotations

import argparse
import re

from pocketdiffusion.units import size_in_bytes


def size(text: str) -> tuple[int, int]:
    """ "512x768" as (512, 768): width and height."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, e.g. 512x512")
    return int(found[1]), int(found[2])


def amount(text: str) -> int:
    """ "1GB" as 1000000000: see `units.size_in_bytes`."""
    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)
