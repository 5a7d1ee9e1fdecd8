"""The command line's words: lists with commas, sizes and bytes, and the cases that they make."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from pocketdiffusion.cli.values import amount, size, whole
from pocketdiffusion.presets import PRESETS
from pocketdiffusion_bench.case import OURS, PROMPT, Case, product
from pocketdiffusion_bench.errors import BenchError

Value = TypeVar("Value")

PRECISIONS = ("float32", "bfloat16", "float16")
LISTS = (
    "model",
    "peer",
    "recipe",
    "downsample_keys",
    "device",
    "precision",
    "threads",
    "steps",
    "sampler",
    "guidance",
    "preset",
    "decoder",
    "residency",
    "vae_tile",
    "memory_plan",
)
"""Options whose values are multiplied into cases, beside --size and --memory-limit; named like the case's fields."""


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    group = parser.add_argument_group("cases (lists with commas are multiplied)")
    group.add_argument("--cases", type=Path, metavar="FILE", help="in place of all these: a JSON object for each case")
    group.add_argument("--peer", type=words, default=[OURS], help=f"{OURS} (default), or others on the same weights")
    group.add_argument("--recipe", type=words, default=[None], help="how the weights of a random:NAME model are stored")
    group.add_argument(
        "--downsample-keys", type=listed(whole), default=[None], metavar="N", help="of a source, as export's option"
    )
    group.add_argument("--device", type=devices, default=[None], help="as for generate (default: auto)")
    group.add_argument("--precision", type=listed(precision), default=[None], help="float32, bfloat16, float16")
    group.add_argument("--threads", type=listed(whole), default=[None], help="compute threads")
    group.add_argument("--size", type=listed(size), default=[None], metavar="WIDTHxHEIGHT", help="e.g. 512x512,768x768")
    group.add_argument("--steps", type=listed(whole), default=[None], help="denoising steps (default: the model's)")
    group.add_argument("--sampler", type=words, default=[None], help="e.g. 'euler,dpm++ 2m'")
    group.add_argument("--guidance", type=listed(_number), default=[None], metavar="SCALE")
    group.add_argument("--preset", type=listed(preset), default=[None], help=", ".join(PRESETS))
    group.add_argument("--decoder", type=words, default=[None], help="as of generate: full, tiny")
    group.add_argument("--residency", type=words, default=[None], help="keep, release, stream")
    group.add_argument("--vae-tile", type=listed(whole), default=[None], metavar="PIXELS", help="as of generate")
    group.add_argument(
        "--memory-plan", type=listed(amount), default=[None], metavar="SIZE", help="as generate's --memory-limit"
    )
    group.add_argument("--memory-limit", type=listed(amount), default=[None], metavar="SIZE", help="e.g. 1GB,500MB")
    group.add_argument("--prompt", default=PROMPT)
    group.add_argument("--seed", type=int, default=0)


def cases(args: argparse.Namespace) -> list[Case]:
    """Every combination, models varying slowest and memory limits fastest; equal ones once. Or those of --cases."""
    if args.cases is not None:
        return read_cases(args.cases)
    names = {"model": args.models, **{name: getattr(args, name) for name in LISTS[1:]}}
    fixed = {"prompt": [args.prompt], "seed": [args.seed], "memory_limit": args.memory_limit}
    found = product(names | fixed)
    sized = (_sized(case, size) for case in found for size in args.size)
    return list(dict.fromkeys(sized))


def read_cases(file: Path) -> list[Case]:
    """Cases of a JSON Lines file, each with the fields of `Case` that it sets. Raises BenchError with the line."""
    names, found = {item.name for item in fields(Case)}, []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{file} can't be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            given = json.loads(line)
        except ValueError as error:
            raise BenchError(f"{file}, line {number} is no JSON: {error}") from None
        if not isinstance(given, dict) or "model" not in given or not given.keys() <= names:
            raise BenchError(f"{file}, line {number}: write a JSON object with model and any of {', '.join(names)}")
        found.append(Case(**given))
    if not found:
        raise BenchError(f"{file} holds no case; write one JSON object a line")
    return found


def _sized(case: Case, size: tuple[int, int] | None) -> Case:
    return case if size is None else replace(case, width=size[0], height=size[1])


def words(text: str) -> list[str]:
    """Between commas; none may be empty."""
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty place between its commas")
    return found


def devices(text: str) -> list[str]:
    """Devices between commas. "denoiser=openvino:gpu,vae=cpu", one for each part, is a single choice."""
    return [text] if "=" in text else words(text)


def listed(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Reads a list with commas of what `kind` reads."""

    def read(text: str) -> list[Value]:
        return [kind(word) for word in words(text)]

    return read


def precision(text: str) -> str:
    """One of `PRECISIONS`."""
    if text not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is no precision; choose from {', '.join(PRECISIONS)}")
    return text


def preset(text: str) -> str:
    """One of `PRESETS`."""
    if text not in PRESETS:
        raise argparse.ArgumentTypeError(f"{text!r} is no preset; choose from {', '.join(PRESETS)}")
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
