"""`python -m pocketdiffusion_bench.presets`: what each quality preset leaves out, and how near its pictures stay.

Every technique draws the prompts of `prompts.txt`, prompt i with seed i, and is held against "exact" with the same
seeds, sampler and steps. `--singles` adds rows for single techniques: other numbers of computed steps, plain runs of as
few steps, which cost the same, and guidance held or switched off late in the run. `--variant` adds rows for another
bundle of the same model, such as one exported with fewer keys: its exact run and its presets, held against the first
bundle's. Batches of all techniques take turns.
The result goes to stdout, as Markdown or as lines of JSON, from which the README's table is made.

Limit: time is the process's own on one thread, so that other programs do not disturb it; it says nothing of how well
engines share work among threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.presets import PRESETS
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion.verify import psnr_db
from pocketdiffusion_bench import machine
from pocketdiffusion_bench.case import EXACT
from pocketdiffusion_bench.flops import denoiser_name
from pocketdiffusion_bench.quality import EQUAL_DB
from pocketdiffusion_bench.recipes import PROMPTS
from pocketdiffusion_bench.report.techniques import Outcome, table
from pocketdiffusion_bench.similarity import ssim

BATCH = 10
"""Pictures at a time; an image of a batch is the same as alone."""
COMPUTED = (4, 5, 8)
HOLD = 0.7
INTERVAL = (0.0, 0.7)

Fields = Mapping[str, Any]


@dataclass(slots=True)
class Drawn:
    """The pictures of one technique."""

    pictures: list[AnyArray] = field(default_factory=list)
    """uint8 (height, width, 3)."""
    passes: int = 0
    """Rows that the denoiser was fed for one picture."""
    seconds: float = 0.0
    """Processor time of all pictures."""


def techniques(*, singles: bool) -> dict[str, Fields]:
    """Name -> what is set. Computed steps and fewer steps stand in pairs that cost the same."""
    found: dict[str, Fields] = {f"preset={name}": {"preset": name} for name in PRESETS if name != EXACT}
    if singles:
        for count in COMPUTED:
            found[f"computed_steps={count}"] = {"computed_steps": count}
            found[f"num_inference_steps={count}"] = {"num_inference_steps": count}
        found[f"guidance_hold={HOLD:g}"] = {"guidance_hold": HOLD}
        found["guidance_interval={:g}..{:g}".format(*INTERVAL)] = {"guidance_interval": INTERVAL}
    return found


Settings = Mapping[str, tuple[Pipeline, Fields]]
"""Name -> what draws, and with what set."""


def draw(prompts: Sequence[str], settings: Settings) -> dict[str, Drawn]:
    """One picture for each prompt and each of the settings, by name; prompt i with seed i."""
    drawn = {name: Drawn() for name in settings}
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        for name, (pipe, fields) in settings.items():
            run = f"{denoiser_name(pipe.bundle)}.run"
            begin = time.process_time()
            result = pipe(batch, seed=start, batched_guidance=False, output_type="np", **fields)
            found = drawn[name]
            found.seconds += time.process_time() - begin
            found.passes = len(result.timings.samples[run])  # in turn, so that a run is a row for each picture
            if result.pixels is None:
                raise ValueError("a run with pictures gave none")
            found.pictures.extend(result.pixels)
    return drawn


def outcomes(pipe: Pipeline, prompts: Sequence[str], common: Fields, settings: Settings) -> list[Outcome]:
    """Each of the settings, on top of `common`, held against `common` alone on `pipe`."""
    each = {name: (drawer, {**common, **fields}) for name, (drawer, fields) in settings.items()}
    drawn = draw(prompts, {EXACT: (pipe, common), **each})
    exact = drawn.pop(EXACT)
    made = pipe(prompts[0], seed=0, output_type="latent", **common).parameters[0]
    return [
        Outcome(
            technique=name,
            model=pipe.bundle.manifest.name,
            sampler=made.sampler or "",
            steps=made.steps or 0,
            guidance=made.guidance_scale or 0.0,
            passes=found.passes,
            exact_passes=exact.passes,
            time=found.seconds / exact.seconds,
            psnr_db=tuple(min(EQUAL_DB, psnr_db(*pair)) for pair in zip(exact.pictures, found.pictures, strict=True)),
            ssim=tuple(ssim(*pair) for pair in zip(exact.pictures, found.pictures, strict=True)),
            machine=machine.describe(),
        )
        for name, found in drawn.items()
    ]


def main() -> int:
    """Parse the command line, draw, print."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketdiffusion_bench.presets", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="sticker")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="(default: the model's)")
    parser.add_argument("--prompts", type=int, default=50, help="how many of the prompts (default: 50)")
    parser.add_argument("--sampler", action="append", help="repeat to compare (default: the model's)")
    parser.add_argument("--singles", action="store_true", help="single techniques too")
    parser.add_argument(
        "--variant",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "BUNDLE"),
        help="another bundle of the same model, and what the table calls it; repeat for several",
    )
    parser.add_argument("-o", "--format", choices=("md", "jsonl"), default="md")
    args = parser.parse_args()
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[: args.prompts]
    pipe = Pipeline.from_pretrained(args.model, device=args.device, threads=1)
    settings = {name: (pipe, fields) for name, fields in techniques(singles=args.singles).items()}
    for name, bundle in args.variant:
        other = Pipeline.from_pretrained(bundle, device=args.device, threads=1)
        settings[name] = (other, {})
        settings |= {f"{name}, {each}": (other, fields) for each, fields in techniques(singles=False).items()}
    found = []
    for sampler in args.sampler or [None]:
        common = {"num_inference_steps": args.steps, "sampler": sampler, "guidance_scale": args.guidance}
        found += outcomes(pipe, prompts, common, settings)
    sys.stdout.write(table(found) if args.format == "md" else "".join(f"{each.line()}\n" for each in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
