"""Prompts for pictures: the same thing said in many ways, so that no single wording is learnt."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sticker_train.pack import Row

STYLES: Mapping[str, tuple[str, ...]] = {
    "fluent3d": ("3d", "3d style", "3d render"),
    "fluentflat": ("flat", "flat style", "flat vector"),
    "noto": ("emoji", "emoji style"),
    "blob": ("blob", "blob style"),
    "serenity": ("pixel art", "8-bit"),
    "dcss": ("pixel sprite", "fantasy game sprite"),
    "twemoji": ("cartoon", "cartoon style"),
    "fxemoji": ("soft", "soft style"),
    "gameicons": ("black icon", "silhouette"),
}
"""Set -> the words that ask for its style."""
DEFAULT_STYLE = "fluent3d"
"""What is drawn where a prompt says no style."""
SHARES: Mapping[str, float] = {
    "fluent3d": 0.6,
    "noto": 0.13,
    "fluentflat": 0.08,
    "dcss": 0.1,
    "blob": 0.05,
    "serenity": 0.04,
}
"""Set -> its share of what the denoiser is shown: one look learnt well, the others asked for by their words."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "cyan")
_VOWELS = "aeiou"


def named(row: Row, *, colour: bool = False) -> str:
    """The caption with its article: "a cat". With `colour`, "a yellow cat", where the picture has one colour."""
    words = row.caption.split()
    if colour and row.colour and row.article and not set(words) & set(COLOURS):
        return f"{'an' if row.colour[0] in _VOWELS else 'a'} {row.colour} {row.caption}"
    return f"{row.article} {row.caption}" if row.article else row.caption


def plural(caption: str) -> str:
    """By English rule; irregular words come out wrong, which a prompt's reader will not mind."""
    if caption.endswith(("s", "x", "ch", "sh")):
        return caption + "es"
    if caption.endswith("y") and caption[-2:-1] not in _VOWELS:
        return caption[:-1] + "ies"
    return caption + "s"


def prompt_for(row: Row, random: np.random.Generator, *, styled: float = 0.5) -> str:
    """One of the ways to ask for the picture: name, colour and name, keywords; `styled` is how often with its style."""
    way = random.random()
    if way < 0.55:
        text = named(row)
    elif way < 0.7:
        text = named(row, colour=True)
    elif way < 0.78 and row.keywords:
        text = keyword(row, random)
    elif way < 0.88 and len(row.keywords) > 1:
        count = min(len(row.keywords), int(random.integers(1, 4)))
        text = ", ".join(str(word) for word in random.choice(row.keywords, count, replace=False))
    else:
        text = row.caption
    return with_style(text, row.style, random) if random.random() < styled else text


def keyword(row: Row, random: np.random.Generator) -> str:
    """One keyword with an article: "a car" for the automobile."""
    word = str(random.choice(row.keywords))
    return f"{'an' if word[0] in _VOWELS else 'a'} {word}"


def with_style(text: str, style: str, random: np.random.Generator) -> str:
    """The prompt and one of its style's words, after it or before it."""
    word = str(random.choice(STYLES[style]))
    return f"{text}, {word}" if random.random() < 0.7 else f"{word}, {text}"
