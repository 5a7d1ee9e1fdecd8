"""`python -m pocketdiffusion_bench.recipes FP32 BUNDLE...`: what each recipe costs and what it saves.

Every bundle draws the prompts of a file with the seeds 0, 1, 2 ... and is compared with the first bundle's pictures.
SQNR is what the bundle's manifest says (measured at export against torch, the worse of the engines). The UNet's pass is
run on the bundle's golden inputs, bundles in turns, so that a drift of the machine hits all alike; ratios are to the
first bundle. Limit: the bundles must hold the same model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion.timing import Timings
from pocketdiffusion.verify import psnr_db
from pocketdiffusion_bench.quality import EQUAL_DB
from pocketdiffusion_bench.similarity import ssim

PROMPTS = Path(__file__).with_name("prompts.txt")
ENGINES = ("onnxruntime:cpu", "openvino:cpu")


@dataclass(frozen=True, slots=True)
class Likeness:
    """A bundle's pictures against the first bundle's."""

    psnr: list[float]
    ssim: list[float]


def draw(pipe: Pipeline, prompts: Sequence[str]) -> list[AnyArray]:
    """One picture per prompt, uint8 (h, w, 3); the seed is the prompt's place in the list."""
    return [np.asarray(pipe(prompt, seed=seed).images[0]) for seed, prompt in enumerate(prompts)]


def compare(expected: Sequence[AnyArray], found: Sequence[AnyArray]) -> Likeness:
    """PSNR and SSIM of each pair."""
    pairs = list(zip(expected, found, strict=True))
    return Likeness([min(EQUAL_DB, psnr_db(*pair)) for pair in pairs], [ssim(*pair) for pair in pairs])


def pass_seconds(bundles: Sequence[Path], engine: str, rounds: int) -> list[float]:
    """Median seconds of one UNet pass of each bundle, in turns, after two rounds that don't count."""
    pipes = [Pipeline.from_pretrained(bundle, device=engine) for bundle in bundles]
    golden = load_file(bundles[0] / str(pipes[0].bundle.manifest.golden))
    prefix = "unet/in/"
    feeds = {name.removeprefix(prefix): array for name, array in golden.items() if name.startswith(prefix)}
    seconds: list[list[float]] = [[] for _ in bundles]
    for turn in range(rounds + 2):
        for pipe, kept in zip(pipes, seconds, strict=True):
            with pipe.components["unet"].use() as unet:
                start = time.perf_counter()
                unet.run(feeds, Timings())
                if turn > 1:
                    kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in seconds]


def row(bundle: Path, pipe: Pipeline, likeness: Likeness, passes: Sequence[str]) -> str:
    """One line of the table."""
    components = pipe.bundle.manifest.components
    size = sum(file.size for file in pipe.bundle.manifest.files)
    cells = [
        pipe.bundle.manifest.recipe,
        f"{size:,}",
        f"{(bundle / components['unet'].graph).stat().st_size:,}",
        " / ".join(f"{entry.sqnr_db or 0:.1f}" for entry in components.values()),
        f"{statistics.median(likeness.psnr):.1f} / {min(likeness.psnr):.1f}",
        f"{statistics.median(likeness.ssim):.4f} / {min(likeness.ssim):.4f}",
        *passes,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Parse the command line, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketdiffusion_bench.recipes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundles", type=Path, nargs="+", help="bundles of one model; the first is compared with")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a prompt per line (default: 50 of ours)")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each UNet (default: 15)")
    args = parser.parse_args()
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()
    times = [pass_seconds(args.bundles, engine, args.rounds) for engine in ENGINES]
    pipes = [Pipeline.from_pretrained(bundle, device=ENGINES[0]) for bundle in args.bundles]
    names = " / ".join(pipes[0].bundle.manifest.components)
    print(
        f"| recipe | bytes | UNet's bytes | SQNR dB: {names} | PSNR dB median / worst | SSIM median / worst |", end=""
    )
    print("".join(f" UNet pass {engine.split(':')[0]} |" for engine in ENGINES))
    print("|---" * (6 + len(ENGINES)) + "|")
    expected = draw(pipes[0], prompts)
    for index, (bundle, pipe) in enumerate(zip(args.bundles, pipes, strict=True)):
        found = expected if index == 0 else draw(pipe, prompts)
        passes = [f"{1000 * each[index]:.1f} ms, {each[0] / each[index]:.2f}x" for each in times]
        print(row(bundle, pipe, compare(expected, found), passes), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
