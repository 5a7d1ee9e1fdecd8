"""`python -m pocketdiffusion_bench.harness_cost`: what the harness itself costs what it measures.

Three processes that make the same picture take turns: `pocketdiffusion generate` (no harness), the measured child
without sampling, and with it. Beside the seconds stand processor times, which a noisy machine hides less: the process's
own, and that of the parent meanwhile, as a share of the process's seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.process import Ended, run_process
from pocketdiffusion_bench.run import child_command

Measured = tuple[Ended, float]
"""A process, and the seconds of processor time that the parent spent on it."""


def main() -> int:
    """Parse the command line, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketdiffusion_bench.harness_cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="sticker")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(args.model, args.steps, Path(folder))
        found: dict[str, list[Measured]] = {name: [] for name in commands}
        for turn in range(args.runs + 1):
            for name, command in commands.items():
                (Path(folder) / "events").unlink(missing_ok=True)
                measured = _measure(command, sample=name == "child, sampled")
                if turn > 0:
                    found[name].append(measured)
    print("| process | s (median, min) | processor s (median, min) | peak RSS, MB (median) | parent's processor time |")
    print("|---|---|---|---|---|")
    for name, measured_runs in found.items():
        print(_row(name, measured_runs))
    return 0


def _commands(model: str, steps: int, folder: Path) -> dict[str, list[str]]:
    case, image = Case(model, steps=steps), folder / "image.png"
    generate = [sys.executable, "-m", "pocketdiffusion", "generate", case.prompt, "--plain-prompt", "--quiet"]
    generate += ["--seed", str(case.seed), "--steps", str(steps), "--model", model, "--output", str(image)]
    child = child_command(case, find_bundle(model), events=folder / "events", image=image, images=1)
    return {"generate": generate, "child": child, "child, sampled": child}


def _measure(command: Sequence[str], *, sample: bool) -> Measured:
    before = time.process_time()
    ended = run_process(command, sample=sample)
    if ended.code:
        raise BenchError(f"the process to measure failed: {ended.message}")
    return ended, time.process_time() - before


def _row(name: str, runs: Sequence[Measured]) -> str:
    seconds = [ended.end - ended.start for ended, _ in runs]
    peaks = [ended.memory.rss for ended, _ in runs if ended.memory.rss is not None]
    peak = f"{statistics.median(peaks) / 1e6:.1f}" if peaks else "n/a"
    share = statistics.median(cpu / (ended.end - ended.start) for ended, cpu in runs)
    own = [ended.cpu for ended, _ in runs if ended.cpu is not None]
    cells = (_seconds(seconds), _seconds(own), peak, f"{100 * share:.2f} %")
    return f"| {name} | {' | '.join(cells)} |"


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f}, {min(values):.3f}" if values else "n/a"


if __name__ == "__main__":
    sys.exit(main())
