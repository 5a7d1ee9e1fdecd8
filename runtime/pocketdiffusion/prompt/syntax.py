r"""Weights in prompts, in the notation that A1111's web UI documents.

============== =======================================================
``(word)``     weight times 1.1; ``((word))`` times 1.21
``[word]``     weight divided by 1.1
``(word:1.2)`` weight times 1.2
``\( \) \[ \] \\``  the character itself; any other backslash is dropped
``BREAK``      what follows starts a new chunk
============== =======================================================

Brackets need not balance: one that is never closed reaches to the end of the text, a closing one without an opening one
is text. Round and square brackets are counted apart, so ranges may cross. ``:1.2)`` without an open ``(`` is text.

One difference: A1111 reads a BREAK inside brackets as the word "BREAK"; here it breaks there too.
Not read here: prompt editing ``[a:b:0.5]``, alternation ``[a|b]`` and ``AND``; their signs are text.
The parser takes linear time, whatever the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pocketdiffusion.errors import InvalidRequest

MAX_WEIGHT = 1000.0
"""Largest weight, either sign: keeps weighted float32 hidden states far from overflow."""

_STEP = 1.1
_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"  # no two ways to read one number, so no backtracking over long ones
_TOKEN = re.compile(
    rf"\\(?P<escaped>[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<number>{_NUMBER})\s*\)|(?P<close>[)\]])|[^\\()\[\]:]+|:"
)
_BREAK = re.compile(r"\bBREAK\b")
_OPENING = {")": "(", "]": "["}


@dataclass(frozen=True, slots=True)
class Fragment:
    """A run of text under one weight."""

    text: str
    weight: float = 1.0
    starts_chunk: bool = False
    """True after a BREAK."""


def parse_weights(text: str) -> list[Fragment]:
    """Split a prompt into fragments of one weight each; at least one, adjacent ones differ in weight or by a BREAK.

    Raises InvalidRequest for a weight beyond `MAX_WEIGHT`.
    """
    return _merged(_pieces(text)) or [Fragment("")]


def _pieces(text: str) -> Iterator[Fragment]:
    """One fragment for each token of text, brackets resolved."""
    tokens = list(_TOKEN.finditer(text))
    factors = _bracket_factors(tokens)
    products = {"(": [1.0], "[": [1.0]}
    for index, token in enumerate(tokens):
        bracket = _bracket(token)
        if index not in factors:
            yield from _text_pieces(token, products["("][-1] * products["["][-1])
        elif token["open"]:
            products[bracket].append(products[bracket][-1] * factors[index])
        else:
            products[bracket].pop()


def _bracket(token: re.Match[str]) -> str:
    """The opening form of a bracket token, "" for other tokens."""
    if token["number"] is not None:
        return "("
    return token["open"] or _OPENING.get(token["close"], "")


def _bracket_factors(tokens: list[re.Match[str]]) -> dict[int, float]:
    """Token index -> factor, for every token that works as a bracket; a closing one repeats its opening one's."""
    factors: dict[int, float] = {}
    unclosed: dict[str, list[int]] = {"(": [], "[": []}
    default = {"(": _STEP, "[": 1 / _STEP}
    for index, token in enumerate(tokens):
        bracket = _bracket(token)
        if token["open"]:
            factors[index] = default[bracket]
            unclosed[bracket].append(index)
        elif bracket and unclosed[bracket]:
            opening = unclosed[bracket].pop()
            if token["number"] is not None:
                factors[opening] = float(token["number"])
            factors[index] = factors[opening]
    return factors


def _text_pieces(token: re.Match[str], weight: float) -> Iterator[Fragment]:
    """The text of one token, split at BREAK."""
    if not abs(weight) <= MAX_WEIGHT:  # also true for NaN, from zero times infinity
        raise InvalidRequest(
            "prompt",
            f"prompt weight {weight:g} on {token[0][:40]!r} is out of range: {-MAX_WEIGHT:g} to {MAX_WEIGHT:g} is "
            "allowed; use fewer brackets or a smaller number",
        )
    literal = token["escaped"]
    parts = _BREAK.split(token[0]) if literal is None else [literal]
    for number, part in enumerate(parts):
        yield Fragment(part, weight, starts_chunk=number > 0)


def _merged(pieces: Iterable[Fragment]) -> list[Fragment]:
    """Join neighbours of the same weight and chunk, so that ``(un)(fair)`` is one word."""
    firsts: list[Fragment] = []
    texts: list[list[str]] = []
    for piece in pieces:
        same = firsts and not piece.starts_chunk and math.isclose(firsts[-1].weight, piece.weight, rel_tol=1e-9)
        if same:
            texts[-1].append(piece.text)
        else:
            firsts.append(piece)
            texts.append([piece.text])
    return [replace(first, text="".join(parts)) for first, parts in zip(firsts, texts, strict=True)]
