"""`python -m pocketdiffusion_bench.presets`: what each quality preset leaves out, and how near its pictures stay.

Every preset draws the prompts of `prompts.txt`, prompt i with seed i, and is held against "exact" with the same seeds,
sampler and steps. So is a plain run of as few steps as the preset computes, which costs the same. `--computed` adds
rows for other numbers of computed steps: the grid that presets are chosen from. No time is taken: a forecast costs next
to nothing, so passes are what counts. The table goes to stdout as Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.presets import PRESETS
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion.verify import psnr_db
from pocketdiffusion_bench.quality import EQUAL_DB
from pocketdiffusion_bench.recipes import PROMPTS
from pocketdiffusion_bench.similarity import ssim

BATCH = 10
"""Pictures at a time; an image of a batch is the same as alone."""
HEAD = """| sampler | preset | computed steps | PSNR, dB: median (worst) | SSIM: median (worst) | as few steps, dB |
|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The pictures of one setting."""

    pictures: tuple[AnyArray, ...]
    """uint8 (height, width, 3)."""
    computed: int
    """Steps at which the denoiser ran."""


def draw(pipe: Pipeline, prompts: Sequence[str], fields: Mapping[str, Any]) -> Drawn:
    """One picture for each prompt, prompt i with seed i."""
    pictures: list[AnyArray] = []
    computed = 0
    for start in range(0, len(prompts), BATCH):
        generation = pipe.stream(list(prompts[start : start + BATCH]), seed=start, **fields)
        steps = generation.request.num_inference_steps or 0
        computed = min(steps, generation.request.computed_steps or steps)
        pixels = generation.result.pixels
        if pixels is None:
            raise ValueError("a run with pictures gave none")
        pictures.extend(pixels)
    return Drawn(tuple(pictures), computed)


def signal(exact: Drawn, drawn: Drawn) -> list[float]:
    """PSNR of each picture in dB."""
    return [
        min(EQUAL_DB, psnr_db(expected, found)) for expected, found in zip(exact.pictures, drawn.pictures, strict=True)
    ]


def row(name: str, exact: Drawn, drawn: Drawn, plain: Drawn) -> str:
    """The table's columns from the preset's name on; `plain` has as many steps as `drawn` computes."""
    alike = [ssim(expected, found) for expected, found in zip(exact.pictures, drawn.pictures, strict=True)]
    near = signal(exact, drawn)
    return (
        f"{name} | {drawn.computed} of {exact.computed} ({1 - drawn.computed / exact.computed:.0%} saved) "
        f"| {statistics.median(near):.1f} ({min(near):.1f}) | {statistics.median(alike):.3f} ({min(alike):.3f}) "
        f"| {statistics.median(signal(exact, plain)):.1f}"
    )


def main() -> int:
    """Parse the command line, draw, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketdiffusion_bench.presets", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="sticker")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=50, help="how many of the prompts (default: 50)")
    parser.add_argument("--sampler", action="append", help="repeat to compare (default: the model's)")
    parser.add_argument("--computed", type=int, action="append", default=[], metavar="N", help="further rows")
    args = parser.parse_args()
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[: args.prompts]
    pipe = Pipeline.from_pretrained(args.model, device=args.device, threads=args.threads)
    settings: dict[str, dict[str, Any]] = {name: {"preset": name} for name in PRESETS if name != "exact"}
    settings |= {f"computed_steps={count}": {"computed_steps": count} for count in args.computed}
    print(HEAD)
    for sampler in args.sampler or [None]:
        common = {"num_inference_steps": args.steps, "sampler": sampler}
        exact = draw(pipe, prompts, common)
        for name, fields in settings.items():
            drawn = draw(pipe, prompts, {**common, **fields})
            plain = draw(pipe, prompts, {**common, "num_inference_steps": drawn.computed})
            print(f"| {sampler or 'default'} | {row(name, exact, drawn, plain)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
