"""Generation parameters and their text form, the "parameters" text of AUTOMATIC1111's web UI, which most tools read.

::

    <prompt>
    Negative prompt: <negative prompt>
    Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, ..., Version: <tool>

The last line holds the pairs; a reader takes it for a part of the prompt when it has fewer than three. A value is
JSON-quoted if it holds a comma, a colon or a line break. That reader also strips every line of a prompt and starts
the negative prompt at any line that begins with "Negative prompt:". Prompts that do not survive this are written a
second time, JSON-quoted, under "Exact prompt" and "Exact negative prompt", which other tools pass over: `parse` gives
back every prompt unchanged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pocketdiffusion.errors import InvalidRequest

RNGS = ("CPU", "NV", "GPU")
_NEGATIVE = "Negative prompt:"
_EXACT = ("Exact prompt", "Exact negative prompt")
_FEWEST_PAIRS = 3
_TEXT_FIELDS = {"sampler": "Sampler", "schedule": "Schedule type", "model": "Model", "model_hash": "Model hash"}
_KEY = re.compile(r"\w[\w \-/]+")
_KEY_BACKWARDS = re.compile(r"[\w \-/]*")
_SPACE = re.compile(r"\s*")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])+"(?=,|$)')
_SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})")
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What made an image. None stands for "not known" and is not written.

    Raises InvalidRequest ("metadata") for a value that the text form can't hold.
    """

    prompt: str = ""
    negative_prompt: str = ""
    steps: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    width: int | None = None
    """Pixels; given together with height or not at all."""
    height: int | None = None
    model: str | None = None
    model_hash: str | None = None
    clip_skip: int = 1
    """A1111's count: 1 uses the text encoder's last layer, 2 leaves one layer out (Diffusers' clip_skip plus one)."""
    rng: str = "GPU"
    """Whose noise: "CPU" is torch's CPU generator, "NV" its CUDA generator imitated, "GPU" (not written) a real one."""
    version: str | None = None
    """The tool, e.g. "pocketdiffusion 0.1.0"."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further pairs, such as Backend and Quantization."""

    def __post_init__(self) -> None:
        if self.rng not in RNGS:
            raise _unwritable(f"rng is {self.rng!r}; choose one of: {', '.join(RNGS)}")
        if self.clip_skip < 1:
            raise _unwritable(f"clip_skip is {self.clip_skip}; A1111 counts from 1, which leaves no layer out")
        if (self.width is None) != (self.height is None):
            raise _unwritable(f"size is {self.width} x {self.height}; give both width and height, or neither")
        taken = {*_pairs(self), *_EXACT}
        for key, value in self.extra.items():
            if _KEY.fullmatch(key) is None or key != key.strip() or key in taken or not isinstance(value, str):
                raise _unwritable(
                    f"extra parameter {key!r}: {value!r} can't be written; a key is made of letters, digits, "
                    "spaces, - and /, is not that of another field, and its value is a text"
                )

    def text(self) -> str:
        """The text form. Raises InvalidRequest when fewer than three parameters besides the prompts are known."""
        pairs = _pairs(self)
        version = {"Version": pairs.pop("Version")} if "Version" in pairs else {}
        prompts = (self.prompt, self.negative_prompt)
        negative = f"{_NEGATIVE} {self.negative_prompt}\n" if self.negative_prompt else ""
        lines = _UNWRITABLE.sub("\ufffd", f"{self.prompt}\n{negative}")
        read = _read_prompts(f"{lines}.".strip().split("\n")[:-1])
        exact = {key: text for key, text, back in zip(_EXACT, prompts, read, strict=True) if text != back}
        pairs = {**pairs, **self.extra, **exact, **version}
        if len(pairs) < _FEWEST_PAIRS:
            raise _unwritable(
                f"only {len(pairs)} parameters are known; other tools need {_FEWEST_PAIRS} or more to find them"
            )
        return f"{lines}{', '.join(f'{key}: {_quoted(value)}' for key, value in pairs.items())}".strip()

    def without_prompts(self) -> Parameters:
        """The same with both prompts left out."""
        return replace(self, prompt="", negative_prompt="")


def parse(text: str) -> Parameters:
    """Read a "parameters" text, also another tool's. Never raises: what has no field of its own is in `extra`."""
    *lines, last = text.strip().split("\n")
    found = list(_find_pairs(last))
    if len(found) < _FEWEST_PAIRS:
        lines, found = [*lines, last], []
    pairs = {key: value for key, value in found if value is not None}
    prompts = _read_prompts(lines)
    prompt, negative = (pairs.pop(key, text) for key, text in zip(_EXACT, prompts, strict=True))
    fields: dict[str, Any] = {
        "steps": _take_int(pairs, "Steps"),
        "guidance_scale": _take_float(pairs, "CFG scale"),
        "seed": _take_int(pairs, "Seed"),
        "clip_skip": _take_int(pairs, "Clip skip", lowest=1) or 1,
        "rng": pairs.pop("RNG") if pairs.get("RNG") in RNGS else "GPU",
        "version": pairs.pop("Version", None),
        **{name: pairs.pop(key, None) for name, key in _TEXT_FIELDS.items()},
    }
    size = _SIZE.fullmatch(pairs.get("Size", ""))
    if size is not None:
        del pairs["Size"]
        fields |= {"width": int(size[1]), "height": int(size[2])}
    return Parameters(prompt=prompt, negative_prompt=negative, extra=pairs, **fields)


def _pairs(known: Parameters) -> dict[str, str]:
    """The pairs of all known fields, in A1111's order."""
    scale = known.guidance_scale
    values = {
        "Steps": known.steps,
        "Sampler": known.sampler,
        "Schedule type": known.schedule,
        "CFG scale": int(scale) if scale is not None and float(scale).is_integer() else scale,
        "Seed": known.seed,
        "Size": None if known.width is None else f"{known.width}x{known.height}",
        "Model hash": known.model_hash,
        "Model": known.model,
        "Clip skip": None if known.clip_skip == 1 else known.clip_skip,
        "RNG": None if known.rng == "GPU" else known.rng,
        "Version": known.version,
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def _quoted(value: str) -> str:
    """A value that survives reading. A1111 quotes at comma, colon and line break; the other cases read back wrong."""
    damaged = value != value.strip() or value[:1] in ("", '"') or _UNWRITABLE.search(value)
    if not damaged and not any(sign in value for sign in ",:\n"):
        return value
    return json.dumps(value, ensure_ascii=_UNWRITABLE.search(value) is not None)


def _read_prompts(lines: list[str]) -> tuple[str, str]:
    prompts: tuple[list[str], list[str]] = ([], [])
    part = 0
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            part, line = 1, line[len(_NEGATIVE) :].strip()
        if line or prompts[part]:  # a part starts with its first line that is not empty
            prompts[part].append(line)
    return "\n".join(prompts[0]), "\n".join(prompts[1])


def _find_pairs(line: str) -> Iterator[tuple[str, str | None]]:
    """Pairs of the last line, in time linear in its length; the value is None where it counts but can't be used."""
    position = 0
    while (colon := line.find(":", position)) >= 0:
        backwards = _KEY_BACKWARDS.match(line[position:colon][::-1])
        key = "" if backwards is None else backwards[0][::-1].lstrip(" -/")
        position = colon + 1
        if len(key) < 2:
            continue
        space = _SPACE.match(line, position)
        start = position if space is None else space.end()
        quoted = _QUOTED.match(line, start)
        comma = line.find(",", start if quoted is None else quoted.end())
        end = len(line) if comma < 0 else comma
        usable = start < end and len(key.rstrip()) > 1
        yield key.rstrip(), _unquoted(line[start:end]) if usable else None
        position = end + 1


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _take_int(pairs: dict[str, str], key: str, lowest: int = 0) -> int | None:
    value = pairs.get(key, "")
    if not (value.isascii() and value.isdigit() and len(value) <= 20) or int(value) < lowest:
        return None
    return int(pairs.pop(key))


def _take_float(pairs: dict[str, str], key: str) -> float | None:
    try:
        value = float(pairs.get(key, ""))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    del pairs[key]
    return value


def _unwritable(message: str) -> InvalidRequest:
    return InvalidRequest("metadata", message)
